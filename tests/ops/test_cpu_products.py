"""What every product with a weight owes on the CPU: any number of tokens on any instruction set, and company."""

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear

from sparsekern.formats import Bitmap, BitmapInt8, Dense, SemiStructured
from sparsekern.ops import compiled, linear_24, linear_bitmap, linear_bitmap_index, linear_bitmap_int8, linear_dense
from sparsekern.ops.kernel import Kernel
from sparsekern.pattern import NM

WHY_NOT = compiled.why_not("cpu")
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"sparsekern._cpu: {WHY_NOT}")
WIDE = (torch.bfloat16, torch.float16, torch.float32)
# what a sum of a few hundred products may lose, of the sum of their sizes
LOST = 1e-5


def _sets(name: str) -> tuple[str, ...]:
    """Those of an op that this machine has."""
    return getattr(compiled.cpu(), name)() if WHY_NOT is None else ()


def _index(x, operands, bias, y, in_features, isa):
    y.copy_(linear_bitmap_index.run(x, operands, bias, y.shape[1], in_features))


@dataclass(frozen=True)
class Product:
    """One op: what packs its weights, its sets, and multiply(x, operands, bias, y, in_features, isa)."""

    kernel: Kernel
    pack: Callable
    dtypes: tuple[torch.dtype, ...]
    sets: tuple[str, ...]
    multiply: Callable
    kept: float = 0.5
    # to what an input is rounded, as a fraction of the token's largest
    steps: dict[torch.dtype, float] = field(default_factory=dict)

    def problem(self, out_features, in_features, tokens, dtype):
        """The weight that is multiplied by, its operands, an input and a bias."""
        torch.manual_seed(out_features * 1000 + in_features)
        weight = torch.randn(out_features, in_features)
        kept = NM(2, 4).mask(weight.abs()) if self is PRODUCTS["linear_24"] else torch.rand_like(weight) < self.kept
        packed = self.pack((weight * kept).to(dtype))
        x, bias = torch.randn(tokens, in_features).to(dtype), torch.randn(out_features).to(dtype)
        multiplied = packed.dequantised() if isinstance(packed, BitmapInt8) else packed.to_dense()
        return multiplied.double(), self.kernel.prepare(packed), x, bias

    def assert_right(self, y, x, weight, bias):
        """Every element is the float64 product but for its own rounding and what the sum may lose."""
        x, bias = x.double(), torch.zeros(len(weight)).double() if bias is None else bias.double()
        exact = linear(x, weight, bias)
        sizes = linear(x.abs(), weight.abs(), bias.abs())
        largest = x.abs().amax(1, keepdim=True) if x.numel() else x.new_zeros(len(x), 1)
        rounded = self.steps.get(y.dtype, 0.0) * largest * weight.abs().sum(1)
        allowed = torch.finfo(y.dtype).eps * exact.abs() + LOST * sizes + rounded
        assert y.shape == exact.shape
        # NaN is not within it
        assert ((y.double() - exact).abs() <= allowed).all()


PRODUCTS = {
    "linear_bitmap": Product(
        linear_bitmap.KERNELS[0], Bitmap.pack, WIDE, _sets("instruction_sets"), linear_bitmap.sparse
    ),
    "linear_bitmap_through_dense": Product(
        linear_bitmap.KERNELS[0], Bitmap.pack, WIDE, _sets("instruction_sets"), linear_bitmap.through_dense
    ),
    "linear_bitmap_int8": Product(
        linear_bitmap_int8.KERNELS[0],
        BitmapInt8.pack,
        (torch.bfloat16, torch.float32),
        _sets("linear_bitmap_int8_sets"),
        linear_bitmap_int8.sparse,
        steps={torch.bfloat16: 2.0**-15, torch.float32: 2.0**-23},
    ),
    # it has one set, which nobody chooses
    "linear_bitmap_index": Product(
        linear_bitmap_index.KERNELS[0], Bitmap.pack, (torch.bfloat16,), ("avx512",), _index, kept=0.1
    ),
    "linear_24": Product(
        linear_24.KERNELS[0], SemiStructured.pack, (torch.bfloat16,), _sets("linear_24_sets"), linear_24.multiply
    ),
    "linear_dense": Product(
        linear_dense.KERNELS[0],
        Dense.pack,
        WIDE,
        _sets("linear_dense_sets"),
        lambda x, operands, *rest: linear_dense.multiply(x, *operands, *rest),
    ),
}
CASES = [
    pytest.param(product, dtype, isa, id=f"{name}-{str(dtype).removeprefix('torch.')}-{isa}")
    for name, product in PRODUCTS.items()
    for dtype in product.dtypes
    for isa in product.sets
]
products = pytest.mark.parametrize("product", PRODUCTS.values(), ids=PRODUCTS)


