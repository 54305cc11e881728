"""linear_call: the short way past the dispatcher gives its bits, and gives way to it where it would do more."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekern.formats import Bitmap, BitmapInt8, Dense, SemiStructured
from sparsekern.ops import (
    compiled,
    linear_24,
    linear_bitmap,
    linear_bitmap_index,
    linear_bitmap_int8,
    linear_bitmap_int8_index,
    linear_dense,
)
from sparsekern.ops.linear_call import CpuLinear, CudaLinear, through
from tests.card_linears import CARD_LINEARS

OUT, IN = 37, 72
CPU, CARD = CpuLinear.device, CudaLinear.device
WHY_NOT = compiled.why_not("cpu")
FORMATS = {
    "linear_24": SemiStructured,
    "linear_bitmap": Bitmap,
    "linear_bitmap_index": Bitmap,
    "linear_bitmap_int8": BitmapInt8,
    "linear_bitmap_int8_index": BitmapInt8,
    "linear_dense": Dense,
}
MODULES = {
    "linear_24": linear_24,
    "linear_bitmap": linear_bitmap,
    "linear_bitmap_index": linear_bitmap_index,
    "linear_bitmap_int8": linear_bitmap_int8,
    "linear_bitmap_int8_index": linear_bitmap_int8_index,
    "linear_dense": linear_dense,
}

pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"sparsekern._cpu: {WHY_NOT}")


class Problem:
    """One op, its CPU kernel, a weight of which at most two of four and few of all are kept."""

    def __init__(self, name, monkeypatch):
        torch.manual_seed(0)
        self.kernel = MODULES[name].KERNELS[0]
        weight = torch.randn(OUT, IN).bfloat16()
        weight[:, 1::4], weight[:, 2::4], weight[torch.rand(OUT, IN) < 0.7] = 0, 0, 0
        packed = FORMATS[name].pack(weight) if name != "linear_dense" else Dense(weight)
        if reason := self.kernel.refuses(packed):
            pytest.skip(f"{name}: {reason}")
        self.operands = self.kernel.prepare(packed)
        self.dense = self.kernel.dense(self.operands, OUT, IN)
        self.x, self.bias = torch.randn(3, IN).bfloat16(), torch.randn(OUT).bfloat16()
        (self.op,) = (value for value in vars(MODULES[name]).values() if isinstance(value, CpuLinear))
        self.asked, dispatch = 0, self.op._op

        def counted(*arguments):
            self.asked += 1
            return dispatch(*arguments)

        monkeypatch.setattr(self.op, "_op", counted)
        self.dispatch = dispatch

    def run(self, x=None, operands=None, bias=None):
        x = self.x if x is None else x
        return self.kernel.run(x, operands or self.operands, self.bias if bias is None else bias, OUT, IN)


@pytest.fixture(params=FORMATS)
def problem(request, monkeypatch):
    return Problem(request.param, monkeypatch)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("leading", [(), (1,), (0,), (2, 3)], ids=str)
def test_a_plain_call_goes_past_the_dispatcher_and_has_its_bits(problem, mode, leading):
    x = torch.randn(*leading, IN).bfloat16()
    with mode():
        y = problem.run(x)
        assert problem.asked == 0
        assert torch.equal(y, problem.dispatch(x, *problem.operands, problem.bias, OUT, IN))
        assert y.shape == (*leading, OUT)
        assert y.is_inference() == (mode is torch.inference_mode)
        assert y._base is None
        assert not y.requires_grad


def test_tensors_made_inside_and_outside_of_inference_mode_go_together(problem):
    with torch.inference_mode():
        inside = problem.x.clone()
        assert torch.equal(problem.run(), problem.run(inside))
    assert not problem.run(inside).is_inference()
    assert problem.asked == 0


def test_autocast_changes_nothing(problem):
    with torch.autocast("cpu", torch.bfloat16):
        y = problem.run()
    assert problem.asked == 0
    assert torch.equal(y, problem.run())


@pytest.mark.parametrize("who", ["x", "bias", "both"])
def test_a_wanted_gradient_is_left_to_the_dispatcher(problem, who):
    x, bias = problem.x.clone(), problem.bias.clone()
    x.requires_grad_(who != "bias")
    bias.requires_grad_(who != "x")
    wanted = [tensor for tensor in (x, bias) if tensor.requires_grad]
    with torch.no_grad():
        problem.run(x, bias=bias)
        assert problem.asked == 0
    g = torch.randn(3, OUT).bfloat16()
    got = torch.autograd.grad(problem.run(x, bias=bias), wanted, g)
    assert problem.asked == 1
    torch.testing.assert_close(got, torch.autograd.grad(linear(x, problem.dense, bias), wanted, g))


class Seen(TorchDispatchMode):
    """The names of the ops that pass."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_op(problem):
    name = str(problem.dispatch)
    with Seen() as seen:
        y = problem.run()
    assert name in seen.names
    assert torch.equal(y, problem.run())
    with FakeTensorMode() as mode:
        x, bias, *operands = map(mode.from_tensor, (problem.x, problem.bias, *problem.operands))
        fake = problem.run(x, tuple(operands), bias)
    assert fake.shape == (3, OUT)
    graph = make_fx(lambda x: problem.run(x))(problem.x)
    assert any(node.target is problem.dispatch for node in graph.graph.nodes)
    with torch.profiler.profile() as profile:
        problem.run()
    assert name.removesuffix(".default").replace(".", "::") in {event.name for event in profile.events()}
    assert problem.asked == 4


