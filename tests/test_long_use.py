"""Many calls after each other, as a server makes them; tests/soak/soak_calls.py makes 15,000."""

from tests.soak.soak_calls import MOST_GROWTH_BYTES, call


def test_hundreds_of_calls_from_two_threads_change_no_bit_and_keep_no_memory():
    assert call(800) < MOST_GROWTH_BYTES
