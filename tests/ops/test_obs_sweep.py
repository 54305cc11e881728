"""obs_sweep: the reference against a least-squares refit, then every kernel against the reference."""

import pytest
import torch

from sparsekern.ops import compiled, obs_sweep
from sparsekern.ops.kernel import pick
from sparsekern.pattern import NM, Unstructured

SPARSITIES = [Unstructured(0.5), Unstructured(0.7), NM(2, 4), NM(4, 8), NM(1, 4)]


def problem(rows, block, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(block) + torch.randn(block, block, generator=g) / (2 * block**0.5)
    x = torch.randn(4 * block, block, generator=g) @ mix
    hessian = x.T @ x / len(x)
    u = torch.linalg.cholesky(hessian.inverse(), upper=True).contiguous()
    weight = torch.randn(rows, block, generator=g)
    mask = torch.rand(rows, block, generator=g) > 0.5
    return weight, hessian, u, mask


def asked(pattern, weight, u):
    """What a caller gives for a pattern: the mask, and nm."""
    if isinstance(pattern, NM):
        return torch.ones_like(weight, dtype=torch.bool), (pattern.n, pattern.m)
    return pattern.mask((weight / u.diagonal()).square()), None


def row_scale(weight, levels):
    return weight.abs().amax(dim=1) / levels


def test_pruning_one_column_gives_the_least_squares_refit():
    """Pruning only column 0 must leave the other weights at their optimum."""
    weight, hessian, u, mask = problem(rows=8, block=16)
    mask[:] = True
    mask[:, 0] = False
    pruned, _ = obs_sweep.reference(weight, u, mask)
    # minimise (w - w0)^T H (w - w0) with w_0 = 0: the rest moves by H_rr^-1 H_r0 w0
    best = weight[:, 1:] + weight[:, :1] * torch.linalg.solve(hessian[1:, 1:], hessian[1:, 0])
    torch.testing.assert_close(pruned[:, 1:], best, rtol=1e-3, atol=1e-3)


def test_rounding_one_column_gives_the_least_squares_refit():
    """What one column loses to the grid, the columns behind it make good as well as they can."""
    weight, hessian, u, mask = problem(rows=8, block=16)
    mask[:] = True
    # so coarse a grid for column 0 that the others, far below half a step of it, do not matter
    scale = torch.full((8,), 1e6)
    first, e = obs_sweep.reference(weight[:, :1], u[:1, :1], mask[:, :1], None, scale, 7)
    assert (first == 0).all()
    best = weight[:, 1:] + weight[:, :1] * torch.linalg.solve(hessian[1:, 1:], hessian[1:, 0])
    torch.testing.assert_close(weight[:, 1:] - e @ u[:1, 1:], best, rtol=1e-3, atol=1e-3)


def test_the_errors_carry_the_repair_to_the_columns_behind_the_block():
    weight, _, u, mask = problem(rows=5, block=24)
    whole, _ = obs_sweep.reference(weight, u, mask)
    left, right = slice(0, 8), slice(8, 24)
    first, e = obs_sweep.reference(weight[:, left], u[left, left].contiguous(), mask[:, left])
    behind = weight[:, right] - e @ u[left, right]
    second, _ = obs_sweep.reference(behind, u[right, right].contiguous(), mask[:, right])
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole, rtol=1e-4, atol=1e-4)


