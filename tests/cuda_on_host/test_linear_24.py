"""csrc/cuda/linear_24.cu without a card: its own source runs on the CPU, and what nvcc makes of it is read."""

import ctypes
import re
import types
from pathlib import Path

import pytest
import torch

from sparsekern.formats import SemiStructured
from sparsekern.ops import compiled, fragments_24, linear_24
from sparsekern.pattern import NM
from tests import sass
from tests.cuda_on_host import divisions
from tests.cuda_on_host.emulator import ORDERS, build, launches
from tests.on_card.subjects import SHARED

TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
# of a sum rounded once to the type
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4}
# tokens, out_features, in_features: sizes that divide nothing; 2048 inputs are enough for blocks to share them
SHAPES = [
    *((1, 1, 4), (7, 15, 36), (8, 17, 260), (9, 129, 520), (16, 16, 256), (17, 33, 300)),
    *((63, 17, 520), (64, 129, 260), (33, 17, 2048), (1, 40, 4100)),
]


@pytest.fixture(scope="module")
def on_host(tmp_path_factory):
    return build(tmp_path_factory.mktemp("linear_24"), "linear_24.cpp", "linear_24.cu")


def problem(tokens, out_features, in_features, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=g)
    weight = weight.where(NM(2, 4).mask(torch.rand(weight.shape, generator=g)), 0.0)
    # groups that keep one weight or none
    weight[torch.rand(weight.shape, generator=g) < 0.1] = -0.0
    x, bias = torch.randn(tokens, in_features, generator=g), torch.randn(out_features, generator=g)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


def run(program, x, packed, bias, **how):
    """y of the program, and how many bytes of workspace it took."""
    out_features, in_features = packed.shape
    tensors = [x, *fragments_24.reference(packed), bias]
    results = [((len(x), out_features), x.dtype), ((1,), torch.int64)]
    y, workspace = program.run(TYPES[x.dtype], tensors, [len(x), out_features, in_features], results, **how)
    return y, int(workspace)


def assert_right(y, x, weight, bias):
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    assert not y.isnan().any()
    assert (y.double() - expected).norm() <= TOLERANCE[x.dtype] * expected.norm()


@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_matches_float64_and_reads_nothing_else(on_host, dtype, shape):
    x, weight, bias = problem(*shape, dtype)
    packed = SemiStructured.pack(weight)
    for i, b in enumerate((bias, None)):
        assert_right(run(on_host, x, packed, b, order=ORDERS[i], multiprocessors=4)[0], x, weight, b)


@pytest.mark.parametrize(("tokens", "out_features", "in_features"), [(5, 40, 2052), (64, 33, 1032), (30, 20, 8192)])
def test_the_bits_do_not_depend_on_who_comes_first(on_host, tokens, out_features, in_features):
    """Of the last, blocks share the inputs: shuffled, one is held up as soon as it has counted itself."""
    x, weight, bias = problem(tokens, out_features, in_features, torch.bfloat16)
    packed = SemiStructured.pack(weight)
    for multiprocessors in (1, 132):
        y = [run(on_host, x, packed, bias, order=o, multiprocessors=multiprocessors)[0] for o in ORDERS]
        assert_right(y[0], x, weight, bias)
        assert all(torch.equal(y[0], other) for other in y[1:])


@pytest.mark.parametrize(("tokens", "in_features"), [(3, 12800), (30, 6400)])
def test_blocks_share_inputs_where_multiprocessors_would_be_idle(on_host, tokens, in_features):
    x, weight, bias = problem(tokens, 20, in_features, torch.float16)
    packed = SemiStructured.pack(weight)
    taken = []
    for multiprocessors in (1, 132):
        y, workspace = run(on_host, x, packed, bias, multiprocessors=multiprocessors)
        assert_right(y, x, weight, bias)
        taken.append(workspace)
    assert taken[0] == 0 < taken[1]


