"""obs_blocks: every kernel against the reference in float64, block by block, and what is refused."""

import pytest
import torch

from sparsekern.ops import obs_blocks as op
from sparsekern.ops.obs_blocks import Choice

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def problem(rows, columns, device="cpu"):
    g = torch.Generator().manual_seed(columns)
    mix = torch.eye(columns) + torch.randn(columns, columns, generator=g) / (2 * columns**0.5)
    x = torch.randn(4 * columns, columns, generator=g) @ mix
    u = torch.linalg.cholesky((x.T @ x / len(x)).inverse(), upper=True).contiguous()
    return torch.randn(rows, columns, generator=g).to(device), u.to(device)


def choices(rows, columns, device="cpu"):
    """One of each kind for blocks of 32 columns, with and without weights that were pruned before."""
    g = torch.Generator().manual_seed(rows)
    mask, present = ((torch.rand(rows, columns, generator=g) < share).to(device) for share in (0.5, 0.8))
    kept = [rows * min(32, columns - start) * 2 // 5 for start in range(0, columns, 32)]
    for p in (None, present):
        yield from (Choice(nm=(2, 4), present=p), Choice(kept=kept, present=p), Choice(mask=mask, present=p))


@pytest.mark.parametrize("kernel", op.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "columns"), [(1, 4), (37, 72), (70, 160)], ids=str)
def test_every_kernel_keeps_the_mask_of_float64_and_repairs_as_it_does(kernel, device, rows, columns):
    w, u = problem(rows, columns, device)
    for choice in choices(rows, columns, device):
        if reason := kernel.refuses(w, u, 32, choice):
            pytest.skip(f"{kernel.name}: {reason}")
        mine, exact = w.clone(), w.double()
        kernel.run(mine, u, 32, choice)
        op.reference(exact, u.double(), 32, choice)
        assert torch.equal(mine != 0, exact != 0)
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4)
        assert not torch.signbit(mine[mine == 0]).any()


@pytest.mark.parametrize("kernel", op.KERNELS[1:], ids=lambda kernel: kernel.name)
def test_counts_are_exact_in_every_block_even_among_ties(kernel):
    w = torch.ones(6, 80)
    kernel.run(w, torch.eye(80), 32, Choice(kept=[0, 192, 7]))
    assert [int(part.count_nonzero()) for part in w.split(32, dim=1)] == [0, 192, 7]
    # ties to the lower index, row by row
    assert w[0, 64:].tolist() == [1] * 7 + [0] * 9


@pytest.mark.parametrize("kernel", op.KERNELS[1:], ids=lambda kernel: kernel.name)
def test_nan_among_the_saliencies_is_refused(kernel):
    w, u = problem(5, 40)
    w[3, 35] = torch.nan
    with pytest.raises(ValueError, match="saliency holds 1 NaN values"):
        kernel.run(w, u, 32, Choice(kept=[80, 20]))


def test_what_does_not_fit_is_refused_in_words():
    w, u = problem(5, 40)
    for u_, block_size, choice, said in (
        (u[:8, :8], 32, Choice(nm=(2, 4)), r"u must be \[40, 40\] for a weight \[5, 40\], got \[8, 8\]"),
        (u.T, 32, Choice(nm=(2, 4)), r"u must be contiguous, got strides \[1, 40\]"),
        (u, 32, Choice(), "exactly one of nm, kept and mask says what stays"),
        (u, 30, Choice(nm=(2, 4)), "M must divide block_size and in_features, got 2:4, 30 and 40"),
        (u, 32, Choice(kept=[1]), "kept must have a number for each of 2 blocks, got 1"),
        (u, 32, Choice(mask=w != 0, kept=[1, 1]), "exactly one"),
        (u, 32, Choice(mask=w), r"mask must be \[5, 40\] bool, got \[5, 40\] torch.float32"),
    ):
        with pytest.raises(ValueError, match=said):
            op.run(w, u_, block_size, choice)


def test_the_kernel_for_a_card_refuses_in_words():
    w, u = problem(5, 40)
    triton, choice = op.KERNELS[0], Choice(nm=(2, 4))
    assert triton.name == "triton"
    assert triton.refuses(w, u, 32, choice) == "w must be on a CUDA device, got cpu"
