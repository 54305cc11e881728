"""Pruning where the weight is: a card is as good as the CPU, keeps its promises, and no other stream disturbs it."""

import pytest
import torch

from sparsekern.methods import ADMM, SparseGPT, Wanda
from sparsekern.ops import inverse_cholesky, keep_largest, obs_blocks, obs_sweep
from sparsekern.ops.kernel import pick
from sparsekern.pattern import NM, Unstructured
from sparsekern.stats import Gram
from tests.on_card.test_linear import on_streams

PATTERNS = [Unstructured(0.5), NM(2, 4)]


def problem(rows, size, device):
    generator = torch.Generator().manual_seed(size)
    mix = torch.eye(size) + torch.randn(size, size, generator=generator) / size**0.5
    x = torch.randn(4 * size, size, generator=generator) @ mix
    stats = Gram(size, device)
    stats.add(x.to(device))
    return torch.randn(rows, size, generator=generator).to(device), stats


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("method", [Wanda(), SparseGPT(), ADMM()], ids=lambda method: type(method).__name__)
def test_a_method_keeps_its_promises_and_is_as_good_as_on_the_cpu(method, pattern, place):
    weight, stats = problem(96, 256, place)
    pruned = method.prune(weight, stats, pattern)
    assert pruned.device == place
    assert int((pruned == 0).sum()) == weight.numel() // 2
    if isinstance(pattern, NM):
        assert ((pruned != 0).view(-1, 4).sum(1) == 2).all()
    on_cpu, cpu_stats = problem(96, 256, "cpu")
    expected = float(cpu_stats.error(on_cpu, method.prune(on_cpu, cpu_stats, pattern)))
    assert float(stats.error(weight, pruned)) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("size", [64, 300, 1024])
def test_every_kernel_inverts_and_factors(size, place):
    _, stats = problem(1, size, place)
    h = stats.hessian + 0.01 * torch.eye(size, device=place)
    for kernel in inverse_cholesky.KERNELS:
        if kernel.refuses(h) is None:
            u, failed = kernel.run(h.clone())
            assert not failed
            identity = u.double().T @ (u.double() @ h.double())
            torch.testing.assert_close(identity, torch.eye(size, device=place).double(), rtol=0, atol=1e-3)


def test_two_sweeps_at_once_do_not_disturb_each_other(place):
    weights = [problem(512, 128, place)[0] + number for number in range(2)]
    u, _ = problem(1, 128, place)[1].inverse_cholesky(0.01)
    mask = torch.ones_like(weights[0], dtype=torch.bool)
    sweep = pick(obs_sweep.KERNELS, weights[0], u).run
    expected = [sweep(weight, u, mask, (2, 4)) for weight in weights]
    for number, (pruned, e) in on_streams(place, lambda n: sweep(weights[n], u, mask, (2, 4)), rounds=10):
        assert torch.equal(pruned, expected[number][0])
        assert torch.equal(e, expected[number][1])


def test_two_thresholds_at_once_do_not_disturb_each_other(place):
    saliencies = [problem(200, 300, place)[0].square().view(1, -1) * (number + 1) for number in range(2)]
    kept = torch.tensor([20_000], device=place)
    run = pick(keep_largest.KERNELS, saliencies[0]).run
    for number, mask in on_streams(place, lambda n: run(saliencies[n], kept), rounds=5):
        assert int(mask.sum()) == 20_000
        lowest = saliencies[number][mask].min()
        assert (saliencies[number][~mask] <= lowest).all()


@pytest.mark.parametrize(
    "choice", [obs_blocks.Choice(nm=(2, 4)), obs_blocks.Choice(kept=[9000] * 3)], ids=["2:4", "kept"]
)
def test_two_layers_at_once_do_not_disturb_each_other(place, choice):
    weights = [problem(200, 300, place)[0] + number for number in range(2)]
    u, _ = problem(1, 300, place)[1].inverse_cholesky(0.01)

    def prune(number):
        w = weights[number].clone()
        obs_blocks.run(w, u, 100, choice)
        return w

    expected = [prune(number) for number in range(2)]
    for number, w in on_streams(place, prune, rounds=5):
        assert torch.equal(w, expected[number])
