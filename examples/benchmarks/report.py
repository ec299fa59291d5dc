"""From lines of results to tables. Nothing is run, and no recipe is asked: all is in the lines."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from checks import check
from drawn import drawable, narrowness, pattern_of, position
from pages import page
from significance import Comparison, compare, detectable
from studies import cost

Line = Mapping[str, Any]
Json = dict[str, Any]
Settings = dict[tuple[float, float | None], dict[int, Line]]  # by rate and lam, then by seed

RIVALS = ("SR-STE", "ASP")
UNTUNED = ", untuned"  # what the names of rows end with that take the rate of dense training
SIGNIFICANT = 0.05


def write_report(folder: Path, lines: Sequence[Line]) -> str:
    """Write ``results.json``, ``results.md``, and a file of results for the figures of each task.

    Args:
        folder: Where to.
        lines: Every run, in whatever order.

    Returns:
        The Markdown page.

    Raises:
        SystemExit: If the lines cannot be compared with each other.
    """
    check(lines)
    tasks = sorted({line["task"] for line in lines})
    body: Json = {"facts": facts(lines), "tasks": [of_task([a for a in lines if a["task"] == task]) for task in tasks]}
    body["summary"] = summary(body["tasks"])
    text = page(body)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(rounded(body), indent=1) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(text, encoding="utf-8")
    for task in tasks:
        rows = drawable([line for line in lines if line["task"] == task])
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return text


def facts(lines: Sequence[Line]) -> Json:
    """Where, when and by what; several of each, if the runs were spread over several."""
    dates = sorted(line["finished"] for line in lines if line["finished"])
    return {
        "runs": len(lines),
        "hours": round(sum(line["seconds"] for line in lines) / 3600, 2),
        "versions": distinct(line["versions"] for line in lines),
        "commits": distinct(line["commit"] and line["commit"] + "+" * bool(line["changed"]) for line in lines),
        "machines": distinct(line["machine"] for line in lines),
        "dates": [dates[0][:10], dates[-1][:10]] if dates else [],
    }


def distinct(values: Iterable[Any]) -> list[Any]:
    """Each once."""
    return [json.loads(text) for text in sorted({json.dumps(value, sort_keys=True) for value in values})]


def rounded(value: Any) -> Any:
    """Numbers to ten digits: the last ones of a mean depend on the version of Python."""
    if isinstance(value, Mapping):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    return float(f"{value:.10g}") if isinstance(value, float) else value


def of_task(lines: Sequence[Line]) -> Json:
    """All tables of a task."""
    groups: dict[tuple[str, str], Settings] = {}
    for line in lines:
        setting = groups.setdefault((line["row"], pattern_of(line)), {}).setdefault((line["lr"], line["lam"]), {})
        setting[line["seed"]] = line
    changes = {group for group, settings in groups.items() if any_line(settings)["of"]}
    tuned = [group for group, settings in groups.items() if is_tuned(any_line(settings))]
    rows = {group: row_of(group, groups[group], tuned, groups) for group in tuned}
    for group in groups.keys() - rows.keys():
        rows[group] = row_of(group, as_it_comes(groups[group], rows.get(("dense", ""))), tuned, groups)
    for row in rows.values():
        relate(row, rows)
    patterns = sorted({pattern for _, pattern in groups if pattern}, key=narrowness)
    order = sorted(groups, key=lambda group: (position(group[0]), narrowness(group[1])))
    return {
        "name": lines[0]["task"],
        "also": None,
        **lines[0]["metric"],
        "steps": lines[0]["steps"] // lines[0]["times"],
        "config": {**lines[0]["config"]["task"], "steps": None},
        "tables": [
            {
                "pattern": pattern,
                "rows": [rows[group] for group in order if group in tuned and group[1] in (pattern, "")],
                "untuned": [rows[group] for group in order if group not in {*tuned, *changes} and group[1] == pattern],
                "pruned": pruned(rows.get(("dense", "")), groups, pattern),
            }
            for pattern in patterns
        ],
        "changes": [rows[group] for group in order if group in changes],
        "grids": [grid(group, groups[group]) for group in order if is_tuned(any_line(groups[group]))],
    }


def as_it_comes(settings: Settings, dense: Json | None) -> Settings:
    """Of a row that is not tuned: what was run at the rate that is now the best of dense training, where there is any."""
    if dense is None or not any_line(settings).get("untuned"):
        return settings
    return {setting: seeds for setting, seeds in settings.items() if setting[0] == dense["lr"]} or settings


def row_of(
    group: tuple[str, str], settings: Settings, tuned: Iterable[tuple[str, str]], groups: Mapping[Any, Settings]
) -> Json:
    """The best setting of a row: of those with the most seeds, the one with the lowest mean cost."""
    (lr, lam), best = min(
        ((setting, seeds) for setting, seeds in settings.items() if len(seeds) == max(map(len, settings.values()))),
        key=lambda pair: (statistics.mean(map(cost, pair[1].values())), pair[0][0], pair[0][1] or 0.0),
    )
    scores = {seed: reported(line["scores"], line) for seed, line in sorted(best.items())}
    line = any_line(settings)
    like = [groups[other] for other in tuned if any_line(groups[other])["optimizer"] == line["optimizer"]]
    rates = sorted({rate for other in like for rate, _ in other})
    lams = sorted({one for other in like for _, one in other if one is not None})
    return {
        "row": group[0],
        "pattern": group[1],
        "of": line["of"],
        "untuned": bool(line.get("untuned")),
        "optimizer": line["optimizer"],
        "higher_is_better": line["metric"]["higher_is_better"],
        "lr": lr,
        "lam": lam,
        "lr_at_edge": is_tuned(line) and lr in (rates[0], rates[-1]) and len(rates) > 1,
        "lam_at_edge": is_tuned(line) and lam is not None and lam in (lams[0], lams[-1]) and len(lams) > 1,
        "tried": len(settings),
        "possible": 1 if not is_tuned(line) else len(rates) * (1 if lam is None else len(lams)),
        "scores": {str(seed): score for seed, score in scores.items()},
        **spread(list(scores.values())),
        "also": also(list(best.values())),
        "switch": switches(list(best.values())),
    }


def is_tuned(line: Line) -> bool:
    """Whether its row has a grid: no change has, nor what is run at the rate of dense training."""
    return line["of"] is None and not line.get("untuned")


def also(lines: Sequence[Line]) -> float | None:
    """Mean of the score that is shown beside the one that counts, if there is one."""
    name = lines[0]["metric"].get("also")
    return None if name is None else statistics.mean(line["scores"].get(name, math.nan) for line in lines)


def relate(row: Json, rows: Mapping[tuple[str, str], Json]) -> None:
    """Add how a row stands to dense training, to its rivals, and to the row it changes."""
    dense = rows.get(("dense, SGD" if row["optimizer"] == "SGD" else "dense", ""))
    row["above_dense"] = None if dense is None else row["mean"] - dense["mean"]
    rivals = [name + UNTUNED * row["untuned"] for name in RIVALS]
    others = [row["of"]] if row["of"] else [name for name in rivals if name != row["row"]]
    row["against"] = {}
    for name in others:
        other = rows.get((name, row["pattern"])) or (rows.get((name, "")) if row["of"] else None)
        if other is not None and (row["pattern"] or row["of"]):
            row["against"][name] = verdict(compare(by_seed(row), by_seed(other)), row["higher_is_better"])
    rival = rows.get((rivals[0], row["pattern"]))
    row["gap_closed"] = None
    if rival is not None and dense is not None and row["optimizer"] == rival["optimizer"] and row["row"] != rivals[0]:
        gap = gap_of(rival, dense)
        row["gap_closed"] = None if gap is None else (rival["mean"] - row["mean"]) / gap


def gap_of(rival: Json, dense: Json) -> float | None:
    """How far a rival is behind dense training; None if that is within a standard deviation of the seeds' differences."""
    theirs, own = by_seed(rival), by_seed(dense)
    differences = [theirs[seed] - own[seed] for seed in sorted(theirs.keys() & own.keys())]
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    gap = statistics.mean(differences)
    behind = -gap if rival["higher_is_better"] else gap
    return gap if behind > statistics.stdev(differences) else None


