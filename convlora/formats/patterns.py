r"""PEFT's `rank_pattern` and `alpha_pattern`: values by regular expressions over layer paths, from a file.

Python cannot stop a search, and a few characters of a pattern can make one that outlasts the sun. So plain names, which
is what PEFT itself and this library write, are looked up, and another expression is tried only if its choices,
multiplied, are few.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from convlora.errors import ConvLoRAError

STEPS = 10**7  # of a tenth of a microsecond, as estimated, for all patterns and layers of a file

_PLAIN = re.compile(r"(\^?)((?:[\w/.-]|\\[^\w\s])+)")
_ANY = "\0"  # in a plain name: a dot that is not escaped, which stands for any character


class LayerPatterns:
    r"""The values of the patterns that match a layer as PEFT's `get_pattern_key` does: as `(.*\.)?(pattern)$`.

    Args:
        values: pattern -> value.
        where: they come from, for messages.

    Example:
        >>> LayerPatterns({"^stem": 1, "conv": 2, r"body\.[0-9]+": 3}, "a file").values("body.0.conv")
        [2]
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.where, self.steps = where, STEPS
        # places of _ANY -> (whether it has to be the whole path, name) -> number and value
        self.plain: dict[tuple[int, ...], dict[tuple[bool, str], tuple[int, Any]]] = {}
        self.searched: list[tuple[int, Any, str, re.Pattern[str]]] = []
        for number, (pattern, value) in enumerate(values.items()):
            if len(pattern) > 1000:
                raise ConvLoRAError(f"{where}: a pattern of {len(pattern):,} characters is none of a layer")
            if plain := _PLAIN.fullmatch(pattern):
                name = re.sub(r"\\(.)|\.", lambda found: found[1] or _ANY, plain[2])
                places = tuple(i for i, character in enumerate(name) if character == _ANY)
                self.plain.setdefault(places, {})[bool(plain[1]), name] = number, value
            else:
                self.searched.append((number, value, pattern, self._compiled(pattern)))

    def values(self, layer: str) -> list[Any]:
        """Those of all patterns that match, in the order of the file."""
        found = []
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", layer))]
        for places, names in self.plain.items():
            self._spend(10 + 5 * len(starts) * (1 + len(places)), "plain names")
            for start in starts:
                tail = _blanked(layer[start:], places)
                found += [names[key] for key in {(False, tail), (start == 0, tail)} if key in names]
        for number, value, pattern, expression in self.searched:
            self._spend(_ways(pattern, len(layer)), repr(pattern))
            if expression.match(layer):
                found.append((number, value))
        return [value for _, value in sorted(found, key=lambda pair: pair[0])]

    def _compiled(self, pattern: str) -> re.Pattern[str]:
        # Compiling takes the size of what repeats, one in another multiplied.
        repeats = math.prod(int(number) for number in re.findall(r"(\d{1,9})\}", pattern))
        if re.search(r"\)[*+{]", pattern) or repeats > 1000:
            raise ConvLoRAError(f"{self.where}: {pattern!r} repeats too much to be searched safely")
        self._spend(1000 + 100 * len(pattern), repr(pattern))
        try:
            return re.compile(rf"(.*\.)?({pattern})$")
        except (re.error, OverflowError, RecursionError) as error:
            raise ConvLoRAError(f"{self.where}: {pattern!r} is no regular expression ({error})") from None

    def _spend(self, steps: int, pattern: str) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise ConvLoRAError(f"{self.where}: {pattern} can match in too many ways to be searched safely")


def _blanked(tail: str, places: tuple[int, ...]) -> str:
    if not places or places[-1] >= len(tail):
        return tail
    characters = list(tail)
    for place in places:
        characters[place] = _ANY
    return "".join(characters)


def _ways(pattern: str, length: int) -> int:
    """At least as many ways as a search may have to try: the choices of all repetitions and alternatives, multiplied.

    n repetitions share out `length` characters, one more for what comes before the pattern; a group of m alternatives
    is a choice of m.
    """
    repeats = len(re.findall(r"[*+{]", pattern)) + 1
    choices: int = 2 ** pattern.count("?")
    for group in re.split(r"[()]", pattern):
        choices *= 1 + group.count("|")
        if choices > STEPS:
            return choices
    return 20 + math.comb(length + repeats, repeats) * choices if repeats < 20 else STEPS + 1