def serves(product):
    """Skips where this processor lacks what the kernel is made of."""
    packed = product.pack(torch.zeros(4, 4).bfloat16())
    if reason := product.kernel.refuses(packed):
        pytest.skip(reason)


@pytest.mark.parametrize(("product", "dtype", "isa"), CASES)
def test_any_number_of_tokens_is_right_in_every_element(product, dtype, isa):
    if product is PRODUCTS["linear_bitmap_index"]:
        serves(product)
    # sizes that neither 16 outputs nor blocks of 32 or 64 inputs divide; groups of four do, for 2:4
    for shape in ((37, 76), (3, 260)):
        for tokens in (0, 1, 2, 3, 7, 29, 61, 200, 1000):
            weight, operands, x, bias = product.problem(*shape, tokens, dtype)
            for b in (None, bias):
                y = torch.full((tokens, shape[0]), float("nan"), dtype=dtype)
                product.multiply(x, operands, b, y, shape[1], isa)
                product.assert_right(y, x, weight, b)


def test_an_element_that_is_wrong_is_seen_among_a_thousand_tokens():
    """The bound on every element is what makes the test above say something."""
    product = PRODUCTS["linear_bitmap_int8"]
    weight, operands, x, bias = product.problem(37, 76, 1000, torch.bfloat16)
    y = torch.empty(1000, 37).bfloat16()
    product.multiply(x, operands, bias, y, 76, "portable")
    product.assert_right(y, x, weight, bias)
    # one input of one token is left out
    y[999, 36] -= x[999, weight[36].abs().argmax()] * weight[36].abs().max().bfloat16()
    with pytest.raises(AssertionError):
        product.assert_right(y, x, weight, bias)


@pytest.mark.parametrize(("product", "dtype", "isa"), CASES)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_the_number_of_threads_changes_no_bit(product, dtype, isa, tokens):
    if product is PRODUCTS["linear_bitmap_index"]:
        serves(product)
    _, operands, x, bias = product.problem(700, 800, tokens, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 40):
            torch.set_num_threads(threads)
            results.append(torch.full((tokens, 700), float("nan"), dtype=dtype))
            product.multiply(x, operands, bias, results[-1], 800, isa)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@products
def test_two_python_threads_do_not_disturb_each_other(product):
    serves(product)
    problems = [product.problem(600, 700, tokens, torch.bfloat16)[1:] for tokens in (1, 20)]
    wanted = [product.kernel.run(x, operands, bias, 600, 700) for operands, x, bias in problems]
    wrong = []

    def work(problem, want):
        operands, x, bias = problem
        wrong.extend(1 for _ in range(100) if not product.kernel.run(x, operands, bias, 600, 700).equal(want))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(problems, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


FORK = """
import os, signal, sys, torch
sys.path.insert(0, FOLDER)
from test_cpu_products import PRODUCTS

torch.set_num_threads(2)
big = torch.randn(1 << 20)
big + 1
work = {}
for name, product in PRODUCTS.items():
    if product.kernel.refuses(product.pack(torch.zeros(4, 4).bfloat16())) is None:
        _, *problem = product.problem(600, 700, 3, torch.bfloat16)
        work[name] = product.kernel, problem

def multiply(kernel, problem):
    operands, x, bias = problem
    return kernel.run(x, operands, bias, 600, 700)

wanted = {name: multiply(*work[name]) for name in work}

def wrong():
    return [name for name in work if not torch.equal(multiply(*work[name]), wanted[name])]

def in_a_child(generations):
    child = os.fork()
    if child == 0:
        # who waits for threads that the fork did not copy is ended by SIGALRM
        signal.alarm(60)
        found = wrong() + ([] if torch.equal(big + 1, 1 + big) else ["torch"])
        for kernel, (operands, x, bias) in work.values():
            kernel.prepare(kernel.restore(operands, 600, 700))
            kernel.run(x.repeat(1000, 1), operands, bias, 600, 700)
        if found:
            print(found, file=sys.stderr, flush=True)
        if generations > 1:
            in_a_child(generations - 1)
        os._exit(1 if found else 0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

for _ in range(3):
    in_a_child(2)
    assert wrong() == []
print(*work)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="fork is Linux's")
def test_every_product_is_right_in_a_child_forked_after_its_first_use():
    script = FORK.replace("FOLDER", repr(str(Path(__file__).parent)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert {"linear_bitmap", "linear_bitmap_int8", "linear_dense"} <= {*done.stdout.split()}
