"""Imports point one way, and importing the library is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import convlora

PACKAGE = Path(convlora.__file__).parent
# The law of the house: a room imports from the floors below its own. adapter and layer do not know each other: the one
# is a file in memory, the other a module in a network; model brings them together.
FLOORS = (
    ["errors"],
    ["support"],
    ["factors"],
    ["config"],
    ["adapter", "layer"],
    ["targets"],
    ["model"],
    ["inspect", "distill", "formats", "card", "integrations"],
    ["hub"],
    ["cli"],
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FACE = {"", "__main__"}  # the package's own names, and the command


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(module: str) -> set[str]:
    """The modules of this library that one imports, anywhere in it, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: imports are absolute"
            origin = node.module or ""
            names = [f"{origin}.{alias.name}" for alias in node.names]
            names = [name if name.partition(".")[2] in MODULES else origin for name in names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.partition(".")[2] for name in names if name.partition(".")[0] == "convlora"}
    return found - {module}


@pytest.mark.parametrize("module", [module for module in MODULES if module not in FACE])
def test_imports_go_down_from_room_to_room(module: str) -> None:
    room = module.partition(".")[0]
    assert room in FLOOR, f"give {room} its floor"
    for other in imports(module):
        below = other.partition(".")[0]
        if below in FACE:
            assert room == "cli", f"{module} imports the package's own names"
            continue
        assert below == room or FLOOR[below] < FLOOR[room], f"{module} imports {other}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    # A package that only hands names on (its __init__) stands above what it names, and below those who ask it.
    ahead = {module: imports(module) for module in MODULES}
    while free := [module for module, others in ahead.items() if not others & ahead.keys()]:
        for module in free:
            del ahead[module]
    assert not ahead, f"a circle among {sorted(ahead)}"


def test_no_function_imports_from_the_library() -> None:
    for module, path in MODULES.items():
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for node in ast.walk(function):
                    origin = getattr(node, "module", "") or ""
                    assert not (isinstance(node, ast.ImportFrom) and origin.startswith("convlora")), (module, origin)


def test_beside_the_rooms_are_few_files() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.is_file()]) <= 10


def test_every_public_name_has_a_runnable_example() -> None:
    for name, value in vars(convlora).items():
        if not name.startswith("_") and getattr(value, "__module__", "").startswith("convlora"):
            assert ">>>" in (value.__doc__ or ""), name


def test_public_names_are_those_of_the_contract() -> None:
    public = {n for n, v in vars(convlora).items() if not n.startswith("_") and hasattr(v, "__module__")}
    assert public == {
        "inject", "remove", "merge", "unmerge", "merged", "disabled", "activate", "per_sample", "adapters",
        "parameters", "summary", "audit", "allocate_ranks", "save", "load", "adapter", "AdapterConfig", "Adapter",
        "register_factors", "using", "merged_state_dict", "freeze", "changed", "parameter_groups", "ConvLoRAError",
        "ConvLoRAWarning",
    }  # fmt: skip


def test_importing_loads_no_command_line_and_no_example_library() -> None:
    code = "import sys, torch; before = set(sys.modules); import convlora; print(*sorted(set(sys.modules) - before))"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    outside = {name.partition(".")[0] for name in loaded} - {"convlora", "torch"}
    assert outside <= {"safetensors", "einops", "tempfile", "difflib", "_hashlib", "hashlib"} | sys.stdlib_module_names
    assert not {"typer", "rich", "numpy.testing", "torch._dynamo"} & set(loaded)
