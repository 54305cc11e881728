"""wgmma_24: the weight lies as CUTLASS's layout says, comes back, and what is refused. The product needs a card."""

import importlib.util
import os
import re
import shutil
import subprocess
import types
from pathlib import Path

import pytest
import torch

from sparsekern.formats import SemiStructured
from sparsekern.ops import compiled, linear_24, wgmma_24
from sparsekern.pattern import NM

HERE = Path(__file__).parent
SHAPE = (200, 272)


def packed(out_features, in_features, device="cpu"):
    g = torch.Generator().manual_seed(in_features)
    weight = torch.randn(out_features, in_features, generator=g)
    weight = weight.where(NM(2, 4).mask(torch.rand(weight.shape, generator=g)), 0.0)
    return SemiStructured.pack(weight.to(device, torch.bfloat16))


def cutlass():
    """The folder with CUTLASS's headers."""
    if home := os.environ.get("CUTLASS_HOME"):
        return Path(home, "include")
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None:
        pytest.skip("CUTLASS is not installed")
    return Path(spec.origin).parent / "source/include"


@pytest.mark.parametrize(("out_features", "in_features"), [(8, 16), (64, 128), SHAPE, (72, 1040)], ids=str)
def test_restore_is_the_inverse_of_prepare_bit_for_bit(out_features, in_features):
    saved = packed(out_features, in_features)
    operands = wgmma_24.prepare(saved)
    restored = wgmma_24.restore(operands, out_features, in_features)
    assert torch.equal(restored.values.view(torch.int16), saved.values.view(torch.int16))
    assert torch.equal(restored.metadata, saved.metadata)
    assert torch.equal(wgmma_24.dense(operands, out_features, in_features), saved.to_dense())


def test_the_first_words_lie_where_they_are_written_here():
    """By hand, after TensorEAtom_16bit: outputs 8 apart are neighbours, then words two apart, then outputs."""
    saved = packed(64, 128)
    metadata = wgmma_24.prepare(saved)[1].flatten()
    for offset, (row, word) in {0: (0, 0), 1: (8, 0), 2: (0, 2), 8: (1, 0), 64: (0, 1), 128: (16, 0)}.items():
        assert metadata[offset] == saved.metadata[row, word]


