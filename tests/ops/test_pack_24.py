"""pack_24: every kernel packs, unpacks and refuses as SemiStructured does. tests/cuda_on_host has the CUDA kernels."""

import pytest
import torch

from sparsekern import ops
from sparsekern.formats import SemiStructured
from sparsekern.ops import compiled, pack_24
from sparsekern.pattern import NM


def weight(out_features, in_features, dtype=torch.float32):
    dense = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(in_features))
    return dense.where(NM(2, 4).mask(dense.abs()), 0.0).to(dtype)


@pytest.mark.parametrize("kernel", pack_24.KERNELS, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", [(1, 4), (7, 36), (0, 8), (5, 0)], ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_kernel_packs_as_the_format_does(kernel, shape, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    dense = weight(*shape).to(device)
    if reason := kernel.refuses(dense):
        pytest.skip(f"{kernel.name}: {reason}")
    packed, expected = kernel.run(dense), SemiStructured.pack(dense)
    assert torch.equal(packed.values, expected.values)
    assert torch.equal(packed.metadata, expected.metadata)
    assert torch.equal(pack_24.to_dense(packed), dense)


def test_a_weight_is_packed_and_comes_back_through_the_ops():
    dense = weight(7, 36, torch.bfloat16)
    packed = ops.pack(dense, SemiStructured)
    ops.validate(packed)
    assert torch.equal(ops.to_dense(packed), dense)


def test_what_no_kernel_takes_is_refused_by_the_format():
    with pytest.raises(ValueError, match="in_features must be a multiple of 4, got 10"):
        pack_24.pack(torch.zeros(2, 10))
    with pytest.raises(ValueError, match="row 0, columns 0..3 hold 3 nonzeros"):
        pack_24.pack(torch.tensor([[1.0, 1.0, 1.0, 0.0]]))


def test_the_cuda_kernel_says_what_it_does_not_serve(monkeypatch):
    refuses = pack_24.KERNELS[0].refuses
    assert refuses(torch.zeros(2, 4)) == "the weight must be on a CUDA device, got cpu"
    assert refuses(torch.zeros(2)) == "the weight must have 2 dimensions, got 1"
    assert refuses(torch.zeros(2, 6)) == "in_features must be a multiple of 4, got 6"
    monkeypatch.setattr(compiled, "why_not", lambda name: "not built: no nvcc")
    packed = pack_24.pack(torch.eye(4))
    assert torch.equal(pack_24.to_dense(packed), torch.eye(4))


def test_the_fake_kernels_know_the_shapes():
    dense = torch.empty(3, 20, dtype=torch.bfloat16, device="meta")
    values, metadata, status = torch.ops.sparsekern.pack_24(dense)
    assert (values.shape, metadata.shape, status.shape) == ((3, 10), (3, 2), (3,))
    assert (values.dtype, metadata.dtype, status.dtype) == (torch.bfloat16, torch.int16, torch.int64)
    unpacked, status = torch.ops.sparsekern.unpack_24(values, metadata, 20)
    assert (unpacked.shape, unpacked.dtype, status.shape) == ((3, 20), torch.bfloat16, (1,))
