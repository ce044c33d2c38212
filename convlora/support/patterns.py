"""Patterns over dotted names, as targets and values by layer have them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from convlora.errors import ConvLoRAError

V = TypeVar("V")
_COMPARED = 60  # characters of a name, the last, that `nearest_names` looks at


def pattern_matches(pattern: str, name: str) -> bool:
    """Whether a pattern selects a dotted name: a glob, from any dot on, or `re:` and a full-match expression.

    Example:
        >>> pattern_matches("conv1", "layer2.0.conv1"), pattern_matches("block_*.c?_r", "block_1.c3_r")
        (True, True)
        >>> pattern_matches(r"re:b\\d", "b12")
        False
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    if is_literal(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[i:]), pattern) for i in range(len(parts)))


def checked_match(pattern: str, name: str, operation: str) -> bool:
    """`pattern_matches`, with an error of the operation for what is no regular expression."""
    try:
        return pattern_matches(pattern, name)
    except re.error as error:
        raise ConvLoRAError(f"{operation}: '{pattern}' is no regular expression ({error})") from None


def is_literal(pattern: str) -> bool:
    """Whether a pattern is a plain name."""
    return not pattern.startswith("re:") and not any(c in pattern for c in "*?[")


class NameIndex:
    """Dotted names by what selects them: thousands of patterns without wildcard, as a file states, take linear time.

    Example:
        >>> index = NameIndex(["stem.conv", "body.0.conv", "body.1"])
        >>> [index.matching(pattern, "doc") for pattern in ("conv", r"re:body\\.1", "body.*")]
        [['stem.conv', 'body.0.conv'], ['body.1'], ['body.0.conv', 'body.1']]
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self._whole = set(self.names)
        self._tails: dict[str, list[str]] = {}
        for name in self.names:
            parts = name.split(".")
            for i in range(len(parts)):
                self._tails.setdefault(".".join(parts[i:]), []).append(name)

    def matching(self, pattern: str, operation: str) -> list[str]:
        """The names that a pattern selects, in their order; see `checked_match`."""
        if pattern.startswith("re:"):
            text = re.sub(r"\\(.)", r"\1", pattern[3:], flags=re.DOTALL)
            if re.escape(text) == pattern[3:]:  # one name and no other
                return [text] if text in self._whole else []
        elif is_literal(pattern):
            return self._tails.get(pattern, [])
        return [name for name in self.names if checked_match(pattern, name, operation)]


def values_by_layer(
    values: Mapping[str, V] | None,
    default: V,
    names: Iterable[str],
    operation: str,
    field: str,
    unselected: Iterable[str] = (),
) -> dict[str, V]:
    """Layer name -> value by `{pattern: value}`, the last matching pattern wins.

    Raises:
        ConvLoRAError: a pattern matches no name; of the value 0 (a rank) also none of the unselected ones.
    """
    names, others = list(names), list(unselected)
    index = NameIndex(names)
    result = dict.fromkeys(names, default)
    for pattern, value in (values or {}).items():
        hits = index.matching(pattern, operation)
        if not hits and (value or not any(checked_match(pattern, name, operation) for name in others)):
            close = nearest_names(pattern, names if value else [*names, *others])
            raise ConvLoRAError(f"{operation}: {field} pattern '{pattern}' matches none of the layers; {close}")
        result.update(dict.fromkeys(hits, value))
    return result


def value_of_layer(values: Mapping[str, V] | None, default: V, name: str, operation: str) -> V:
    """The value of one layer by `{pattern: value}`, of which others may match none.

    Example:
        >>> value_of_layer({"body.*": 8, "body.0": 2}, 4, "body.0", "doc"), value_of_layer(None, 4, "head", "doc")
        (2, 4)
    """
    hits = [value for pattern, value in (values or {}).items() if checked_match(pattern, name, operation)]
    return hits[-1] if hits else default


def nearest_names(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the known names most like a wrong one.

    Example:
        >>> nearest_names("conv_lsat", ["conv_1", "conv_last"])
        "nearest: 'conv_last', 'conv_1'"
    """
    # Comparing takes the square of the length, and names can come from a hostile file.
    known = [full for full in known if full][:2000]
    # A pattern is compared with as many trailing parts of each name as it has itself.
    parts = name.count(".") + 1
    tails = {full: ".".join(full.split(".")[-parts:])[-_COMPARED:] for full in known}
    matcher = difflib.SequenceMatcher(None, b=name[-_COMPARED:])
    ratio = {}
    for full, tail in tails.items():
        matcher.set_seq1(tail)
        ratio[full] = matcher.ratio()
    best = sorted(known, key=lambda full: -ratio[full])[:3]
    return "nearest: " + ", ".join(repr(full) for full in best) if best else "there is none"
