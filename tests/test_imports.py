"""Imports point one way, and importing the library is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import convlora

PACKAGE = Path(convlora.__file__).parent
LEVELS = [  # each file imports from lines above its own
    ["errors", "flow", "jsontext", "progress", "table"],
    ["atomic", "formats.parsing", "formats.pickled", "formats.patterns", "sharded", "threads", "truncate"],
    ["config", "factors", "conv"],
    ["rows", "thin"],
    ["lowrank", "adapter"],
    ["slot"],
    ["forms"],
    ["layer", "formats.native"],
    ["algebra", "card", "formats.tensors", "targets", "walk"],
    ["formats.locon", "formats.loralib", "formats.peft", "hub", "specs"],
    ["checkpoint", "files", "formats"],  # its __init__
    ["bake", "switch"],
    ["distill.affinity", "distill.taps"],
    ["distill.losses"],
    ["distill.distiller"],
    ["distill"],  # its __init__
    ["model", "putback"],
    ["probe", "report", "storage"],
    ["allocate"],
    ["__init__"],
    ["cli.architecture", "cli.console", "cli.options"],
    ["cli.inputs"],
    ["cli.look", "cli.make"],
    ["cli.app"],
    ["__main__"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
LATE = {("adapter", late) for late in ("formats", "algebra", "checkpoint")}  # Adapter's thin methods


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "convlora":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("convlora"):
            found.add(node.module.removeprefix("convlora").lstrip(".") or "__init__")
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("convlora")]
            found |= {name.removeprefix("convlora").lstrip(".") or "__init__" for name in names}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent == PACKAGE or path.stem != "__init__")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_imports_point_one_way(path: Path) -> None:
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    assert name in LEVEL, f"give {name} its place"
    for other in imports(path):
        assert (name, other) in LATE or LEVEL[other] < LEVEL[name], f"{name} imports {other}"


def test_every_public_name_has_a_runnable_example() -> None:
    for name, value in vars(convlora).items():
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("convlora"):
            assert ">>>" in (value.__doc__ or ""), name


def test_public_names_are_those_of_the_contract() -> None:
    public = {n for n, v in vars(convlora).items() if not n.startswith("_") and hasattr(v, "__module__")}
    assert public == {
        "inject", "remove", "merge", "unmerge", "merged", "disabled", "activate", "per_sample", "adapters",
        "parameters", "summary", "audit", "allocate_ranks", "save", "load", "adapter", "AdapterConfig", "Adapter",
        "register_factors", "ConvLoRAError", "ConvLoRAWarning",
    }  # fmt: skip


def test_importing_loads_no_command_line_and_no_example_library() -> None:
    code = "import sys, torch; before = set(sys.modules); import convlora; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    outside = {name.partition(".")[0] for name in loaded} - {"convlora", "torch"}
    assert outside <= {"safetensors", "tempfile", "difflib", "_hashlib", "hashlib"} | sys.stdlib_module_names
    assert not {"typer", "rich", "numpy.testing", "torch._dynamo"} & set(loaded)
