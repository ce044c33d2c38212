"""JSON of a file as data, if it is honest."""

from __future__ import annotations

import json
from typing import Any

PARTS = 2**18  # in a file of no size; as objects of Python they take some 100 bytes each


def parse_json(text: str, size: int = 0) -> Any:
    """JSON as data; `size`: bytes of the file it comes from.

    Raises:
        ValueError: it is none, a key is there twice, or it is nested too deep or of too many parts to be honest.

    Example:
        >>> parse_json('{"rank": 2}')
        {'rank': 2}
    """
    if text.count("[") + text.count("{") + text.count(",") > PARTS + size // 64:
        raise ValueError("its JSON has more parts than an adapter of its size can have")
    try:
        return json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("its JSON is nested too deep") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its JSON has {next(n for n in names if names.count(n) > 1)!r} twice")
    return found