def verdict(comparison: Comparison | None, higher_is_better: bool) -> Json | None:
    """A comparison as plain values, with a word for it where it is significant."""
    if comparison is None:
        return None
    word = ""
    if comparison.p < SIGNIFICANT:
        word = "better" if (comparison.difference > 0) == higher_is_better else "worse"
    return {**comparison._asdict(), "verdict": word}


def summary(tasks: Sequence[Json]) -> Json:
    """For each row: how often it is significantly better and worse than its rivals, and how much of the gap it closes."""
    rows = [row for task in tasks for table in task["tables"] for row in table["rows"] + table["untuned"] if row["pattern"]]
    found = []
    for name in sorted({row["row"] for row in rows}, key=position):
        own = [row for row in rows if row["row"] == name]
        gaps = [row["gap_closed"] for row in own if row["gap_closed"] is not None]
        counts = {}
        for rival in RIVALS:
            against = [row["against"].get(rival + UNTUNED * row["untuned"]) for row in own]
            words = [one["verdict"] for one in against if one]
            counts[rival] = {"better": words.count("better"), "neither": words.count(""), "worse": words.count("worse")}
        mean = statistics.mean(gaps) if gaps else None
        found.append({"row": name, "compared": len(own), "against": counts, "gap_closed": mean, "gaps": len(gaps)})
    seeds = sorted({one["seeds"] for row in rows for one in row["against"].values() if one})
    return {
        "rows": found,
        "cases": len({(task["name"], table["pattern"]) for task in tasks for table in task["tables"]}),
        "comparisons": len(compared(tasks)),
        "power": [{"seeds": n, "detectable": round(detectable(n), 2), "least_exact": 2.0 ** (1 - n)} for n in seeds],
    }


