"""Triton kernels, one file an op under the op's name. Nothing else imports triton, and these only when they run."""

import functools
import importlib


@functools.cache
def why_not() -> str | None:
    """None when Triton can be imported, else the reason in words."""
    try:
        importlib.import_module("triton")
    except ModuleNotFoundError as error:
        if error.name == "triton":
            return 'triton is not installed; pip install "sparsekern[triton]"'
        return f"triton cannot be loaded: {error}"
    except ImportError as error:
        return f"triton cannot be loaded: {str(error).splitlines()[0]}"
    return None
