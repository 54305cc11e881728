"""inspect(): reads what a checkpoint holds, and says when it cannot."""

import pytest
import torch
from safetensors.torch import save_file

from sparsekern.formats import Bitmap, SemiStructured
from sparsekern.inspect import inspect
from sparsekern.pattern import NM, Unstructured


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (NM(1, 4), "1:4"),
        (NM(2, 4), "2:4"),
        (NM(4, 8), "4:8"),
        (Unstructured(0.6), "unstructured"),
        (Unstructured(0), "dense"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_it_finds_the_pattern_and_the_bytes_that_packing_takes(tmp_path, pattern, found, dtype):
    torch.manual_seed(0)
    weight = torch.randn(24, 64)
    weight = weight.where(pattern.mask(weight.abs()), 0.0).to(dtype)
    save_file({"a.weight": weight, "a.bias": torch.ones(3)}, tmp_path / "model.safetensors")
    (report,) = inspect(tmp_path)
    assert (report.name, report.shape, report.pattern) == ("a.weight", (24, 64), found)
    assert report.sparsity == pytest.approx(pattern.sparsity, abs=1 / weight.numel())
    packed = [Bitmap.pack(weight).nbytes]
    if found in ("1:4", "2:4"):
        packed.append(SemiStructured.pack(weight).nbytes)
    assert report.packed_bytes == min(*packed, weight.nbytes)
    assert report.bytes == weight.nbytes


def test_a_directory_that_is_not_there_or_empty_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        inspect(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no safetensors"):
        inspect(tmp_path)


def test_a_broken_file_is_refused_with_its_name(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match=r"model\.safetensors' cannot be read"):
        inspect(tmp_path)
