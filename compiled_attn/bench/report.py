"""Results of a benchmark: a table on the terminal, JSON in a file."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import cli_table
from ..cli_machine import provenance, save


@dataclasses.dataclass(frozen=True)
class Row:
    """One measured variant, microseconds per call. ``over``: more than the row it is compared with."""

    what: str
    name: str
    us: float
    over: float | None = None
    goal: str = ""
    met: bool | None = None

    def with_goal(self, goal: str, met: bool) -> Row:
        """This row with a goal and whether it was met."""
        return dataclasses.replace(self, goal=goal, met=met)


def publish(name: str, rows: list[Row], notes: list[str], file: str | None, **facts: Any) -> None:
    """Print the table; write everything to ``file`` as JSON if one is given."""
    about = provenance()
    print(f"{about['cpu']}, torch {about['versions']['torch']}, Python {about['versions']['python']}")
    cells = []
    last = None
    for row in rows:
        over = "" if row.over is None else f"{row.over:+.2f}"
        verdict = "" if row.met is None else f"{'met' if row.met else 'MISSED'}: {row.goal}"
        cells.append(("" if row.what == last else row.what, row.name, f"{row.us:.2f}", over, verdict))
        last = row.what
    print(cli_table.text(("what", "variant", "us", "over the first", "goal"), cells))
    for note in notes:
        print(note)
    if file is not None:
        result = {"benchmark": name, **about, **facts, "notes": notes}
        result["rows"] = [dataclasses.asdict(row) for row in rows]
        save(result, file)
        print(f"written to {file}")
