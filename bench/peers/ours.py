"""Our own kernels: dense panels, the bitmap in bfloat16 and with int8 values, both also by the places of what stays."""

import torch

from sparsekern.formats import Bitmap, BitmapInt8, Dense
from sparsekern.ops import LINEAR_KERNELS, compiled, pack

NAMES = ("own dense", "bitmap bf16", "bitmap int8", "index bf16", "index int8")
_FORMATS = dict(zip(NAMES, (Dense, Bitmap, BitmapInt8, Bitmap, BitmapInt8), strict=True))


def build(name, weight, x, threads, copies):
    """Raises ValueError where the kernel cannot serve, or never wins."""
    torch.set_num_threads(threads)
    weight, x = torch.from_numpy(weight).bfloat16(), torch.from_numpy(x).bfloat16()
    packed = pack(weight, _FORMATS[name])
    kernel = _kernel(name)
    if reason := kernel.refuses(packed):
        raise ValueError(reason)
    operands = kernel.prepare(packed)
    held = [operands, *(tuple(map(compiled.copy, operands)) for _ in range(copies - 1))]
    shape = tuple(weight.shape)
    return lambda number: kernel.run(x, held[number % copies], None, *shape), lambda y: y.float().numpy()


def nbytes(name, weight) -> int:
    """What one product reads."""
    packed = pack(torch.from_numpy(weight).bfloat16(), _FORMATS[name])
    return sum(each.nbytes for each in _kernel(name).prepare(packed))


def _kernel(name):
    wanted = "cpu_index" if name.startswith("index") else "cpu"
    return next(kernel for kernel in LINEAR_KERNELS[_FORMATS[name]] if kernel.name == wanted)
