"""Plan: of a card's sparse kernel, its expansion with cuBLAS and dense, what was measured fastest serves."""

from dataclasses import replace

import pytest
import torch

from sparsekern.decisions import DENSE
from sparsekern.formats import Bitmap, Dense, SemiStructured
from sparsekern.ops import LINEAR_KERNELS
from sparsekern.plan import Plan
from sparsekern.timing import Alternation, Sample
from tests.test_plan import Refusing

# what a card might say at some numbers of tokens: seconds of F.linear, of the kernel, of the expansion with cuBLAS
CARD = {1: (10.0, 6.0, 14.0), 64: (10.0, 12.0, 9.0), 512: (10.0, 20.0, 14.0)}


@pytest.mark.parametrize("format", [Bitmap, SemiStructured], ids=lambda format: format.name)
@pytest.mark.parametrize(
    ("tokens", "kernel"), [((1,), "cuda"), ((64,), "cuda_expanded"), ((512,), None), ((1, 64), None)]
)
def test_of_a_cards_kernel_expansion_and_dense_the_measured_fastest_serves(monkeypatch, format, tokens, kernel):
    times = iter([CARD[count] for count in tokens])

    def alternate(variants, seconds, device):
        for variant in variants.values():
            variant(0)
        by_name = dict(zip([DENSE, f"{format.name} cuda", f"{format.name} cuda_expanded"], next(times), strict=True))
        return Alternation({name: [Sample(by_name[name])] * 10 for name in variants})

    reference = LINEAR_KERNELS[format][-1]
    on_card = {kernel.name: kernel for kernel in LINEAR_KERNELS[format] if kernel.name in ("cuda", "cuda_expanded")}
    assert list(on_card) == ["cuda", "cuda_expanded"]
    # as on a card, but for what they do: each is its own candidate, so each needs a run of its own
    served = [replace(each, refuses=lambda packed: None, prepare=reference.prepare) for each in on_card.values()]
    served = [replace(each, run=lambda *a, r=reference.run: r(*a)) for each in served]
    monkeypatch.setitem(LINEAR_KERNELS, format, (*served, reference))
    monkeypatch.setitem(LINEAR_KERNELS, Dense, LINEAR_KERNELS[Dense][-1:])
    monkeypatch.setattr("sparsekern.plan.alternate", alternate)
    monkeypatch.setattr("sparsekern.plan.ONEDNN", Refusing)
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0] * 8] * 24)
    decision = Plan(arena=0).decide((format.pack(weight),), weight, tokens)
    assert (decision.format, decision.kernel) == (kernel and format.name, kernel)
    assert set(decision.times) == set(tokens)


def test_a_cards_kernel_and_its_expansion_are_two_candidates():
    """A plan takes kernels with one run for one candidate."""
    for kernels in LINEAR_KERNELS.values():
        runs = [kernel.run for kernel in kernels]
        assert len(set(runs)) == len(runs)
