"""Tables for the terminal and for Markdown: rows of cells in, lines out."""

from __future__ import annotations

import pathlib
import sys
import textwrap
from collections.abc import Sequence


def text(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces between them; a cell of several lines makes a taller row.

    >>> print(text(("name", "reasons"), [("a", "first\\nsecond"), ("long", "")]))
    name  reasons
    ----  -------
    a     first
          second
    long
    """
    split = [[cell.split("\n") for cell in row] for row in (headers, *rows)]
    widths = [max(len(line) for row in split for line in row[column]) for column in range(len(headers))]
    lines: list[str] = []
    for number, row in enumerate(split):
        for height in range(max(len(cell) for cell in row)):
            cells = [cell[height] if height < len(cell) else "" for cell in row]
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())
        if number == 0:
            lines.append("  ".join("-" * width for width in widths))
    return "\n".join(lines)


def narrow(rows: Sequence[Sequence[str]], width: int) -> list[tuple[str, ...]]:
    """``rows`` with every cell broken into lines of at most ``width`` characters, between words.

    >>> narrow([("cpu, cuda, xpu", "f32")], 9)
    [('cpu,\\ncuda, xpu', 'f32')]
    """
    wrapper = textwrap.TextWrapper(width, break_long_words=False, break_on_hyphens=False)
    return [tuple("\n".join(wrapper.wrap(cell)) for cell in row) for row in rows]


def markdown(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as a Markdown table; line breaks in a cell become ``<br>``.

    >>> print(markdown(("a", "b"), [("1", "x|y")]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    lines = [_markdown_row(headers), "|" + "---|" * len(headers)]
    return "\n".join([*lines, *(_markdown_row(row) for row in rows)])


def put_between(path: pathlib.Path, begin: str, end: str, table: str) -> int:
    """Replace what ``path`` has between the lines ``begin`` and ``end``; exit status 2 without them."""
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        print(f"{path} must hold {begin} and, after it, {end}, once each", file=sys.stderr)
        return 2
    head, rest = text.split(begin)
    path.write_text(f"{head}{begin}\n{table}\n{end}{rest.split(end)[1]}")
    return 0


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", "<br>") for cell in cells) + " |"