@pytest.mark.parametrize("shift", [2, 4, 8])
@pytest.mark.parametrize("in_features", [264, 268])
def test_x_may_lie_anywhere(on_host, shift, in_features):
    """x[1:] of a larger tensor, and rows that do not start on 16 bytes."""
    x, weight, bias = problem(11, 17, in_features, torch.bfloat16)
    packed = SemiStructured.pack(weight)
    y, _ = run(on_host, x, packed, bias, shifts={0: shift})
    assert torch.equal(y, run(on_host, x, packed, bias)[0])
    assert_right(y, x, weight, bias)


@pytest.mark.parametrize("in_features", [260, 264])
def test_nan_and_infinity_reach_the_outputs_that_keep_their_input_and_no_other_token(on_host, in_features):
    weight = torch.zeros(3, in_features, dtype=torch.bfloat16)
    # input 0 is pruned by two that are kept; what fills the last chunk up must not read it in their place
    weight[:, 2:4] = 1.0
    weight[0, 256:258] = 1.0
    weight[1, 258:260] = 1.0
    x = torch.ones(9, in_features, dtype=torch.bfloat16)
    x[:, 0] = float("inf")
    x[2, 256], x[8, 259] = float("nan"), float("inf")
    y, _ = run(on_host, x, SemiStructured.pack(weight), None)
    expected = torch.tensor([[4.0, 4.0, 2.0]]).repeat(9, 1)
    expected[2, 0], expected[8, 1] = float("nan"), float("inf")
    # row 2 keeps nothing there: its zeros stand at positions 0 and 1, and are multiplied
    expected[2, 2] = float("nan")
    torch.testing.assert_close(y.float(), expected, equal_nan=True)


def test_negative_zeros_are_packed_as_zeros_and_give_positive_ones(on_host):
    weight = torch.full((3, 8), -0.0, dtype=torch.bfloat16)
    y, _ = run(on_host, torch.full((2, 8), 3.0, dtype=torch.bfloat16), SemiStructured.pack(weight), None)
    assert y.tolist() == [[0.0] * 3] * 2
    assert not y.signbit().any()


@pytest.mark.parametrize("tokens", [9, 24])
def test_warps_that_share_x_wait_for_each_other_before_its_next_step(on_host, tokens):
    """One multiprocessor takes blocks of warps with outputs of their own, 17 panels of 5 chunks, or two at a time."""
    x, weight, bias = problem(tokens, 257, 1100, torch.bfloat16)
    for order in ORDERS:
        y, _ = run(on_host, x, SemiStructured.pack(weight), bias, order=order, multiprocessors=1)
        assert_right(y, x, weight, bias)


def test_blocks_are_summed_in_one_order_also_where_the_sum_nearly_cancels(on_host):
    """The bits of what is left show every order of summation, in half of the inputs against the other half."""
    x, weight, _ = problem(3, 20, 6400, torch.float16)
    weight, x = torch.cat([weight, weight], dim=1), torch.cat([100 * x, -100 * x], dim=1)
    x += 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).half()
    packed = SemiStructured.pack(weight)
    found = [run(on_host, x, packed, None, order=order, multiprocessors=132) for order in ORDERS]
    assert all(workspace > 0 for _, workspace in found)
    assert all(torch.equal(found[0][0], y) for y, _ in found)


def test_weights_and_inputs_of_any_size_are_summed_in_float32(on_host):
    """fp16's largest products do not overflow on the way."""
    weight = torch.zeros(1, 8, dtype=torch.float16)
    weight[0, [0, 2, 5, 7]] = torch.tensor([60000.0, -60000.0, 6e-8, 1.0], dtype=torch.float16)
    y, _ = run(on_host, torch.full((1, 8), 4.0, dtype=torch.float16), SemiStructured.pack(weight), None)
    assert y.tolist() == [[4.0]]


