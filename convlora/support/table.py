"""A table in plain text."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]], right: int = 0) -> str:
    """The rows below the names of their columns; the last `right` columns are right-aligned.

    Example:
        >>> print(text_table(["layer", "rank"], [["conv_last", "4"], ["body.0", "16"]], right=1))
        layer      rank
        ─────────  ────
        conv_last     4
        body.0       16
    """
    widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
    left = len(columns) - right

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    return "\n".join([line(columns), "  ".join("─" * width for width in widths), *map(line, rows)])