def test_nm_is_chosen_group_by_group_on_repaired_weights():
    weight, _, u, _ = problem(rows=9, block=24)
    pruned, _ = obs_sweep.reference(weight, u, torch.ones_like(weight, dtype=torch.bool), (2, 4))
    w = weight.clone()
    for start in range(0, 24, 4):
        group = slice(start, start + 4)
        mask = torch.ones_like(w, dtype=torch.bool)
        mask[:, group] = NM(2, 4).mask((w / u.diagonal()).square()[:, group])
        w, _ = obs_sweep.reference(w, u, mask)
    assert torch.equal(pruned != 0, w != 0)
    torch.testing.assert_close(pruned, w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", obs_sweep.KERNELS, ids=lambda kernel: kernel.name)
class TestEveryKernel:
    @pytest.fixture(autouse=True)
    def skip_where_it_refuses(self, kernel):
        weight, _, u, _ = problem(1, 8)
        if reason := kernel.refuses(weight, u):
            pytest.skip(f"{kernel.name}: {reason}")

    @pytest.mark.parametrize("pattern", SPARSITIES, ids=str)
    @pytest.mark.parametrize("block", [8, 32, 40, 128], ids="block{}".format)
    @pytest.mark.parametrize("rows", [1, 7, 16, 37], ids="rows{}".format)
    def test_matches_the_reference_in_float64_with_the_same_mask(self, kernel, rows, block, pattern):
        weight, _, u, _ = problem(rows, block, seed=rows + block)
        before = weight.clone()
        mask, nm = asked(pattern, weight, u)
        pruned, e = kernel.run(weight, u, mask, nm)
        expected, expected_e = obs_sweep.reference(weight.double(), u.double(), mask, nm)
        assert torch.equal(pruned != 0, expected != 0)
        torch.testing.assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(e.double(), expected_e, rtol=1e-4, atol=1e-4)
        assert torch.equal(weight, before)

    @pytest.mark.parametrize("pattern", SPARSITIES, ids=str)
    @pytest.mark.parametrize("levels", [7, 127])
    def test_rounds_to_the_grid_and_repairs_as_the_reference(self, kernel, pattern, levels):
        weight, _, u, _ = problem(rows=37, block=40)
        scale = row_scale(weight, levels)
        scale[3] = 0
        mask, nm = asked(pattern, weight, u)
        pruned, e = kernel.run(weight, u, mask, nm, scale, levels)
        steps = (pruned / scale[:, None].where(scale[:, None] != 0, 1.0)).round()
        assert torch.equal(steps * scale[:, None], pruned)
        assert steps.abs().max() <= levels
        assert (pruned[3] == 0).all()
        expected, expected_e = obs_sweep.reference(weight.double(), u.double(), mask, nm, scale.double(), levels)
        # a weight half-way between two grid values may fall to either side, and its row goes another way from there
        same = ((pruned - expected).abs() < 1e-3).all(dim=1)
        assert same.float().mean() > 0.9
        torch.testing.assert_close(e.double()[same], expected_e[same], rtol=1e-3, atol=1e-4)

    def test_what_the_mask_forbids_stays_pruned_under_nm(self, kernel):
        weight, _, u, _ = problem(rows=16, block=32)
        mask = torch.rand(16, 32, generator=torch.Generator().manual_seed(5)) > 0.6
        pruned, _ = kernel.run(weight, u, mask, (2, 4))
        assert (pruned[~mask] == 0).all()
        # where the mask leaves fewer than n they all stay
        allowed = mask.view(16, 8, 4).sum(dim=2)
        assert torch.equal((pruned != 0).view(16, 8, 4).sum(dim=2), allowed.clamp(max=2))

    @pytest.mark.parametrize(
        "nm", [(2, 4), (1, 4), (6, 8), (3, 5), (16, 32), (8, 8)], ids=lambda nm: f"{nm[0]}:{nm[1]}"
    )
    def test_ties_go_to_the_lower_index(self, kernel, nm):
        weight = torch.ones(5, 160)
        pruned, _ = kernel.run(weight, torch.eye(160), torch.ones(5, 160, dtype=torch.bool), nm)
        expected = torch.arange(160) % nm[1] < nm[0]
        assert torch.equal(pruned != 0, expected.expand(5, 160))

    def test_pruned_weights_are_positive_zeros(self, kernel):
        weight, _, u, mask = problem(rows=16, block=32)
        for scale, levels in ((None, 0), (row_scale(weight, 7), 7)):
            pruned, _ = kernel.run(weight, u, mask, None, scale, levels)
            assert (pruned[~mask] == 0).all()
            assert not torch.signbit(pruned[pruned == 0]).any()

    def test_slices_of_a_wider_weight_are_read_where_they_lie(self, kernel):
        weight, _, u, mask = problem(rows=7, block=24)
        wide, wide_mask = torch.full((7, 50), torch.nan), torch.ones(7, 50, dtype=torch.bool)
        wide[:, 13:37], wide_mask[:, 13:37] = weight, mask
        got = kernel.run(wide[:, 13:37], u, wide_mask[:, 13:37])
        for mine, whole in zip(got, kernel.run(weight, u, mask), strict=True):
            assert torch.equal(mine, whole)

    def test_what_is_returned_can_be_written_in_place(self, kernel):
        weight, _, u, mask = problem(rows=37, block=24)
        pruned, e = kernel.run(weight, u, mask)
        wide, errors = torch.full((37, 50), 2.0), torch.full((37, 24), torch.nan)
        wide[:, 13:37] = weight
        kernel.run(wide[:, 13:37], u, mask, out=(wide[:, 13:37], errors))
        assert torch.equal(wide[:, 13:37], pruned)
        assert torch.equal(errors, e)
        assert (wide[:, :13] == 2).all()
        assert (wide[:, 37:] == 2).all()
        # where it cannot be written directly it is copied
        columns = torch.full((24, 37), torch.nan).T
        kernel.run(weight, u, mask, out=(columns, errors.double()))
        assert torch.equal(columns, pruned)
        with pytest.raises(ValueError, match=r"out must be \[37, 24\] for a weight \[37, 24\], got \[37, 23\]"):
            kernel.run(weight, u, mask, out=(columns, errors[:, 1:]))

    def test_a_single_row_may_have_any_stride(self, kernel):
        """torch calls a transposed column contiguous, and leaves its row the stride 1."""
        weight, _, u, mask = problem(rows=1, block=24)
        pruned, e = kernel.run(weight, u, mask)
        column, forbidden, errors = weight.clone().view(24, 1), mask.clone().view(24, 1), torch.full((24, 1), torch.nan)
        assert column.T.stride() == (1, 1)
        kernel.run(column.T, u, forbidden.T, out=(column.T, errors.T))
        assert torch.equal(column.T, pruned)
        assert torch.equal(errors.T, e)

    def test_no_rows_and_no_columns_are_nothing_to_do(self, kernel):
        for rows, block in ((0, 8), (3, 0)):
            weight = torch.zeros(rows, block)
            pruned, e = kernel.run(weight, torch.eye(block), torch.zeros(rows, block, dtype=torch.bool))
            assert pruned.shape == e.shape == (rows, block)

    def test_what_does_not_fit_is_refused_in_words(self, kernel):
        weight, _, u, mask = problem(rows=5, block=10)
        with pytest.raises(ValueError, match=r"u must be contiguous, got strides \[1, 10\]"):
            kernel.run(weight, u.T, mask)
        with pytest.raises(ValueError, match=r"u must be \[10, 10\] for a weight \[5, 10\], got \[8, 8\]"):
            kernel.run(weight, u[:8, :8], mask)
        with pytest.raises(ValueError, match=r"mask must be \[5, 10\] for a weight \[5, 10\], got \[5, 8\]"):
            kernel.run(weight, u, mask[:, :8])
        with pytest.raises(ValueError, match="mask must be bool, got torch.float32"):
            kernel.run(weight, u, mask.float())
        with pytest.raises(ValueError, match="a block that M divides, got 2:4 and 10 columns"):
            kernel.run(weight, u, mask, (2, 4))
        with pytest.raises(ValueError, match="a scale goes with levels of at least 1, got 0"):
            kernel.run(weight, u, mask, None, torch.ones(5))


def test_the_reference_serves_every_dtype():
    assert pick(obs_sweep.KERNELS, torch.zeros(2, 4).double(), torch.eye(4).double()).name == "reference"


SETS = compiled.cpu().obs_sweep_sets() if compiled.why_not("cpu") is None else ()
needs_cpu = pytest.mark.skipif(compiled.why_not("cpu") is not None, reason=f"cpu: {compiled.why_not('cpu')}")


@pytest.mark.parametrize("pattern", SPARSITIES, ids=str)
@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set_matches_the_reference_with_the_same_mask(isa, pattern):
    for rows, block in ((1, 40), (33, 40), (70, 128), (16, 5 * 8)):
        weight, _, u, _ = problem(rows, block, seed=rows)
        mask, nm = asked(pattern, weight, u)
        pruned, e = obs_sweep.on_cpu(weight, u, mask, nm, isa=isa)
        expected, expected_e = obs_sweep.reference(weight.double(), u.double(), mask, nm)
        assert torch.equal(pruned != 0, expected != 0)
        torch.testing.assert_close(pruned.double(), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(e.double(), expected_e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("isa", SETS)
def test_every_instruction_set_rounds_half_to_even_and_saturates(isa):
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 9.0, -9.0, 1e30, -0.4]])
    mask = torch.ones(1, 9, dtype=torch.bool)
    pruned, _ = obs_sweep.on_cpu(weight, torch.eye(9), mask, None, torch.ones(1), 7, isa=isa)
    assert pruned.tolist() == [[0, 2, 2, 0, -2, 7, -7, 7, 0]]
    assert not torch.signbit(pruned[pruned == 0]).any()


