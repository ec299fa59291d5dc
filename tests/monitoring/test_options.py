"""Intervals: what they stand for, and what is none (the errors are in tests/callbacks/test_monitor_loggers.py)."""

import pytest

from lightning_step.monitoring import MonitorOptions


@pytest.mark.parametrize(
    ("given", "interval", "expected"),
    [
        ({}, 50, (50, 500)),
        ({"every": 7}, 50, (7, 70)),
        ({"every": 7, "histograms_every": 0}, 50, (7, 0)),
        ({"histograms_every": 75}, 25, (25, 75)),
        ({"every": 7, "histograms_every": 14}, 0, (0, 0)),
        ({"every": 0, "histograms_every": 14}, 50, (0, 0)),
    ],
)
def test_defaults_are_put_in_place_and_nobody_to_log_to_means_never(given, interval, expected):
    options = MonitorOptions(**given, per_layer=True, text=False).resolve(interval)
    assert (options.every, options.histograms_every) == expected
    assert (options.per_layer, options.text, options.figure) == (True, False, True)