def test_the_metadata_lies_where_cutlass_looks_for_it(tmp_path):
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc was found on PATH")
    program = tmp_path / "wgmma_layout"
    command = ["nvcc", "-std=c++17", "--expt-relaxed-constexpr", "-arch=sm_80", "-isystem", cutlass()]
    done = subprocess.run([*command, HERE / "wgmma_layout.cu", "-o", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    out = subprocess.run([program, *map(str, SHAPE)], capture_output=True, text=True, check=True).stdout
    *offsets, size = map(int, out.split())
    saved = packed(*SHAPE)
    bits = wgmma_24.prepare(saved)[1].view(torch.uint8).flatten()
    assert size == 2 * bits.numel()
    # the low half of a byte first
    groups = torch.stack([bits & 15, bits >> 4], dim=1).flatten()[torch.tensor(offsets)]
    assert torch.equal(groups.long().view(SHAPE[0], -1), saved._groups())


def test_a_weight_that_the_kernel_cannot_serve_is_refused_in_words(monkeypatch):
    assert wgmma_24.refuses(packed(8, 16)) == "the weight must be on a CUDA device, got cpu"
    weight = types.SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(8, 16))
    assert wgmma_24.refuses(weight) == "the weight must be bfloat16, got torch.float16"
    weight.dtype = torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert wgmma_24.refuses(weight) == "the card must have compute capability 9.0, got 10.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert wgmma_24.refuses(weight) == compiled.why_not("wgmma")
    weight.shape = (12, 16)
    assert wgmma_24.refuses(weight) == "out_features must be a positive multiple of 8, got 12"
    weight.shape = (8, 20)
    assert wgmma_24.refuses(weight) == "in_features must be a positive multiple of 16, got 20"


def test_operands_of_another_weight_are_refused():
    with pytest.raises(ValueError, match=r"metadata must be int16 \[3, 4, 4, 2, 8, 4, 2\], got torch.int16 \[1, 1, "):
        wgmma_24.restore(wgmma_24.prepare(packed(8, 16)), *SHAPE)


def test_x_of_another_size_or_dtype_is_refused_in_words(on_no_card):
    operands = wgmma_24.prepare(packed(8, 16))
    with pytest.raises(ValueError, match=r"x must end with in_features = 16, got shape \[2, 15\]"):
        wgmma_24.run(torch.zeros(2, 15).bfloat16(), operands, None, 8, 16)
    with pytest.raises(ValueError, match="x must have the weight's dtype torch.bfloat16, got torch.float32"):
        wgmma_24.run(torch.zeros(2, 16), operands, None, 8, 16)


@pytest.mark.parametrize("shift", [0, 1], ids=["aligned", "not aligned"])
def test_the_kernel_is_given_the_addresses_and_sizes_of_aligned_memory(on_no_card, monkeypatch, shift):
    operands = wgmma_24.prepare(packed(8, 16))
    x, bias = torch.randn(6 * 16 + shift).bfloat16()[shift:].view(2, 3, 16), torch.randn(8 + shift).bfloat16()[shift:]
    given = {}
    built = compiled.wgmma()
    monkeypatch.setattr(compiled, "wgmma", lambda: types.SimpleNamespace(linear_24_bf16=given.update))
    assert wgmma_24.run(x, operands, bias, 8, 16).shape == (2, 3, 8)
    sizes = {"x_size": 96, "values_size": 64, "metadata_bytes": 1024, "bias_size": 8, "y_size": 48, "tokens": 6}
    sizes |= {"out_features": 8, "in_features": 16, "stream": 5}
    assert sizes.items() <= given.items()
    addresses = [given[name] for name in ("x", "values", "metadata", "bias", "y")]
    assert all(address and address % 16 == 0 for address in addresses)
    assert (x.data_ptr() in addresses, bias.data_ptr() in addresses) == (not shift, not shift)
    if built is not None:
        assert set(given) == set(re.findall(r"(\w+): typing", built.linear_24_bf16.__doc__))


@pytest.fixture
def module():
    if compiled.wgmma() is None:
        pytest.skip(f"sparsekern._wgmma: {compiled.why_not('wgmma')}")
    return compiled.wgmma()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"x_size": 3}, "x must hold tokens"),
        ({"metadata_bytes": 512}, "metadata must hold 1024 bytes, got 512"),
        ({"in_features": 20, "x_size": 40}, "in_features must be a positive multiple of 16, got 20"),
        ({"values": 8}, "must lie on 16 bytes"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_binding_refuses_what_contradicts_itself(module, wrong, said):
    right = {
        **dict.fromkeys(["x", "values", "metadata", "bias", "y", "bias_size", "stream"], 0),
        **{"x_size": 32, "values_size": 64, "metadata_bytes": 1024, "y_size": 16},
        **{"tokens": 2, "out_features": 8, "in_features": 16},
    }
    with pytest.raises(ValueError, match=said):
        module.linear_24_bf16(**{**right, **wrong})


def test_the_compiler_made_sparse_wgmma_without_local_memory(module):
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this triton has no cuobjdump")
    text = subprocess.run([tool, "-sass", module.__file__], capture_output=True, text=True, check=True).stdout
    # four steps of 32 inputs: of 64 outputs twice in the large tile, once in the small one
    assert text.count("HGMMA.SP.64x128x32.F32.BF16") == 4 * 2 + 4
    assert "STL" not in text
    assert "LDL" not in text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tokens", [0, 1, 65, 1000, 4096])
@pytest.mark.parametrize("shape", [(8, 16), SHAPE, (4096, 4096)], ids=str)
def test_on_a_card_the_kernel_matches_float64(tokens, shape):
    kernel = next(kernel for kernel in linear_24.KERNELS if kernel.name == "wgmma")
    saved = packed(*shape, device="cuda")
    if reason := kernel.refuses(saved):
        pytest.skip(reason)
    g = torch.Generator().manual_seed(tokens)
    x, bias = torch.randn(tokens, shape[1], generator=g), torch.randn(shape[0], generator=g)
    x, bias = x.cuda().bfloat16(), bias.cuda().bfloat16()
    for b in (bias, None):
        y = kernel.run(x, kernel.prepare(saved), b, *shape)
        expected = x.double() @ saved.to_dense().double().T + (0 if b is None else b.double())
        assert (y.double() - expected).norm() <= 4e-3 * expected.norm()
    op = torch.ops.sparsekern.linear_24_wgmma.default
    torch.library.opcheck(op, (x, *kernel.prepare(saved), bias, *shape))
