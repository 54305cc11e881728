"""ops: how long each op and each step of the way takes, for watching one machine over time with pytest-benchmark.

    pytest bench/ops.py -k large --benchmark-json=ops.json          then: pytest-benchmark compare
    pytest bench/ops.py -k tiny --benchmark-disable                 a check that everything here still runs

These are times of one implementation, in one buffer, in whatever cache holds it. They compare commits, and say nothing
of sparse against dense: that is for linear_bitmap.py and model.py to say.
"""

import pytest
import torch

from sparsekern import SparseGPT, Wanda, ops
from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.ops import LINEAR_KERNELS, addmm, bitmap_panels, gram, inverse_cholesky, keep_largest, obs_sweep
from sparsekern.pattern import NM
from sparsekern.stats import Gram

FORMATS = pytest.mark.parametrize("format", [Bitmap, SemiStructured], ids=lambda format: format.name)


@pytest.fixture(params=[(24, 32), (1024, 1024)], ids=["tiny", "large"])
def weight(request):
    """[out_features, in_features], 2:4, so that every format holds it."""
    weight = torch.randn(request.param, generator=torch.Generator().manual_seed(0))
    return weight.where(NM(2, 4).mask(weight.abs()), 0.0)


@pytest.fixture
def stats(weight):
    stats = Gram(weight.shape[1])
    stats.add(torch.randn(4 * weight.shape[1], weight.shape[1], generator=torch.Generator().manual_seed(1)))
    return stats


@FORMATS
def test_pack(benchmark, format, weight):
    assert torch.equal(benchmark(ops.pack, weight, format).to_dense(), weight)


@FORMATS
def test_to_dense(benchmark, format, weight):
    packed = format.pack(weight)
    assert torch.equal(benchmark(ops.to_dense, packed), weight)


@FORMATS
def test_validate(benchmark, format, weight):
    benchmark(ops.validate, format.pack(weight))


@pytest.mark.parametrize("kernel", bitmap_panels.KERNELS, ids=lambda kernel: kernel.name)
def test_to_panels_and_back(benchmark, kernel, weight):
    packed = Bitmap.pack(weight)
    if reason := kernel.refuses(packed.values):
        pytest.skip(f"{kernel.name}: {reason}")
    restored = benchmark(lambda: kernel.restore(kernel.run(packed), *weight.shape))
    assert torch.equal(restored.to_dense(), weight)


@pytest.mark.parametrize(
    "kernel", [(f, k) for f, ks in LINEAR_KERNELS.items() for k in ks], ids=lambda k: k[0].name + k[1].name
)
def test_linear(benchmark, kernel, weight):
    format, kernel = kernel
    packed = format.pack(weight)
    if reason := kernel.refuses(packed):
        pytest.skip(f"{kernel.name}: {reason}")
    x, operands = torch.randn(4, weight.shape[1]), kernel.prepare(packed)
    y = benchmark(kernel.run, x, operands, None, *weight.shape)
    torch.testing.assert_close(y, x @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", obs_sweep.KERNELS, ids=lambda kernel: kernel.name)
def test_obs_sweep(benchmark, kernel, weight, stats):
    u, _ = stats.inverse_cholesky(0.01)
    block = slice(0, min(128, weight.shape[1]))
    u = u[block, block].contiguous()
    if reason := kernel.refuses(weight, u):
        pytest.skip(f"{kernel.name}: {reason}")
    mask = weight[:, block] != 0
    pruned, _ = benchmark(kernel.run, torch.ones_like(mask, dtype=torch.float32), u, mask)
    assert torch.equal(pruned[~mask], torch.zeros(int((~mask).sum())))


@pytest.mark.parametrize("scope", ["layer", "row", "2:4"])
@pytest.mark.parametrize("kernel", keep_largest.KERNELS, ids=lambda kernel: kernel.name)
def test_keep_largest(benchmark, kernel, scope, weight):
    saliency = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)).square()
    saliency = saliency.view({"layer": (1, -1), "row": weight.shape, "2:4": (-1, 4)}[scope])
    if reason := kernel.refuses(saliency):
        pytest.skip(f"{kernel.name}: {reason}")
    sets, size = saliency.shape
    mask = benchmark(kernel.run, saliency, torch.tensor(size // 2).expand(sets))
    assert (mask.sum(dim=1) == size // 2).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", gram.KERNELS, ids=lambda kernel: kernel.name)
def test_gram(benchmark, kernel, dtype, weight):
    x, total = torch.randn(256, weight.shape[1]).to(dtype), torch.zeros(weight.shape[1], weight.shape[1])
    if reason := kernel.refuses(total, x):
        pytest.skip(f"{kernel.name}: {reason}")
    benchmark(kernel.run, total, x)
    assert total.diagonal().gt(0).all()


@pytest.mark.parametrize("kernel", addmm.KERNELS, ids=lambda kernel: kernel.name)
def test_addmm(benchmark, kernel, weight):
    # a trailing update: a block of 128 errors times what lies right of the block
    a, b, total = torch.randn(len(weight), 128), torch.randn(128, weight.shape[1]), torch.zeros(weight.shape)
    if reason := kernel.refuses(total, a, b):
        pytest.skip(f"{kernel.name}: {reason}")
    benchmark(kernel.run, total, a, b, -1e-3)
    assert total.isfinite().all()


@pytest.mark.parametrize("method", [Wanda(), SparseGPT()], ids=lambda method: type(method).__name__)
def test_prune(benchmark, method, weight, stats):
    dense = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    pruned = benchmark(method.prune, dense, stats, NM(2, 4))
    assert (pruned == 0).sum() == dense.numel() / 2


@pytest.mark.parametrize("kernel", inverse_cholesky.KERNELS, ids=lambda kernel: kernel.name)
def test_inverse_cholesky(benchmark, kernel, stats):
    h = stats.hessian + 0.01 * torch.eye(len(stats.hessian))
    if reason := kernel.refuses(h):
        pytest.skip(f"{kernel.name}: {reason}")
    # the op may overwrite what it is given: a copy each round, outside the time
    _, failed = benchmark.pedantic(kernel.run, setup=lambda: ((h.clone(),), {}), rounds=5)
    assert not failed
