"""What turns something off, and what does not."""

import pytest

from jaxnets.switches import is_off


@pytest.mark.parametrize("value", ["0", "false", "No", "OFF"])
def test_words_that_turn_off(value):
    assert is_off("SWITCH", {"SWITCH": value})


@pytest.mark.parametrize("environment", [{}, {"SWITCH": "1"}, {"SWITCH": ""}, {"SWITCH": "true"}, {"OTHER": "0"}])
def test_anything_else_does_not(environment):
    assert not is_off("SWITCH", environment)
