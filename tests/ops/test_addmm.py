"""addmm: every kernel against float64, at sizes that divide nothing and on slices of larger matrices."""

import pytest
import torch

from sparsekern.ops import addmm, compiled
from sparsekern.ops.kernel import pick


def matrix(rows, columns, seed):
    """A slice: its rows do not follow each other in memory."""
    return torch.randn(rows, columns + 7, generator=torch.Generator().manual_seed(seed))[:, 3 : 3 + columns]


@pytest.mark.parametrize("kernel", addmm.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize(
    "sizes",
    [(1, 1, 1), (5, 3, 7), (8, 16, 48), (193, 130, 60), (60, 1030, 195), (9, 0, 4), (0, 3, 3), (3, 3, 0)],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.5])
@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
def test_every_kernel_matches_float64(kernel, sizes, scale, transposed):
    rows, inner, columns = sizes
    a = matrix(inner, rows, 0).T if "a" in transposed else matrix(rows, inner, 0)
    b = matrix(columns, inner, 1).T if "b" in transposed else matrix(inner, columns, 1)
    total = matrix(rows, columns, 2)
    if reason := kernel.refuses(total, a, b):
        pytest.skip(f"{kernel.name}: {reason}")
    exact = total.double() + scale * (a.double() @ b.double())
    kernel.run(total, a, b, scale)
    torch.testing.assert_close(total.double(), exact, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kernel", addmm.KERNELS, ids=lambda kernel: kernel.name)
def test_what_lies_beside_a_slice_is_left_alone(kernel):
    whole = torch.zeros(20, 90)
    total = whole[3:17, 20:81]
    a, b = torch.ones(14, 5), torch.ones(5, 61)
    if reason := kernel.refuses(total, a, b):
        pytest.skip(f"{kernel.name}: {reason}")
    kernel.run(total, a, b, 2.0)
    assert total.eq(10).all()
    assert whole.sum() == 10 * total.numel()


def test_the_product_does_not_depend_on_the_number_of_threads():
    a, b, before = matrix(300, 700, 0), matrix(700, 500, 1), torch.get_num_threads()
    products = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        products.append(addmm.matmul(a, b))
    torch.set_num_threads(before)
    if pick(addmm.KERNELS, products[0], a, b).name != "cpu":
        pytest.skip("the compiled kernel does not serve here")
    assert torch.equal(products[0], products[1])
    assert torch.equal(products[0], products[2])


@pytest.mark.parametrize("which", range(3))
def test_an_operand_with_holes_or_repeated_rows_goes_to_torch(which):
    operands = [torch.randn(6, 6) for _ in range(3)]
    operands[which] = torch.randn(12, 12)[::2, ::2]
    exact = operands[0].double() + operands[1].double() @ operands[2].double()
    assert pick(addmm.KERNELS, *operands).name == "reference"
    addmm.addmm(*operands)
    torch.testing.assert_close(operands[0].double(), exact, rtol=1e-5, atol=1e-5)


def test_one_row_repeated_is_a_matrix():
    total, a, b = torch.zeros(4, 6), torch.randn(4, 5), torch.randn(1, 6).expand(5, 6)
    addmm.addmm(total, a, b)
    torch.testing.assert_close(total, a.sum(dim=1, keepdim=True) * b[:1], rtol=1e-5, atol=1e-5)


def test_a_column_major_total_goes_to_torch():
    total = torch.zeros(6, 4).T
    assert pick(addmm.KERNELS, total, torch.ones(4, 2), torch.ones(2, 6)).name == "reference"


def test_without_the_compiled_module_torch_serves(monkeypatch):
    monkeypatch.setattr(compiled, "why_not", lambda name: "not built: no compiler")
    assert pick(addmm.KERNELS, *(torch.zeros(3, 3) for _ in range(3))).name == "reference"


@pytest.mark.parametrize("kernel", addmm.KERNELS, ids=lambda kernel: kernel.name)
def test_shapes_that_do_not_fit_are_refused(kernel):
    total, a, b = torch.zeros(4, 5), torch.zeros(4, 3), torch.zeros(2, 5)
    if reason := kernel.refuses(total, a, b):
        pytest.skip(f"{kernel.name}: {reason}")
    with pytest.raises((ValueError, RuntimeError)):
        kernel.run(total, a, b)
