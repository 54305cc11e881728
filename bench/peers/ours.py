"""Our own kernels: dense panels, the bitmap in bfloat16, and with int8 values."""

import torch

from sparsekern.formats import Bitmap, BitmapInt8, Dense
from sparsekern.ops import LINEAR_KERNELS, compiled, pack
from sparsekern.ops.kernel import pick

NAMES = ("own dense", "bitmap bf16", "bitmap int8")
_FORMATS = dict(zip(NAMES, (Dense, Bitmap, BitmapInt8), strict=True))


def build(name, weight, x, threads, copies):
    """Raises ValueError where only the reference serves."""
    torch.set_num_threads(threads)
    weight, x = torch.from_numpy(weight).bfloat16(), torch.from_numpy(x).bfloat16()
    packed = pack(weight, _FORMATS[name])
    kernel = pick(LINEAR_KERNELS[type(packed)], packed)
    if kernel.name == "reference":
        raise ValueError("only the reference serves here")
    operands = kernel.prepare(packed)
    held = [operands, *(tuple(map(compiled.copy, operands)) for _ in range(copies - 1))]
    shape = tuple(weight.shape)
    return lambda number: kernel.run(x, held[number % copies], None, *shape), lambda y: y.float().numpy()


def nbytes(name, weight) -> int:
    """What one product reads."""
    packed = pack(torch.from_numpy(weight).bfloat16(), _FORMATS[name])
    return sum(each.nbytes for each in pick(LINEAR_KERNELS[type(packed)], packed).prepare(packed))
