"""`python docs/make_formats.py` writes `docs/formats.md`: what is read and written of others' files, what is refused.

The rows are the cases of the tests that hold them, the texts those of the modules. With `--check` nothing is written,
and the exit code is 1 if the page is stale.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("formats.md")
TESTS = Path(__file__).parents[1] / "tests"
HEAD = """# Files of others

Written by `python docs/make_formats.py` from the code and the cases of its tests: change those.

`convlora.formats.read(path, layers=convlora.formats.specs_of(model))` reads all of these and finds out which it has;
`convlora.formats.write(adapter, path, format)` writes them. On the command line: `convlora convert`, and every command
that takes an adapter. "Read as" is the factorization of the adapter then, "written as" that in which the format takes
it again. In every row the network with what was read gives the output of the library that wrote the file, up to the
rounding of float32; and what is written comes back, and gives its output in the other library.
"""


def page() -> str:
    """The whole page."""
    sys.path[:0] = [str(TESTS), str(TESTS / "formats")]
    try:
        return f"{HEAD}\n{_read()}\n{_spellings()}\n{_refused()}\n{_unwritable()}\n{_texts()}".rstrip() + "\n"
    finally:
        del sys.path[:2]


def _read() -> str:
    """The table of what is read and written."""
    formats, methods, diffusers = (import_module(n) for n in ("convlora.formats", "test_methods", "test_diffusers"))
    peft, locon = (import_module(n) for n in ("test_peft", "test_locon"))
    held: dict[str, Sequence[str]] = formats.HELD
    rows = [("convlora", "its own file", "any factorization, copies of modules", "the same", "test_adapter")]
    rows += _rows("peft", held, "test_peft", {f"LoRA, {case}": "locon" for case in peft.OPTIONS})
    rows += [("peft", "`modules_to_save`", "copies of modules", "the same", "test_peft")]
    rows += [("peft", "`nn.MultiheadAttention`", "locon", "locon", "test_peft")]
    rows += _rows("peft", held, "test_methods", {case: factors for case, (_, _, factors) in methods.METHODS.items()})
    rows += _rows("locon", held, "test_locon", {f"LoCon, {case}": "locon" for case in locon.OPTIONS})
    rows += _rows("locon", held, "test_methods", {case: kind for case, (_, kind) in methods.ALGORITHMS.items()})
    rows += [("locon", "several methods in one file", "locon, or dense", "the same", "test_methods")]
    rows += [("locon", "`diff_b`, a change of the bias", "the bias delta", "`diff_b` beside `diff`", "test_names")]
    rows += _rows(
        "diffusers", held, "test_diffusers", {c: "dora" if c == "DoRA" else "locon" for c in diffusers.CONFIGS}
    )
    rows += _rows("diffusers", held, "test_diffusers", {c: f for c, (f, _) in diffusers.WRITTEN.items() if f == "lokr"})
    rows += [("diffusers", "a pipeline's file, of one network or several", "locon", "locon", "test_diffusers")]
    rows += [("diffusers", "without metadata: `alpha=`", "locon", "locon, with metadata", "test_diffusers")]
    rows += [("loralib", "a state dict, `.pt`", "convlora", "convlora", "test_loralib")]
    return _section("Read and written", ("format", "what", "read as", "written as", "held by"), rows)


def _rows(
    format: str, held: dict[str, Sequence[str]], test: str, cases: dict[str, str]
) -> list[tuple[str, str, str, str, str]]:
    return [
        (format, case, kind, kind if kind in held[format] else held[format][0], test) for case, kind in cases.items()
    ]


def _spellings() -> str:
    """The names that are read, whatever the format."""
    names = import_module("test_names")
    rows = [(f"`{name.replace('{flat}', 'body_0').format('body.0')}`",) for name in names.PREFIXES]
    parts = [(f"`{down}`, `{up}`",) for down, up in names.PARTS]
    text = "All combinations are read alike; of names that `layers=` do not have, the prefix is found.\n"
    return "\n".join(
        [_section("Names in one file", ("name of a layer",), rows, text), _table(("its parts",), parts), ""]
    )


def _refused() -> str:
    """What is refused, and why."""
    names, peft = (import_module(f"convlora.formats.{name}") for name in ("names", "peft"))
    reasons = dict.fromkeys(names.REFUSED.values())
    ends = {why: ", ".join(f"`{end}`" for end, each in names.REFUSED.items() if each == why) for why in reasons}
    rows = [("a key that ends in", ends[why], why) for why in reasons]
    rows += [("PEFT's config", f"`{field}`", why) for field, why in peft._REFUSED.items()]
    rows += [
        ("PEFT's config", f"`peft_type` other than {', '.join(peft._KINDS)}", "its updates have no factorization here"),
        ("PEFT's config", "`bias` other than `none`", "PEFT stores the base's biases then, not what changed"),
        ("PEFT's config", "`init_lora_weights` such as `pissa`, `olora`", "it changes the base's weights"),
        ("PEFT", "a grouped convolution with LoRA", "its A sees all channels, so the update is of another shape"),
        ("any", "DoRA beside layers of another method", "an adapter has one factorization, and DoRA has no other form"),
        ("any", "a scale that nobody states, or two do", "`alpha=` states it; two are a contradiction"),
    ]
    return _section("Refused, in one line that names the key", ("where", "what", "why"), rows)


def _unwritable() -> str:
    """What cannot be written, and why."""
    modules = {"peft": import_module("test_peft"), "locon": import_module("test_locon")}
    rows = [
        (format, case, re.sub(r"\\", "", entry[-1]))
        for format, module in modules.items()
        for case, entry in module.UNWRITABLE.items()
    ]
    return _section("Not written", ("format", "case", "the message says"), rows)


def _texts() -> str:
    """What a format is, by its module."""
    parts = ["## The formats", ""]
    for name in ("adapter.file", "formats.peft", "formats.locon", "formats.updates", "formats.loralib"):
        module: Any = import_module(f"convlora.{name}")
        parts += [f"### `convlora.{name}`", "", inspect.cleandoc(module.__doc__ or ""), ""]
    return "\n".join(parts)


def _section(title: str, head: Sequence[str], rows: Iterable[Sequence[str]], text: str = "") -> str:
    return "\n".join([f"## {title}", "", *([text] if text else []), _table(head, rows), ""])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def main(arguments: list[str]) -> str | None:
    """What is wrong, if anything."""
    if arguments == ["--check"]:
        fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        return None if fresh else f"{PAGE} is stale: python docs/make_formats.py"
    PAGE.write_text(page(), encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
