"""Where Triton's tests run: not without Triton, each with a cache of its own, and beside a numpy newer than it."""

import os

import pytest

from sparsekern.ops import triton


@pytest.fixture
def where_triton_is(monkeypatch, tmp_path):
    if reason := triton.why_not():
        pytest.skip(reason)
    # a kernel that an earlier version compiled is not asked for, and a home that cannot be written is not needed
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.fixture(autouse=True)
def _loops_end_where_the_kernel_says(monkeypatch):
    """Triton 3.6 makes an int of an array with one element where a loop's end is asked for; numpy 2.5 refuses that."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        # as Triton 3.7 has it; what it replaces comes back with the rest when the kernel ends
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
