"""What the commands of this folder share: their arguments, which parts to run, and the files that they write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any


def parser_of(doc: str | None, out: Path, what: str) -> argparse.ArgumentParser:
    """The arguments that every command takes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--only", default="", help=f"{what}, by commas; all of them by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true")
    return parser


def chosen(only: str, known: Collection[str], what: str) -> list[str]:
    """Names of what is to be run."""
    names = [name for name in only.split(",") if name] or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SystemExit(f"Expected {what} among {', '.join(known)}, but got {unknown[0]!r}.")
    return names


def write(out: Path, data: Mapping[str, Any], text: str) -> None:
    """Write ``results.json`` and ``results.md``, and print the latter."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (out / "results.md").write_text(text, encoding="utf-8")
    print(text)
