"""The tables of a report as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]


def page(body: Json) -> str:
    """All tables, and what they were made by."""
    lines = [line for task in body["tasks"] for line in of_task(task)]
    if body["summary"]["cases"] > 1:
        lines += across(body["summary"])
    lines += [*how_sure(body["summary"]), footer(body["facts"])]
    return "\n".join(lines) + "\n"


def of_task(task: Json) -> list[str]:
    """One task: a table for each pattern, what was changed, the grid."""
    better = "higher" if task["higher_is_better"] else "lower"
    chosen = "" if task["chosen_by"] == task["reported"] else f", chosen by {task['chosen_by']}"
    lines = [
        f"**{task['name']}**: {task['unit']}, {better} is better; {task['steps']} steps in every row, dense ones "
        "included; mean ± standard deviation over seeds. Rate and lam of each row: of its best settings in the grid "
        f"below{chosen}, the one with the best mean over all seeds. (edge): the best of the grid is at its edge.\n"
    ]
    for table in task["tables"]:
        lines += [f"**{task['name']}, {table['pattern']}**\n", *main_table(task, table["rows"], table["pruned"]), ""]
        if table["untuned"]:
            lines += [
                f"{task['name']}, {table['pattern']}, at the best rate of dense training, each recipe as it comes; compared "
                "with each other and not with the rows above:\n",
                *main_table(task, table["untuned"]),
                "",
            ]
    if task["changes"]:
        lines += ["One thing changed, at the rate and lam of the row that it is changed in:\n", *change_table(task), ""]
    for optimizer in sorted({grid["optimizer"] for grid in task["grids"]}):
        grids = [grid for grid in task["grids"] if grid["optimizer"] == optimizer]
        lines += [f"The grid under {optimizer}: {task['chosen_by']}, seed {grids[0]['seed']}:\n", *grid_table(grids), ""]
    return lines


def main_table(task: Json, rows: Sequence[Json], pruned: Json | None = None) -> list[str]:
    """Every row at one pattern."""
    rivals = sorted({name for row in rows for name in row["against"]}, reverse=True)
    lines = header(
        "recipe", task["unit"].split(" in ")[0], "above dense", *(f"against {name}" for name in rivals),
        "of the gap", *second(task), "per seed", "rate", "lam", "switch after step",
    )  # fmt: skip
    for row in rows:
        against = [versus(row["against"].get(name)) for name in rivals]
        gap = "" if row["gap_closed"] is None else f"{100 * row['gap_closed']:.0f} %"
        lines.append(line(name_of(row), *scores(row), *against, gap, *second(task, row), *setting(row)))
    if pruned:
        row = pruned
        empty = ["" for _ in (*rivals, "gap", *second(task))]
        lines.append(line(row["row"], *scores(row), *empty, each(row), f"{row['lr']:g}", "", ""))
    return lines


def change_table(task: Json) -> list[str]:
    """What was changed, against the row it was changed in."""
    unit = task["unit"].split(" in ")[0]
    lines = header(
        "changed", unit, "above dense", "in", "against it", *second(task), "per seed", "rate", "lam", "switch after step"
    )
    for row in task["changes"]:
        base = f"{row['of']} {row['pattern']}".strip()
        against = versus(row["against"].get(row["of"]))
        lines.append(line(name_of(row), *scores(row), base, against, *second(task, row), *setting(row)))
    return lines


def grid_table(grids: Sequence[Json]) -> list[str]:
    """Every setting that was tried, on one seed."""
    rates = sorted({value["lr"] for grid in grids for value in grid["values"]})
    lines = header("recipe", "n:m", "lam", *(f"rate {rate:g}" for rate in rates))
    for grid in grids:
        for lam in dict.fromkeys(value["lam"] for value in grid["values"]):
            found = {value["lr"]: f"{value['value']:.4f}" for value in grid["values"] if value["lam"] == lam}
            cells = [found.get(rate, "") for rate in rates]
            lines.append(line(grid["row"], grid["pattern"], "" if lam is None else f"{lam:g}", *cells))
    return lines


def across(summary: Json) -> list[str]:
    """All tasks and patterns together."""
    rivals = list(summary["rows"][0]["against"])
    lines = [
        f"**All {summary['cases']} cases** (task and pattern): how often a row is significantly better, neither, and worse; "
        "and how much of the gap from SR-STE to dense it closes on the mean, over the cases where that gap is larger than "
        "the standard deviation of its seeds.\n",
        *header("recipe", "cases", *(f"against {name}" for name in rivals), "of the gap"),
    ]
    for row in summary["rows"]:
        counts = [" / ".join(str(n) for n in row["against"][name].values()) for name in rivals]
        gap = "" if row["gap_closed"] is None else f"{100 * row['gap_closed']:.0f} % ({row['gaps']})"
        lines.append(line(row["row"], str(row["compared"]), *counts, gap))
    return [*lines, ""]


def how_sure(summary: Json) -> list[str]:
    """What the p values are, and what they can find."""
    sentences = [
        "p x / y: x is of the paired t test over the seeds that both rows have, y of the exact test of signs, both "
        "two-sided; better, worse: x is below 0.05. They are not corrected for how many there are: "
        f"{summary['comparisons']} here, of which {0.05 * summary['comparisons']:.1f} would be expected below 0.05 if no "
        "row differed. The seeds that chose a setting are among those that judge it."
    ]
    for one in summary["power"]:
        sentences.append(
            f"With {one['seeds']} seeds, the t test finds a difference with a chance of 80 % if it is "
            f"{one['detectable']:.1f} times the standard deviation of the differences of single seeds or more, and the "
            f"exact test cannot fall below {one['least_exact']:g}."
        )
    return [" ".join(sentences), ""]


def footer(facts: Json) -> str:
    """Where, when and by what."""
    versions = "; ".join(", ".join(f"{name} {number}" for name, number in each.items()) for each in facts["versions"])
    commits = ", ".join(
        "not recorded" if commit is None else commit[:12] + "+" * commit.endswith("+") for commit in facts["commits"]
    )
    dates = " to ".join(dict.fromkeys(facts["dates"])) or "date not recorded"
    return (
        f"{facts['runs']} runs, {facts['hours']:g} hours of single runs; {'; '.join(facts['machines'])}; {versions}; "
        f"{dates}; commit {commits}" + (" (+: with files changed since)" if "+" in commits else "") + "."
    )


def name_of(row: Json) -> str:
    """Its name, and how much of its grid there is, if not all."""
    return str(row["row"]) + (f" ({row['tried']} of {row['possible']} settings)" if row["tried"] < row["possible"] else "")


def scores(row: Json) -> tuple[str, str]:
    """Mean and standard deviation, and the distance to dense."""
    sd = "" if row["sd"] is None else f" ± {row['sd']:.4f}"
    return f"{row['mean']:.4f}{sd}", "" if row["above_dense"] is None else f"{row['above_dense']:+.4f}"


def second(task: Json, row: Json | None = None) -> list[str]:
    """The score beside the one that counts, or its name; nothing where a task has only one."""
    if task["also"] is None:
        return []
    return [task["also"].replace("_", " ") if row is None else f"{row['also']:.4g}"]


def setting(row: Json) -> tuple[str, str, str, str]:
    """Every seed's score, rate, lam, and when it switched."""
    lam = "" if row["lam"] is None else f"{row['lam']:g}" + " (edge)" * row["lam_at_edge"]
    return each(row), f"{row['lr']:g}" + " (edge)" * row["lr_at_edge"], lam, row["switch"]


def each(row: Json) -> str:
    """Every seed's score."""
    return ", ".join(f"{score:.4f}" for score in row["scores"].values())


def versus(one: Json | None) -> str:
    """A difference and how sure it is."""
    if one is None:
        return ""
    exact = "" if one["p_exact"] is None else f" / {one['p_exact']:.2g}"
    return f"{one['difference']:+.4f} (p {one['p']:.2g}{exact}{one['verdict'] and ', ' + one['verdict']})"


def header(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [line(*names), "|" + "---|" * len(names)]


def line(*cells: str) -> str:
    """One row of a table."""
    return f"| {' | '.join(cells)} |"
