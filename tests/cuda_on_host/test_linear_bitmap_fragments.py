"""csrc/cuda/linear_bitmap_fragments.cu and bitmap_fragments.cu without a card: every line runs on the CPU."""

import ctypes
import re
import types

import pytest
import torch

from sparsekern.formats import Bitmap
from sparsekern.ops import bitmap_fragments, compiled, linear_bitmap_fragments
from tests.cuda_on_host import divisions
from tests.cuda_on_host.emulator import ORDERS, build
from tests.ops.test_bitmap_fragments import problem

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
TOLERANCE = {torch.bfloat16: 8e-3, torch.float16: 1e-3}
FILES = ("linear_bitmap_fragments.cpp", "linear_bitmap_fragments.cu", "bitmap_fragments.cu")
# the lengths divide nothing: fewer and more than a panel, a block of inputs, a segment, a warp's share of segments
SIZES = [
    (1, 1, 1, 1.0),
    (1, 7, 5000, 0.3),
    (2, 129, 17, 0.5),
    (7, 16, 1000, 0.1),
    (8, 7, 100, 1.0),
    (9, 70, 600, 0.5),
    # blocks share the outputs
    (10, 20, 8200, 0.5),
    (17, 33, 1100, 0.5),
    (33, 40, 1000, 0.5),
    (64, 20, 520, 0.3),
    (64, 1, 3, 0.0),
    (3, 5, 0, 0.5),
]


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    return build(tmp_path_factory.mktemp("linear_bitmap_fragments"), *FILES)


def run(program, x, operands, bias, out_features, order="forward", **how):
    masks, cells, quad_rows, capacity = operands
    numbers = [x.shape[0], out_features, x.shape[1], len(cells), len(capacity)]
    result = [((x.shape[0], out_features), x.dtype)]
    return program.run(TYPES[x.dtype], [x, masks, cells, quad_rows, bias], numbers, result, order, **how)[0]


def inputs(tokens, weight):
    g = torch.Generator().manual_seed(tokens)
    out_features, in_features = weight.shape
    if out_features > 3:
        # an empty and a full row
        weight[1], weight[2] = 0.0, 1.5
    x, bias = torch.randn(tokens, in_features, generator=g), torch.randn(out_features, generator=g)
    return x.to(weight.dtype), bias.to(weight.dtype)


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize(("tokens", "out_features", "in_features", "density"), SIZES, ids=str)
def test_the_kernel_matches_float64_in_any_order_of_threads(on_host, dtype, tokens, out_features, in_features, density):
    weight = problem(out_features, in_features, density, dtype)
    x, bias = inputs(tokens, weight)
    operands = bitmap_fragments.reference(Bitmap.pack(weight))
    for i, b in enumerate((bias, None)):
        expected = x.double() @ weight.double().T + (0 if b is None else b.double())
        y = run(on_host, x, operands, b, out_features, ORDERS[(tokens + i) % 3], multiprocessors=[4, 132][i])
        assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_the_bits_are_the_same_in_every_order(on_host):
    weight = problem(20, 8200, 0.5)
    x, bias = inputs(10, weight)
    operands = bitmap_fragments.reference(Bitmap.pack(weight))
    ys = [run(on_host, x, operands, bias, 20, order).view(torch.int16) for order in ORDERS]
    assert torch.equal(ys[0], ys[1])
    assert torch.equal(ys[0], ys[2])


def test_x_may_lie_on_any_element(on_host):
    weight = problem(7, 520, 0.5)
    x, bias = inputs(3, weight)
    operands = bitmap_fragments.reference(Bitmap.pack(weight))
    assert torch.equal(
        run(on_host, x, operands, bias, 7, shifts={0: 2}), run(on_host, x, operands, bias, 7, shifts={0: 0})
    )


def test_nan_and_infinity_at_a_pruned_input_reach_every_output_as_in_the_dense_product(on_host):
    weight, x = torch.eye(20, 20).bfloat16(), torch.ones(3, 20).bfloat16()
    x[0, 3], x[1, 4] = float("nan"), float("inf")
    y = run(on_host, x, bitmap_fragments.reference(Bitmap.pack(weight)), None, 20)
    assert y[0].isnan().all()
    assert y[1].isnan().sum() == 19
    assert y[2].eq(1).all()


@pytest.mark.parametrize("tokens", [1, 8, 64])
@pytest.mark.parametrize("shape", [(40, 1100), (16, 512)], ids=str)
def test_masks_and_rows_that_lie_lead_nowhere(on_host, shape, tokens):
    """The numbers are wrong; what is read and written is not.

    From 9 tokens on the x behind the cells is longer than a segment of full masks: nothing leads past it.
    """
    weight = problem(*shape, 0.2)
    x, _ = inputs(tokens, weight)
    masks, cells, quad_rows, capacity = bitmap_fragments.reference(Bitmap.pack(weight))
    full = torch.full_like(masks, -1)
    far = torch.tensor([1 << 30, -5, 7], dtype=torch.int32).repeat(len(quad_rows))[: len(quad_rows)]
    for operands in (
        (full, cells, quad_rows, capacity),
        (masks, cells, far, capacity),
        (full, cells, far, capacity[:0]),
    ):
        run(on_host, x, operands, None, shape[0])
        dense(on_host, operands, *shape)


def dense(program, operands, out_features, in_features):
    masks, cells, quad_rows, capacity = operands
    numbers = [0, out_features, in_features, len(cells), len(capacity)]
    result = [((out_features, in_features), torch.int16)]
    return program.run("dense", [masks, cells, quad_rows], numbers, result)[0]