def stand_in(program, dtype):
    """compiled.cuda() with the emulated kernel, on the addresses that the binding would get."""

    def linear_24(*, x, values, metadata, bias, y, workspace, stream, **sizes):
        tokens, out_features, in_features = (sizes[n] for n in ("tokens", "out_features", "in_features"))
        assert (sizes["x_size"], sizes["y_size"]) == (tokens * in_features, tokens * out_features)
        assert (sizes["bias_size"], stream) == (out_features if bias else 0, 5)
        tensors = [
            None if at == 0 else torch.frombuffer(bytearray(ctypes.string_at(at, size * width)), dtype=torch.uint8)
            for at, size, width in (
                (x, sizes["x_size"], 2),
                (values, sizes["values_size"], 2),
                (metadata, sizes["metadata_size"], 4),
                (bias, sizes["bias_size"], 2),
            )
        ]
        results = [((tokens, out_features), dtype), ((1,), torch.int64)]
        found, needed = program.run(TYPES[dtype], tensors, [tokens, out_features, in_features], results)
        assert sizes["workspace_size"] >= int(needed)
        ctypes.memmove(y, found.data_ptr(), found.nbytes)

    return types.SimpleNamespace(linear_24_workspace=lambda *_: 0, **{f"linear_24_{TYPES[dtype]}": linear_24})


@pytest.fixture
def on_a_card(on_host, on_no_card, monkeypatch):
    """linear_24.run_cuda with CPU tensors in place of a card's."""

    def prepare(dtype):
        module = stand_in(on_host, dtype)
        monkeypatch.setattr(compiled, "cuda", lambda: module)
        return linear_24.run_cuda

    return prepare


@pytest.mark.parametrize("leading", [(1,), (2, 3), (), (64,), (0,)], ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
def test_the_op_serves_every_number_of_tokens_up_to_64(on_a_card, leading, dtype):
    tokens = torch.Size(leading).numel()
    x, weight, bias = problem(max(tokens, 1), 7, 36, dtype)
    operands = fragments_24.reference(SemiStructured.pack(weight))
    x = x[:tokens].view(*leading, 36)
    y = on_a_card(dtype)(x, operands, bias, 7, 36)
    assert y.shape == (*leading, 7)
    if tokens:
        assert_right(y.view(-1, 7), x.view(-1, 36), weight, bias)


def test_the_op_takes_x_that_is_not_contiguous(on_a_card):
    x, weight, _ = problem(36, 7, 36, torch.bfloat16)
    operands = fragments_24.reference(SemiStructured.pack(weight))
    multiply = on_a_card(torch.bfloat16)
    for view in (x.T, x[:, :1].expand(36, 36), x[::3]):
        assert_right(multiply(view, operands, None, 7, 36), view, weight, None)


def test_a_weight_that_the_kernel_cannot_serve_is_refused_in_words(monkeypatch):
    packed = SemiStructured.pack(problem(1, 7, 36, torch.bfloat16)[1])
    assert linear_24.cuda_refuses(packed) == "the weight must be on a CUDA device, got cpu"
    on_card = types.SimpleNamespace(device=torch.device("cuda", 1), dtype=torch.float32, shape=(7, 36))
    assert linear_24.cuda_refuses(on_card) == "the weight must be bfloat16 or float16, got torch.float32"
    on_card.dtype = torch.float16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert linear_24.cuda_refuses(on_card) == "the card must have compute capability 8.0 or more, got 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert linear_24.cuda_refuses(on_card) == compiled.why_not("cuda")


@pytest.mark.parametrize("shape", divisions.SHAPES, ids=str)
@pytest.mark.parametrize("tokens", divisions.TOKENS)
def test_on_an_h200_every_multiprocessor_has_enough_of_the_weight_under_way(on_host, shape, tokens):
    chunk_bytes = 16 * 256 // 2 * 2 + 512
    registers = {1: 64, 16: 80, 64: 128}[tokens]
    divisions.assert_divided_well(on_host, 4, [tokens, *shape], registers, chunk_bytes, shape[0] * shape[1] * 9 // 8)


@pytest.mark.parametrize("tokens", [1, 8, 40])
def test_what_is_tried_on_two_streams_and_in_graphs_on_a_card_meets_in_a_workspace(on_host, tokens):
    done = on_host.call("bf16", [None] * 4, [tokens, *SHARED], "counted", divisions.MULTIPROCESSORS)
    # y, and behind it the size of the workspace
    assert int.from_bytes(done.stdout[2 * tokens * SHARED[0] :][:8], "little") > 0


def test_a_launch_that_is_counted_runs_nothing(on_host):
    done = on_host.call("bf16", [None] * 4, [1, 16, 256], "counted")
    assert len(launches(done)) == 1
    # every byte of y as it was before
    assert set(done.stdout[:32]) == {0xFF}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", TYPES, ids=TYPES.values())
@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 31, 64, 65])
@pytest.mark.parametrize("shape", [(1, 4), (129, 520), (1000, 4100), (4096, 4096)], ids=str)
def test_on_a_card_the_kernel_matches_float64(dtype, tokens, shape):
    kernel = next(kernel for kernel in linear_24.KERNELS if kernel.name == "cuda")
    x, weight, bias = (t.cuda() for t in problem(tokens, *shape, dtype))
    packed = SemiStructured.pack(weight)
    assert kernel.refuses(packed) is None
    operands = kernel.prepare(packed)
    for b in (bias, None):
        y = kernel.run(x, operands, b, *shape)
        expected = x.double() @ weight.double().T + (0 if b is None else b.double())
        assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
        assert torch.equal(y, kernel.run(x, operands, b, *shape))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_card_the_op_keeps_torchs_rules():
    x, weight, bias = (t.cuda() for t in problem(3, 33, 260, torch.bfloat16))
    operands = fragments_24.reference(SemiStructured.pack(weight))
    torch.library.opcheck(torch.ops.sparsekern.linear_24_cuda.default, (x, *operands, bias, 33, 260))
    torch.library.opcheck(torch.ops.sparsekern.linear_24_expanded.default, (x, *operands, bias, 33, 260))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_a_step_is_loaded_wide_and_an_ldmatrix_serves_the_mma_of_each_panel(module, arch):
    tool = sass.cuobjdump()
    if tool is None:
        pytest.skip("no cuobjdump was found, neither a toolkit's nor Triton's")
    found = sass.kernels(tool, Path(module.__file__), arch)
    found = {name: kernel for name, kernel in found.items() if "linear_24_kernel" in name}
    assert len(found) == 8
    for name, kernel in found.items():
        token_tiles = int(re.search(r"Li(\d)E", name).group(1))
        wide = [each for each in kernel.instructions if re.match(r"LDG\.E\.(NA\.)?128\.CONSTANT", each.opcode)]
        panels = 2 if token_tiles >= 4 else 1
        # the first step's and the next one's; of two panels the metadata are half as wide
        assert len(wide) == 2 * (9 if panels == 1 else 8)
        assert kernel.count("HMMA.SP.16832.F32") == 8 * token_tiles
        assert kernel.count("LDSM.16.M88.4") == 8 * token_tiles // panels


