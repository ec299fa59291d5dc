"""Self time in the events of a profiler: what is ours, what is the stock optimizer's, and the page about it."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

Owner = Literal["ours", "stock optimizer", "rest"]
OWNERS: dict[str, Owner] = {"lightning_step/": "ours", "torch/optim/": "stock optimizer", "lightning/pytorch/": "rest"}
"""Where the functions of each are."""

BACKWARD = ("autograd::", "torch::autograd")

Times = Mapping[str, Mapping[Owner, float]]
"""Self time of every operation, by who called it."""


class Share(NamedTuple):
    """Self time of an operation, as shares of all self time of phase II."""

    name: str
    all: float
    ours: float
    dense: float  # the same operation in dense steps


class Profile(NamedTuple):
    """What a task's steps take."""

    task: str
    dense: float  # seconds of a step, without a profiler
    phase_two: float
    ours: float  # shares of phase II's self time: all that is ours
    python: float  # and of this what is Python itself
    stock: float  # the stock optimizer, in phase II
    stock_dense: float  # and in dense steps
    top: list[Share]


def owner(event: Any) -> Owner:
    """Who called an event: the innermost function that tells, for optimizers call all of forward and backward."""
    if is_backward(event):
        return "rest"  # nothing of ours runs there, and the profiler gives it the functions of some forward operation
    for frame in event.stack or ():  # the innermost comes first
        for part, who in OWNERS.items():
            if part in frame:
                return who
    return "rest"


def is_backward(event: Any) -> bool:
    """Whether autograd's engine called it."""
    while event is not None:
        if event.name.startswith(BACKWARD):
            return True
        event = event.cpu_parent
    return False


def kind_of(name: str) -> str:
    """What an event counts as: an operation by its name, all else together."""
    if name.startswith("aten::"):
        return name
    return "autograd" if name.startswith(BACKWARD) or name.endswith("Backward0") else "Python"


def times_of(events: Iterable[Any]) -> Times:
    """Self time by kind and owner."""
    found: dict[str, dict[Owner, float]] = defaultdict(lambda: {"ours": 0.0, "stock optimizer": 0.0, "rest": 0.0})
    for event in events:
        found[kind_of(event.name)][owner(event)] += event.self_cpu_time_total
    return found


def least(found: Sequence[Times]) -> Times:
    """Of several profiles of the same steps, the least of everything: what else a machine does only adds."""
    who: tuple[Owner, ...] = get_args(Owner)
    return {name: {each: min(times[name][each] for times in found) for each in who} for name in found[0]}


def profile_of(task: str, seconds: Mapping[str, Sequence[float]], dense: Times, phase_two: Times) -> Profile:
    """All that is shown of a task, from its steps without a profiler and with it."""
    whole = sum(sum(each.values()) for each in phase_two.values())
    zero: dict[Owner, float] = {}
    shares = [
        Share(name, sum(each.values()) / whole, each["ours"] / whole, sum(dense.get(name, zero).values()) / whole)
        for name, each in phase_two.items()
    ]
    return Profile(
        task,
        statistics.median(seconds["dense"]),
        statistics.median(seconds["phase II"]),
        sum(share.ours for share in shares),
        sum(share.ours for share in shares if share.name == "Python"),
        sum(each["stock optimizer"] for each in phase_two.values()) / whole,
        sum(each["stock optimizer"] for each in dense.values()) / whole,
        sorted(shares, key=lambda share: -share.all)[:10],
    )


def page(profiles: Iterable[Profile], about: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        f"{about['machine']}; Python {about['python']}, torch {about['torch']}, lightning {about['lightning']}, "
        f"{about['threads']} thread(s); medians over {about['repeats']} fits of {about['steps']} steps, in turns; shares "
        "are of all self time of phase II, the least of three fits under a profiler.",
        "",
        "| task | dense step | phase II | ratio | ours | of which Python | stock optimizer, dense | in phase II |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    tables = []
    for each in profiles:
        lines.append(
            f"| {each.task} | {each.dense * 1e3:.3g} ms | {each.phase_two * 1e3:.3g} ms | "
            f"{each.phase_two / each.dense:.3f} | {each.ours:.1%} | {each.python:.1%} | {each.stock_dense:.1%} | "
            f"{each.stock:.1%} |"
        )
        tables += ["", f"The ten operations of {each.task} with the most self time:", ""]
        tables += ["| operation | phase II | of which ours | dense |", "|---|---:|---:|---:|"]
        tables += [f"| {top.name} | {top.all:.1%} | {mark(top)} | {top.dense:.1%} |" for top in each.top]
    return "\n".join(lines + tables) + "\n"


def mark(share: Share) -> str:
    """How much of an operation is ours; in bold where that is most of it."""
    text = f"{share.ours:.1%}" if share.ours >= 0.0005 else ""
    return f"**{text}**" if text and share.ours > share.all / 2 else text
