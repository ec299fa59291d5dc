from __future__ import annotations

import re

from lightning_step.reports.drawing import COLOURS
from lightning_step.reports.style import STYLE


def test_every_colour_is_there_by_day_by_night_and_on_paper() -> None:
    used = set(re.findall(r"var\(--([\w-]+)\)", STYLE)) | {f"series-{i}" for i in range(len(COLOURS))}
    for name in used | {"pale", "strong", "limit", "switch"}:
        assert STYLE.count(f"--{name}: #") == 3, name
    assert "@media (prefers-color-scheme: dark)" in STYLE
    assert "@media print" in STYLE
    assert "url(" not in STYLE