def test_tracing_records_the_op_and_not_its_result(problem):
    traced = torch.jit.trace(lambda x: problem.run(x), problem.x, check_trace=False)
    other = torch.randn(3, IN).bfloat16()
    assert torch.equal(traced(other), problem.run(other))


def test_functorch_is_not_bypassed(problem):
    x = torch.randn(2, 3, IN).bfloat16()
    assert torch.equal(torch.vmap(problem.run)(x), problem.run(x))
    assert problem.asked == 1
    # a bias of each, the same x
    biases = torch.randn(2, OUT).bfloat16()
    y = torch.vmap(lambda bias: problem.run(x[0], bias=bias))(biases)
    assert torch.equal(y, torch.stack([problem.run(x[0], bias=bias) for bias in biases]))
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: problem.run(x).sum())(x)


def test_compile_and_export_see_the_op(problem):
    class Layer(torch.nn.Module):
        def forward(self, x):
            return problem.kernel.run(x, problem.operands, problem.bias, OUT, IN).relu()

    # the module's own, which counts nothing, so that there is one graph
    problem.op._op = problem.dispatch
    compiled_layer = torch.compile(Layer(), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled_layer(problem.x), problem.run().relu())
    for strict in (True, False):
        program = torch.export.export(Layer(), (problem.x,), strict=strict)
        assert problem.dispatch in {node.target for node in program.graph.nodes}


class Labelled(torch.Tensor):
    """A subclass that torch's functions keep."""


def test_a_subclass_is_kept(problem):
    assert type(problem.run(problem.x.as_subclass(Labelled))) is Labelled
    assert problem.asked == 1


def dead(transform):
    """A tensor of functorch after its transform has ended."""
    found = []
    transform(lambda x: found.append(x) or x.sum())(torch.ones(2, 3))
    return found[0]


