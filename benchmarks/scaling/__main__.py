"""Print the cost model's tables, or write them into docs/scaling.md: ``python -m benchmarks.scaling``."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

from benchmarks.scaling import knobs, measured, tables

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
COMPUTED = {
    "choices": tables.choices,
    "layouts": tables.layouts,
    "knobs": knobs.table,
    "memory": tables.memories,
    "collectives": tables.collectives,
    "head": tables.heads,
    "assumptions": tables.assumptions,
}
MEASURED = "measured"


def block(name: str, text: str) -> str:
    return f"<!-- {name}: python -m benchmarks.scaling -->\n\n{text}\n\n<!-- end of {name} -->"


def written(page: str, found: dict[str, str]) -> str:
    """Return ``page`` with the tables in the places that its comments mark; raises ValueError where one is missing."""
    for name, text in found.items():
        pattern = rf"<!-- {name}: [^\n]*-->.*?<!-- end of {name} -->"
        places = list(re.finditer(pattern, page, flags=re.DOTALL))
        if len(places) != 1:
            raise ValueError(f"the page must have one place for {name!r}, between its comments; got {len(places)}")
        (place,) = places
        page = page[: place.start()] + block(name, text) + page[place.end() :]
    return page


def measure() -> str:
    """Start the processes and return the table of what they did beside what the model says."""
    return tables.measured(measured.shown(measured.run()))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="every layout's numbers instead of tables")
    parser.add_argument("--measure", action="store_true", help="start CPU processes and count what they send and hold")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    options = parser.parse_args(arguments)
    if options.json:
        print(json.dumps(tables.records()))
        return 0
    found = {name: table() for name, table in COMPUTED.items()}
    if options.measure:
        found[MEASURED] = measure()
    if options.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    else:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
