"""The curve in memory against all points."""

from lightning_step.monitoring.history import VarianceHistory


def filled(steps, switch):
    history = VarianceHistory()
    for step in steps:
        live = {"variance_change": 1 / step, "threshold": 0.5} if step <= switch else {}
        history.add(step, {"phase": 1.0 + (step >= switch), "lr": 0.1, **live})
    return history


def test_the_curve_is_whole_and_of_the_phases_only_the_ends_are_kept():
    log = filled(range(10, 1001, 10), 200).log()
    assert log.change.steps == tuple(range(10, 201, 10))
    assert log.change.values == tuple(1 / step for step in range(10, 201, 10))
    assert log.window_mean.steps == ()
    assert log.phase == ((10, 190, 200, 1000), (1.0, 1.0, 2.0, 2.0))
    assert (log.masks_on, log.frozen) == (200, 200)


def test_a_state_is_of_plain_numbers_and_gives_back_the_curve():
    history = filled(range(1, 30), 12)
    state = history.state_dict()
    assert {type(x) for points in state.values() for point in points for x in point} == {int, float}
    again = VarianceHistory()
    again.load_state_dict(state)
    for later in (history, again):
        later.add(40, {"phase": 2.0})
    assert again.log() == history.log()
    assert VarianceHistory().log().change.steps == ()
