"""panels_24: the layout by hand, the round trip, what is refused."""

import pytest
import torch

from sparsekern.formats import SemiStructured
from sparsekern.ops import panels_24
from sparsekern.pattern import NM


def packed_24(out_features, in_features, dtype=torch.bfloat16):
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0))
    return SemiStructured.pack(weight.where(NM(2, 4).mask(weight.abs()), 0.0).to(dtype))


def test_the_layout_is_the_one_written_here():
    weight = torch.zeros(17, 8)
    weight[0, :4] = torch.tensor([0.0, 1.0, 0.0, 2.0])
    weight[3, 4:] = torch.tensor([3.0, 0.0, 4.0, 0.0])
    weight[16, 4:] = torch.tensor([0.0, 0.0, 5.0, 6.0])
    values, positions = panels_24.reference(SemiStructured.pack(weight))
    assert list(values.shape) == [2, 8, 16, 2]
    assert values[0, 0, 0].tolist() == [1, 2]
    assert values[0, 1, 3].tolist() == [3, 4]
    assert values[1, 1, 0].tolist() == [5, 6]
    assert int(values.count_nonzero()) == 6
    # the first value's input, then the second's: 1 and 3, 0 and 2, 2 and 3; all others 0 and 1
    assert positions[0, 0] & 15 == 0b1101
    assert positions[0, 1] >> 12 & 15 == 0b1000
    assert positions[1, 1] & 15 == 0b1110
    assert positions[0, 7] == 0x4444444444444444


@pytest.mark.parametrize("shape", [(1, 4), (7, 20), (37, 100), (33, 64), (16, 32), (5, 0), (0, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_what_is_packed_comes_back_bit_for_bit(shape, dtype):
    packed = packed_24(*shape, dtype)
    restored = panels_24.reference_inverse(panels_24.reference(packed), *shape)
    assert torch.equal(restored.values, packed.values)
    assert torch.equal(restored.metadata, packed.metadata)
    assert restored.in_features == packed.in_features


def test_positions_of_zeros_are_kept_where_they_are():
    packed = SemiStructured(torch.tensor([[0.0, 7.0]]), torch.tensor([[0b0100_0100_0100_1001]]).short(), 4)
    restored = panels_24.reference_inverse(panels_24.reference(packed), 1, 4)
    assert torch.equal(restored.metadata, packed.metadata)


def test_nine_sixteenths_of_the_dense_bytes_are_read():
    assert sum(part.nbytes for part in panels_24.reference(packed_24(64, 256))) == 64 * 256 * 2 * 9 // 16


def test_operands_of_another_weight_are_refused():
    values, positions = panels_24.reference(packed_24(17, 36))
    with pytest.raises(ValueError, match="values must be \\[1, 16, 16, 2\\] of torch.bfloat16"):
        panels_24.reference_inverse((values, positions), 16, 36)
    with pytest.raises(ValueError, match="positions must be \\[2, 16\\] of torch.int64"):
        panels_24.reference_inverse((values, positions[:1]), 17, 36)
    with pytest.raises(ValueError, match="positions must ascend: row 0, columns 0..3 have 0, 0"):
        panels_24.reference_inverse((values, torch.zeros_like(positions)), 17, 36)