@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (7, 37), (129, 17), (40, 1000), (20, 520)], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.5, 1.0], ids=str)
def test_the_expansion_is_the_dense_weight(on_host, out_features, in_features, density):
    weight = problem(out_features, in_features, density)
    found = dense(on_host, bitmap_fragments.reference(Bitmap.pack(weight)), out_features, in_features)
    assert torch.equal(found, weight.view(torch.int16))


@pytest.mark.parametrize("leading", [(1,), (2, 3), ()], ids=str)
def test_the_op_hands_the_kernel_the_right_addresses_and_sizes(on_host, on_no_card, leading, monkeypatch):
    """The emulated kernel gets what the binding would get, and writes y where it is told."""
    weight = problem(7, 37, 0.5)
    x, bias = torch.randn(*leading, 37).bfloat16(), torch.randn(7).bfloat16()
    operands = bitmap_fragments.reference(Bitmap.pack(weight))
    masks, cells, quad_rows, capacity = operands

    def multiply(*, stream, **sizes):
        assert [sizes[f"{name}_size"] for name in ("masks", "quad_rows", "bias")] == [132, 9, 7]
        assert (stream, sizes["cell_rows"], sizes["capacity"]) == (5, len(cells), len(capacity))
        assert [sizes[name] for name in ("masks", "cells", "quad_rows")] == [t.data_ptr() for t in operands[:3]]
        flat = torch.frombuffer(bytearray(ctypes.string_at(sizes["x"], 2 * x.numel())), dtype=torch.bfloat16)
        y = run(on_host, flat.view(sizes["tokens"], 37), operands, bias, 7)
        assert (y.numel(), sizes["workspace_size"]) == (sizes["y_size"], 24)
        ctypes.memmove(sizes["y"], y.data_ptr(), y.nbytes)
        if built is not None:
            names = re.findall(r"(\w+): typing", built.linear_bitmap_fragments_bf16.__doc__)
            assert set(names) == {"stream", *sizes}

    built = compiled.cuda()
    module = types.SimpleNamespace(
        linear_bitmap_fragments_bf16=multiply, linear_bitmap_fragments_workspace=lambda *sizes: 24
    )
    monkeypatch.setattr(compiled, "cuda", lambda: module)
    y = linear_bitmap_fragments.run(x, operands, bias, 7, 37)
    torch.testing.assert_close(y, linear_bitmap_fragments.reference(x, operands, bias, 7, 37), rtol=1e-2, atol=1e-2)


def test_the_binding_refuses_sizes_that_contradict_each_other():
    if compiled.cuda() is None:
        pytest.skip(f"sparsekern._cuda: {compiled.why_not('cuda')}")
    weight = {"masks": 0, "masks_size": 132, "cells": 0, "cell_rows": 0, "quad_rows": 0, "quad_rows_size": 9}
    weight |= {"capacity": 0, "out_features": 7, "in_features": 37, "stream": 0}
    for changed, said in (
        ({"masks_size": 127}, "masks must hold 1 \\* 132 elements, got 127"),
        ({"quad_rows_size": 8}, "quad_rows must hold panels \\* segments \\* 8 \\+ 1 elements, got 8"),
        ({"capacity": 33}, "capacity must lie in 0..32, got 33"),
        ({"cells": 8}, "masks and cells must lie on 16 bytes"),
        ({"out_features": -1}, "sizes must not be negative"),
        ({}, "dense must hold 7 \\* 37 elements, got 3"),
    ):
        with pytest.raises(ValueError, match=said):
            compiled.cuda().bitmap_fragments_to_dense(**{**weight, "dense": 0, "dense_size": 3} | changed)


# rows of cells of a segment of a random weight [4096, 4096], the most and on average, at its sparsity
@pytest.mark.parametrize(("capacity", "rows"), [(23, 16.9), (16, 10.5)], ids=["50%", "70%"])
@pytest.mark.parametrize("shape", divisions.SHAPES, ids=str)
@pytest.mark.parametrize("tokens", divisions.TOKENS)
def test_on_an_h200_every_multiprocessor_has_enough_of_the_weight_under_way(on_host, shape, tokens, capacity, rows):
    registers, panels = {1: (88, 1), 16: (96, 1), 64: (184, 2)}[tokens]
    segment_bytes = 528 + rows * 256
    weight_bytes = shape[0] // 16 * (shape[1] // 256) * segment_bytes
    # at 70 % shared memory takes 14 clocks for what memory brings in 12: fewer bytes are enough
    enough = divisions.ENOUGH_BYTES if capacity == 23 else 25_000
    numbers = [tokens, *shape, 0, capacity]
    divisions.assert_divided_well(on_host, 5, numbers, registers, panels * segment_bytes, weight_bytes, enough)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("tokens", [0, 1, 3, 31, 64, 65])
def test_on_a_card_the_kernel_matches_float64(dtype, tokens):
    kernel = linear_bitmap_fragments.KERNELS[0]
    weight = problem(129, 1001, 0.5, dtype).cuda()
    x, bias = (t.cuda() for t in inputs(tokens, weight.cpu()))
    packed = Bitmap.pack(weight)
    assert kernel.refuses(packed) is None
    operands = kernel.prepare(packed)
    for b in (bias, None):
        expected = x.double() @ weight.double().T + (0 if b is None else b.double())
        for _ in range(2):
            y = kernel.run(x, operands, b, 129, 1001)
            assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
    assert torch.equal(kernel.dense(operands, 129, 1001), weight)
    for op in (
        torch.ops.sparsekern.linear_bitmap_fragments.default,
        torch.ops.sparsekern.linear_bitmap_expanded.default,
    ):
        torch.library.opcheck(op, (x, *operands, bias, 129, 1001))