def compared(tasks: Sequence[Json]) -> set[tuple[str, str, str, str]]:
    """Every pair of rows that is compared: task, pattern, and the two names in order."""
    return {
        (task["name"], row["pattern"], *sorted((row["row"], other)))
        for task in tasks
        for row in [*task["changes"], *(row for table in task["tables"] for row in table["rows"] + table["untuned"])]
        for other, one in row["against"].items()
        if one
    }


def pruned(dense: Json | None, groups: Mapping[tuple[str, str], Settings], pattern: str) -> Json | None:
    """The dense runs at their own best rate, pruned at the end and not trained on."""
    if dense is None:
        return None
    seeds = groups["dense", ""][dense["lr"], dense["lam"]]
    scores = {s: reported(line["pruned"][pattern], line) for s, line in sorted(seeds.items()) if pattern in line["pruned"]}
    if not scores:
        return None
    values = {**spread(list(scores.values())), "scores": {str(seed): score for seed, score in scores.items()}}
    return {"row": "dense, pruned at the end", **values, "above_dense": values["mean"] - dense["mean"], "lr": dense["lr"]}


def grid(group: tuple[str, str], settings: Settings) -> Json:
    """What was chosen by, of every setting on the first seed."""
    seeds = [seed for each in settings.values() for seed in each]
    first = max(sorted(set(seeds)), key=seeds.count)
    values = [
        {"lr": lr, "lam": lam, "value": each[first]["scores"][each[first]["metric"]["chosen_by"]]}
        for (lr, lam), each in sorted(settings.items(), key=lambda pair: (pair[0][1] or 0.0, pair[0][0]))
        if first in each
    ]
    return {
        "row": group[0],
        "pattern": group[1],
        "optimizer": any_line(settings)["optimizer"],
        "seed": first,
        "values": values,
    }


def reported(scores: Mapping[str, float], line: Line) -> float:
    """The score that tables show."""
    return float(scores.get(line["metric"]["reported"], math.nan))


def spread(scores: Sequence[float]) -> Json:
    """Mean and standard deviation; of one score, there is none."""
    return {"mean": statistics.mean(scores), "sd": statistics.stdev(scores) if len(scores) > 1 else None}


def switches(lines: Sequence[Line]) -> str:
    """Steps of all switches, per seed where they differ, and the rule that fired."""
    found = {" and ".join(map(str, line["switch_steps"])) for line in lines}
    rules = {event.split("; ")[1].split(":")[0] for line in lines for event in line["switches"]}
    return ", ".join(sorted(found)) + (f" ({', '.join(sorted(rules))})" if rules else "")


def by_seed(row: Json) -> dict[int, float]:
    """Scores with seeds as numbers."""
    return {int(seed): score for seed, score in row["scores"].items()}


def any_line(settings: Settings) -> Line:
    """Any of a row: for what all of them have in common."""
    return next(iter(next(iter(settings.values())).values()))
