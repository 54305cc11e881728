"""For every test: memory that nobody wrote holds NaN, and a slow machine fails no property."""

import pytest
import torch
from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def _nan_in_empty_tensors():
    """torch.empty gives NaN, and the largest integer, as long as torch is told to be deterministic."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