@pytest.fixture
def module():
    if compiled.cuda() is None:
        pytest.skip(f"sparsekern._cuda: {compiled.why_not('cuda')}")
    return compiled.cuda()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"x_size": 3}, "x must hold tokens"),
        ({"y_size": 3}, "y must hold tokens"),
        ({"values_size": 2047}, "values must hold panels"),
        ({"metadata_size": 0}, "metadata must hold panels"),
        ({"bias": 16, "bias_size": 6}, "bias must hold 7 elements, got 6"),
        ({"tokens": 65, "x_size": 2340, "y_size": 455}, "0 to 64 tokens, got 65"),
        ({"in_features": 6, "x_size": 12}, "in_features must be a multiple of 4, got 6"),
        ({"values": 8}, "must lie on 16 bytes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_binding_refuses_what_contradicts_itself(module, wrong, said):
    right = {
        **dict.fromkeys(["x", "values", "metadata", "bias", "y", "workspace", "workspace_size", "bias_size"], 0),
        **{"x_size": 72, "values_size": 2048, "metadata_size": 128, "y_size": 14, "stream": 0},
        **{"tokens": 2, "out_features": 7, "in_features": 36},
    }
    with pytest.raises(ValueError, match=said):
        module.linear_24_bf16(**{**right, **wrong})


def test_a_launch_without_a_driver_is_a_runtime_error_in_cudas_words(module):
    if torch.cuda.is_available():
        pytest.skip("this machine has a driver and a card")
    with pytest.raises(RuntimeError, match="linear_24: .*(CUDA|driver|device)"):
        module.linear_24_workspace(1, 7, 36)