@pytest.mark.parametrize("isa", SETS)
def test_the_number_of_threads_changes_no_bit(isa):
    weight, _, u, _ = problem(rows=1000, block=128)
    everything, before = torch.ones_like(weight, dtype=torch.bool), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(obs_sweep.on_cpu(weight, u, everything, (2, 4), isa=isa))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(mine, first) for mine, first in zip(result, results[0], strict=True))


@needs_cpu
def test_the_compiled_kernel_says_what_it_cannot_serve():
    kernel = next(k for k in obs_sweep.KERNELS if k.name == "cpu")
    assert kernel.refuses(torch.zeros(2, 4).double(), torch.eye(4)) == "weight must be float32, got torch.float64"
    assert kernel.refuses(torch.zeros(2, 4), torch.eye(4, device="meta")) == "u must be on the CPU, got meta"
    weight = torch.zeros(2, 4)
    with pytest.raises(ValueError, match="does not have the instruction set amx"):
        obs_sweep.on_cpu(weight, torch.eye(4), weight == 0, isa="amx")
    address = (weight.data_ptr(), 4, weight.data_ptr(), weight.data_ptr(), 4)
    for n, m, levels, rows, block, threads, why in (
        *((2, 3, 0, 2, 4, 1, "N:M must divide the block, got 2:3"), (0, 0, 1 << 21, 2, 4, 1, "levels must lie in")),
        *((0, 0, 0, -1, 4, 1, "must not be negative, got -1 and 4"), (0, 0, 0, 2, 8, 1, "strides must not be below")),
        *((0, 0, 0, 2, 1 << 20, 1, "the block is impossible"), (0, 0, 0, 2, 4, 0, "threads must be positive, got 0")),
    ):
        with pytest.raises(ValueError, match=why):
            compiled.cpu().obs_sweep(*address, n, m, 0, levels, 0, 4, 0, 4, rows, block, threads)
