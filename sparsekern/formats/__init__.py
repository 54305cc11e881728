"""Packed weights: one file a format, in the canonical order that is saved; pack, to_dense, nbytes, validate."""

from sparsekern.formats.bitmap import Bitmap
from sparsekern.formats.bitmap_int8 import BitmapInt8
from sparsekern.formats.dense import Dense
from sparsekern.formats.semi_structured import SemiStructured

__all__ = ["Bitmap", "BitmapInt8", "Dense", "SemiStructured"]
