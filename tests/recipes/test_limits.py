"""Steps and fractions; how switches and decays refuse them is tested with each."""

import pytest

from lightning_step.errors import ConfigurationError
from lightning_step.recipes.limits import resolve_limit, resolve_limits


@pytest.mark.parametrize(
    ("value", "total", "step"), [(7, None, 7), (7, 3, 7), (0.5, 5, 2), (1.0, 9, 9), (1, 9, 1), (0.1, 1000, 100), (0.0, 9, 0)]
)
def test_whole_numbers_are_steps_and_floats_are_fractions(value, total, step):
    assert resolve_limit("end", value, total) == step


def test_a_fraction_of_nobody_knows_what():
    with pytest.raises(ConfigurationError, match=r"because end=0\.5 is a fraction of it, .* or give end as a whole number"):
        resolve_limit("end", 0.5, None)


def test_two_limits():
    assert resolve_limits(0.25, 7, 20) == {"t_min": 5, "t_max": 7}
    with pytest.raises(ConfigurationError, match=r"t_min=0\.5 \(step 10\) and t_max=7 \(step 7\) in a run of 20"):
        resolve_limits(0.5, 7, 20)
