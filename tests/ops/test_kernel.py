"""pick: the first kernel that does not refuse, or every reason."""

import pytest

from sparsekern.ops.kernel import Kernel, pick


def kernel(name, reason):
    return Kernel(name, run=None, refuses=lambda size: reason if size > 8 else None)


def test_the_first_that_does_not_refuse_is_picked():
    first, second = kernel("first", "too large"), kernel("second", None)
    assert pick((first, second), 4) is first
    assert pick((first, second), 9) is second


def test_when_all_refuse_each_reason_is_named():
    with pytest.raises(ValueError, match="no kernel accepts these arguments\n  first: too large\n  second: too odd"):
        pick((kernel("first", "too large"), kernel("second", "too odd")), 9)
