"""The monitor in a plain loop; under Lightning it is tested in tests/callbacks."""

import torch

from lightning_step import SRSTE, STEP, AtStep, Sparsifier
from lightning_step.monitoring import Monitor, MonitorOptions


class Keeps:
    def __init__(self):
        self.kept = {}

    def log_metrics(self, metrics, step=None):
        assert step not in self.kept
        self.kept[step] = metrics


def run(recipe, options, steps=7):
    model, logger = torch.nn.Linear(8, 4), Keeps()
    every = options.every
    sparsifier = Sparsifier(model, torch.optim.AdamW(model.parameters()), recipe=recipe, total_steps=10, measure_every=every)
    monitor = Monitor([sparsifier], [logger], options)
    monitor.start(0)
    for t in range(1, steps + 1):
        model(torch.randn(4, 8)).square().sum().backward()
        sparsifier.optimizer.step()
        sparsifier.optimizer.zero_grad()
        monitor.observe(t)
        monitor.observe(t)  # a batch that took no step
    monitor.finish(steps)
    monitor.finish(steps)
    return monitor, logger.kept


def test_it_logs_at_the_interval_at_the_switch_and_at_the_end_once():
    _, kept = run(STEP(AtStep(3)), MonitorOptions(every=2, histograms_every=4))
    assert {step: metrics["sparsity/phase"] for step, metrics in kept.items()} == {2: 1, 3: 2, 4: 2, 6: 2, 7: 2}


def test_a_switch_before_the_first_step_is_no_reason_to_log():
    _, kept = run(SRSTE(), MonitorOptions(every=5, histograms_every=0))
    assert sorted(kept) == [5, 7]


def test_every_zero_is_never_and_leaves_no_state():
    monitor, kept = run(SRSTE(), MonitorOptions(every=0, histograms_every=0))
    assert (kept, monitor.state_dict()) == ({}, [])


def test_layers_are_logged_on_request_only():
    tags = [set().union(*run(SRSTE(), MonitorOptions(3, 0, per_layer=own))[1].values()) for own in (False, True)]
    assert not any("/layer/" in tag for tag in tags[0])
    names = ("flip_rate", "kept_magnitude", "v_l1", "v_l2")
    assert tags[1] - tags[0] == {f"sparsity/layer/weight/{name}" for name in names}
