"""`python docs/make_api.py` writes `docs/api.md`: the public names with their signatures, from the docstrings.

With `--check` it writes nothing, and exits with 1 if the page is stale.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("api.md")
WIDTH = 110
SECTIONS = [  # title, module, names
    ("Adapters on a model", "convlora", (
        "inject", "remove", "merge", "unmerge", "merged", "disabled", "activate", "using", "per_sample",
        "adapters", "parameters", "parameter_groups", "freeze", "changed", "summary", "audit", "allocate_ranks",
    )),
    ("Adapters as files and values", "convlora", (
        "save", "load", "merged_state_dict", "adapter", "Adapter", "AdapterConfig",
    )),
    ("Errors", "convlora", ("ConvLoRAError", "ConvLoRAWarning")),
    ("Distillation", "convlora.distill", (
        "Distiller", "Distilled", "spatial_affinity", "channel_affinity", "instance_affinity", "attention", "l1", "mse",
        "register_loss",
    )),
    ("Other formats", "convlora.formats", ("detect", "read", "write", "specs_of", "specs_from_checkpoint")),
    ("Sharing", "convlora.card", ("write",)),
    ("", "convlora.hub", ("push", "pull")),
    ("Factorizations", "convlora", ("register_factors",)),
    ("", "convlora.factors", ("Factorization", "ConvLoRAFactors", "LoConFactors", "WeightSpec")),
    ("What calls give", "convlora.inspect.report", ("Summary", "LayerSummary", "Audit", "LayerAudit")),
    ("", "convlora.adapter", ("LayerFactors",)),
]  # fmt: skip


def page() -> str:
    """The whole page."""
    lines = ["# API", "", "Written by `python docs/make_api.py` from the docstrings: change those.", ""]
    for title, module, names in SECTIONS:
        lines += [f"## {title}", ""] if title else []
        for name in names:
            lines += [*_entry(f"{module}.{name}", getattr(import_module(module), name), "###"), ""]
    return "\n".join(lines).rstrip() + "\n"


def _entry(name: str, value: Any, heading: str) -> Iterator[str]:
    yield from (f"{heading} {name}", "", "```python", _signature(name, value), "```", "")
    yield "\n".join(_described(value)).rstrip()
    for method, function in _methods(value) if inspect.isclass(value) else ():
        yield from ("", *_entry(f"{name}.{method}", function, "####"))


def _methods(kind: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(kind).items():
        if name == "__call__" or not name.startswith("_"):
            function = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if inspect.isfunction(function) and inspect.getdoc(function):
                yield name, function
            elif isinstance(value, property) and inspect.getdoc(value):
                yield name, value


def _signature(name: str, value: Any) -> str:
    if isinstance(value, property):
        return f"{name}: {inspect.signature(value.fget).return_annotation}"  # type: ignore[arg-type]
    if inspect.isclass(value) and (issubclass(value, Exception) or inspect.isabstract(value) or _is_protocol(value)):
        return f"class {name}({value.__bases__[0].__name__})"
    signature = inspect.signature(value)
    parameters = list(signature.parameters.values())
    if parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    parts, keyword_only = [], False
    for p in parameters:
        if p.kind is p.KEYWORD_ONLY and not keyword_only:
            keyword_only = True
            parts.append("*")
        keyword_only |= p.kind is p.VAR_POSITIONAL
        parts.append(_parameter(p))
    gives = "" if inspect.isclass(value) else f" -> {signature.return_annotation}"
    if inspect.isgeneratorfunction(inspect.unwrap(value)):
        gives = gives.replace("Iterator", "AbstractContextManager")
    start = f"class {name}" if inspect.isclass(value) else name
    line = f"{start}({', '.join(parts)}){gives}"
    return line if len(line) <= WIDTH else "\n".join([f"{start}(", *(f"    {part}," for part in parts), f"){gives}"])


def _is_protocol(kind: type) -> bool:
    return bool(getattr(kind, "_is_protocol", False))


def _parameter(p: inspect.Parameter) -> str:
    stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
    text = f"{stars}{p.name}: {p.annotation}"
    if p.default is p.empty:
        return text
    return f"{text} = {'…' if 'factory' in repr(p.default) else repr(p.default)}"


def _described(value: Any) -> Iterator[str]:
    """The docstring as Markdown: what is indented below `Args:` and the like becomes a list, an example code."""
    lines = (inspect.getdoc(value) or "").splitlines()
    while lines:
        line = lines.pop(0)
        if line not in ("Args:", "Attributes:", "Raises:", "Example:"):
            yield line
            continue
        body = []
        while lines and (not lines[0] or lines[0].startswith(" ")):
            body.append(lines.pop(0).removeprefix("    "))
        text = "\n".join(body).rstrip()
        yield from ("```python", text, "```", "") if line == "Example:" else (line, "", _items(text), "")


def _items(text: str) -> str:
    """A line `name: words`, and further ones that are indented, as an item."""
    text = re.sub(r"\n +", "\n  ", text)
    return re.sub(r"^(\w+(?:, \w+)*):", r"- `\1`:", text, flags=re.MULTILINE)


def main(arguments: list[str]) -> str | None:
    """What is wrong, if anything."""
    if arguments == ["--check"]:
        fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        return None if fresh else f"{PAGE} is stale: python docs/make_api.py"
    PAGE.write_text(page(), encoding="utf-8")
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