# float32, and no plain tensors of the CPU although most are of the class torch.Tensor
ODD = {
    "a negative view": lambda: torch._neg_view(torch.ones(3)),
    "zeros without memory": lambda: torch._efficientzerotensor(3),
    "on the meta device": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.ones(3, 3).to_sparse(),
    "sparse rows": lambda: torch.ones(3, 3).to_sparse_csr(),
    "of oneDNN": lambda: torch.ones(3, 3).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "functional": lambda: torch._to_functional_tensor(torch.ones(3)),
    "batched": lambda: dead(torch.vmap),
    "differentiated": lambda: dead(torch.func.grad),
    "fake": lambda: FakeTensorMode().from_tensor(torch.ones(3)),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "a subclass": lambda: torch.ones(3).as_subclass(Labelled),
    "no tensor": lambda: [1.0],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_what_the_dispatcher_treats_otherwise_is_not_plain(make):
    plain, odd, are_plain = torch.ones(3), make(), compiled.cpu().are_plain
    assert are_plain(CPU, plain, (plain, plain), plain)
    assert are_plain(CPU, plain, (), None)
    assert not are_plain(CARD, plain, (), None)
    for x, operands, bias in ((odd, (), None), (plain, (plain, odd), None), (plain, (), odd)):
        assert not are_plain(CPU, x, operands, bias)
        assert not are_plain(CARD, x, operands, bias)


@pytest.mark.parametrize("who", ["x", "bias"])
def test_a_negative_view_is_read_as_what_it_means(problem, who):
    y = problem.run(**{who: torch._neg_view(-getattr(problem, who))})
    assert torch.equal(y, problem.run())
    assert problem.asked == 1


def test_an_operand_that_is_a_negative_view_is_read_as_what_it_means(problem):
    view = tuple(torch._neg_view(-o) if o.is_floating_point() else o for o in problem.operands)
    assert torch.equal(problem.run(operands=view), problem.run())
    # int8 has no floating point operand but the kind, which has no values
    assert problem.asked == 1


def test_operands_on_another_device_are_refused(problem):
    on_meta = tuple(operand.to("meta") for operand in problem.operands)
    with pytest.raises(ValueError, match="must be a tensor on the CPU"):
        problem.op._multiply(problem.x, on_meta, None, torch.empty(3, OUT).bfloat16(), IN)
    with pytest.raises(ValueError, match="x must be on the weight's device meta, got cpu"):
        problem.run(operands=on_meta)


def test_operands_with_less_memory_than_elements_are_refused(problem):
    """An expanded tensor has as many elements as the one that it stands for, and one of them in memory."""
    for place, operand in enumerate(problem.operands):
        if operand.numel() < 2:
            continue
        short = operand.flatten()[:1].expand(operand.numel()).view(operand.shape)
        operands = (*problem.operands[:place], short, *problem.operands[place + 1 :])
        if len(operands) == 1:
            # dense panels are made contiguous
            assert problem.run(operands=operands).shape == (3, OUT)
            continue
        with pytest.raises(ValueError, match="must be contiguous"):
            problem.run(operands=operands)


def test_operands_of_a_narrower_type_are_refused(problem):
    """Their elements are as many, their bytes are not."""
    for place, operand in enumerate(problem.operands):
        if operand.itemsize == 1 or operand.numel() == 0:
            continue
        operands = (*problem.operands[:place], operand.to(torch.int8), *problem.operands[place + 1 :])
        with pytest.raises(ValueError, match="must|dtype"):
            problem.run(operands=operands)


def test_an_operand_that_shrinks_after_its_first_use_is_refused(problem):
    problem.run()
    operand = max(problem.operands, key=lambda tensor: tensor.nbytes)
    operand.set_(operand.flatten()[: operand.numel() // 2].clone())
    with pytest.raises(ValueError, match="must"):
        problem.run()


def test_a_weight_with_too_few_operands_is_refused(problem):
    with pytest.raises((ValueError, IndexError), match="operands|range"):
        problem.op._multiply(problem.x, problem.operands[:-1], None, torch.empty(3, OUT).bfloat16(), IN)


@pytest.mark.parametrize("tokens", [3, 300])
def test_errors_are_the_same_on_both_ways(problem, tokens):
    def words(call, *arguments):
        with pytest.raises(ValueError, match="must") as caught:
            call(*arguments)
        return str(caught.value)

    bias = problem.bias
    x = problem.x.repeat(tokens // 3, 1)
    for wrong_x, wrong_bias in ((x[:, 1:], bias), (x.double(), bias), (x, bias.double()), (x, bias[1:])):
        short = words(problem.kernel.run, wrong_x, problem.operands, wrong_bias, OUT, IN)
        assert short == words(problem.dispatch, wrong_x, *problem.operands, wrong_bias, OUT, IN)


# what a saved graph holds of the ops of a card
SCHEMAS = {
    "linear_24_cuda": "Tensor values, Tensor metadata, Tensor? bias, int out_features, int in_features",
    "linear_24_expanded": "Tensor values, Tensor metadata, Tensor? bias, int out_features, int in_features",
    "linear_24_wgmma": "Tensor values, Tensor metadata, Tensor? bias, int out_features, int in_features",
    "linear_24_cusparselt": "Tensor compressed, Tensor? bias, int out_features, int in_features",
    "linear_bitmap_fragments": "Tensor masks, Tensor cells, Tensor quad_rows, Tensor capacity, Tensor? bias, "
    "int out_features, int in_features",
    "linear_bitmap_expanded": "Tensor masks, Tensor cells, Tensor quad_rows, Tensor capacity, Tensor? bias, "
    "int out_features, int in_features",
    "linear_bitmap_cuda": "Tensor values, Tensor bitmap, Tensor row_offsets, Tensor? bias, int in_features",
}


class OfACard:
    """One op of a card with tensors of the CPU; what multiplies and expands is torch, with the weight as an operand."""

    def __init__(self, name, monkeypatch):
        torch.manual_seed(0)
        self.op = CARD_LINEARS[name]
        self.dense = torch.randn(OUT, IN).bfloat16()
        self.x, self.bias = torch.randn(3, IN).bfloat16(), torch.randn(OUT).bfloat16()
        operands = [torch.zeros(OUT + 1, dtype=torch.int32) for _ in range(self.op._count)]
        operands[self.op._kind] = self.dense
        self.operands = tuple(operands)
        monkeypatch.setattr(self.op, "_dense", lambda operands, *sizes: operands[self.op._kind].clone())
        monkeypatch.setattr(self.op, "_multiply", through(self.op._dense))

    def run(self, x=None, bias=None):
        bias = self.bias if bias is None else bias
        return self.op.run(self.x if x is None else x, self.operands, bias, OUT, IN)


@pytest.fixture(params=SCHEMAS)
def of_a_card(request, on_no_card, monkeypatch):
    return OfACard(request.param, monkeypatch)


def test_the_ops_of_a_card_are_these():
    found = {name: str(op._op._schema) for name, op in CARD_LINEARS.items()}
    assert found == {name: f"sparsekern::{name}(Tensor x, {rest}) -> Tensor" for name, rest in SCHEMAS.items()}


@pytest.mark.filterwarnings("ignore")
def test_the_ops_of_a_card_are_registered_as_torch_wants_them(of_a_card):
    op, sizes = of_a_card.op._op, (OUT, IN)[-of_a_card.op._sizes :]
    x, bias = of_a_card.x.clone().requires_grad_(), of_a_card.bias.clone().requires_grad_()
    for arguments in ((of_a_card.x, of_a_card.bias), (of_a_card.x[None], None), (x, bias)):
        torch.library.opcheck(op, (arguments[0], *of_a_card.operands, arguments[1], *sizes))


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (0,)], ids=str)
def test_on_a_card_x_and_the_bias_have_the_gradients_of_the_dense_product(of_a_card, leading):
    x, g = torch.randn(*leading, IN).bfloat16().requires_grad_(), torch.randn(*leading, OUT).bfloat16()
    bias = of_a_card.bias.clone().requires_grad_()
    got = torch.autograd.grad(of_a_card.run(x, bias), (x, bias), g)
    torch.testing.assert_close(got, torch.autograd.grad(linear(x, of_a_card.dense, bias), (x, bias), g))


def test_a_compiled_graph_holds_the_op_of_a_card(of_a_card):
    layer = torch.compile(lambda x: of_a_card.run(x).relu(), fullgraph=True, backend="aot_eager")
    assert torch.equal(layer(of_a_card.x), of_a_card.run().relu())


def test_what_does_not_fit_the_weight_is_refused_before_a_launch(of_a_card):
    def words(x, bias):
        with pytest.raises(ValueError, match="must") as caught:
            of_a_card.op._product(x, of_a_card.operands, bias, OUT, IN)
        return str(caught.value)

    x, bias = of_a_card.x, of_a_card.bias
    assert words(x[:, 1:], bias) == f"x must end with in_features = {IN}, got shape [3, {IN - 1}]"
    assert words(x[0, 0], bias) == f"x must end with in_features = {IN}, got shape []"
    assert words(x.half(), bias) == "x must have the weight's dtype torch.bfloat16, got torch.float16"
    assert words(x, bias.float()) == "bias must have the weight's dtype torch.bfloat16, got torch.float32"
    assert words(x.to("meta"), bias) == "x must be on the weight's device cpu, got meta"
    assert words(x, bias.to("meta")) == "bias must be on the weight's device cpu, got meta"


def test_the_dispatcher_is_passed_on_a_card_too_where_it_would_add_nothing(of_a_card, monkeypatch):
    monkeypatch.setattr(CudaLinear, "device", CPU)
    expected = of_a_card.op._op(of_a_card.x, *of_a_card.operands, of_a_card.bias, *(OUT, IN)[-of_a_card.op._sizes :])
    monkeypatch.setattr(of_a_card.op, "_op", None)
    assert torch.equal(of_a_card.run(), expected)
    with pytest.raises(TypeError, match="not callable"):
        of_a_card.run(of_a_card.x.clone().requires_grad_())
