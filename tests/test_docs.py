"""The API page is that of the code, and what the documents name is there."""

from __future__ import annotations

import ast
import configparser
import doctest
import importlib
import importlib.util
import inspect
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch

import convlora

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.stem for path in (ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    *("README.md", "SECURITY.md", "benchmarks/README.md", "examples/weights/README.md"),
    *(f"docs/{page}.md" for page in PAGES),
]
ELSEWHERE = {"api": "doctests of the package", "trainers": "tests/integrations", "formats": "generated"}
WITH_CODE = [
    page for page in PAGES if page not in ELSEWHERE and "```python" in (ROOT / "docs" / f"{page}.md").read_text("utf-8")
]
TRAINERS = [f"convlora.integrations.{name}" for name in ("lightning", "transformers", "ultralytics")]  # see there
MODULES = [
    "convlora",
    *(m.name for m in pkgutil.walk_packages(convlora.__path__, "convlora.")),
]
MODULES = [name for name in MODULES if "__main__" not in name and name not in TRAINERS]


def make_api() -> ModuleType:
    return script("make_api")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def setup() -> configparser.ConfigParser:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return settings


def test_the_api_page_is_what_its_script_writes() -> None:
    page = make_api().page()
    assert (ROOT / "docs" / "api.md").read_text(encoding="utf-8") == page, "python docs/make_api.py"


def test_the_page_of_formats_is_what_its_script_writes() -> None:
    page = script("make_formats").page()
    assert (ROOT / "docs" / "formats.md").read_text(encoding="utf-8") == page, "python docs/make_formats.py"
    rows = re.findall(r"^\| (?:convlora|peft|locon|loralib|diffusers) \|.*\| (test_\w+) \|$", page, re.MULTILINE)
    assert len(rows) > 50
    assert all(list((ROOT / "tests").rglob(f"{name}.py")) for name in rows)


def test_a_stale_page_of_formats_is_told(tmp_path: Path) -> None:
    formats = script("make_formats")
    formats.PAGE = tmp_path / "formats.md"
    assert "is stale" in formats.main(["--check"])
    formats.main([])
    assert formats.main(["--check"]) is None
    formats.PAGE.write_text(formats.PAGE.read_text().replace("dora", "lora"))
    assert "is stale" in formats.main(["--check"])


def test_a_stale_api_page_is_told(tmp_path: Path) -> None:
    script = make_api()
    script.PAGE = tmp_path / "api.md"
    assert "is stale" in script.main(["--check"])
    script.main([])
    assert script.main(["--check"]) is None
    script.PAGE.write_text(script.PAGE.read_text().replace("inject", "infect"))
    assert "is stale" in script.main(["--check"])


def public(module: ModuleType) -> set[str]:
    """The names that a module gives on purpose: all of a package, what is defined in a file."""
    names = {name: value for name, value in vars(module).items() if not name.startswith("_") and callable(value)}
    own = {n for n, value in names.items() if str(getattr(value, "__module__", "")).startswith(module.__name__)}
    return {f"{module.__name__}.{name}" for name in own}


def test_the_api_page_has_every_public_name() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^### (\S+)$", page, re.MULTILINE)
    assert len(listed) == len(set(listed))
    names = public(convlora) | public(convlora.distill) | public(convlora.hub)
    names |= {f"convlora.formats.{n}" for n in ("read", "write", "detect", "specs_of", "specs_from_checkpoint")}
    assert names <= set(listed), names - set(listed)
    for name in listed:
        module, _, attribute = name.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_of_the_library_in_documents_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for name in set(re.findall(r"\bconvlora((?:\.[a-zA-Z]\w*)+)\(", text)):
        value: object = convlora
        for part in name[1:].split("."):
            value = (
                getattr(value, part)
                if hasattr(value, part)
                else importlib.import_module(f"convlora{name.rpartition('.')[0]}")
            )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_documents_name_scripts_options_and_extras_that_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8").replace("\\\n", " ")
    for script, rest in re.findall(r"\b(?:python|\d) (\S+\.py)([^`#\n|(;&]*)", text):
        path = next((p for p in (ROOT / script, ROOT / "benchmarks" / script) if p.exists()), None)
        assert path is not None, script
        source = "".join(p.read_text() for p in (path, *path.parent.glob("*.py"), *path.parent.glob("sr/*.py")))
        for option in re.findall(r"--([a-z][a-z-]*)", rest):
            assert option in source or option.replace("-", "_") in source, f"{script} --{option}"
    extras = setup()["options.extras_require"]
    for names in re.findall(r"pip install (?:-e )?'?(?:\.|convlora)\[([a-z,]+)\]", text):
        assert set(names.split(",")) <= set(extras), names


@pytest.mark.parametrize("module", MODULES)
def test_every_example_runs_and_none_is_skipped_without_need(module: str) -> None:
    """They run with the tests, by `--doctest-modules` over the package; only those of the Hub need a network."""
    skipped = [
        example.source
        for test in doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(module))
        for example in test.examples
        if example.options.get(doctest.SKIP)
    ]
    assert not skipped or module == "convlora.hub"


def test_examples_are_collected() -> None:
    settings = setup()["tool:pytest"]
    assert "--doctest-modules" in settings["addopts"]
    assert "convlora" in settings["testpaths"].split()


def test_every_public_function_says_what_it_does_and_shows_it() -> None:
    for name in re.findall(
        r"^### (convlora\.(?:distill\.|formats\.|card\.|hub\.)?\w+)$", make_api().page(), re.MULTILINE
    ):
        module, _, attribute = name.rpartition(".")
        doc = inspect.getdoc(getattr(importlib.import_module(module), attribute)) or ""
        assert "Example:" in doc or attribute == "Distilled", name


@pytest.mark.parametrize("page", WITH_CODE)
def test_the_code_of_a_page_runs_in_order(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page}
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), re.DOTALL)
    with warnings.catch_warnings(), torch.random.fork_rng():
        for code in blocks:
            exec(code, names)


def test_the_manual_has_code_on_its_pages() -> None:
    assert {"quickstart", "choosing", "tasks", "training", "adapters", "files", "deployment"} <= set(WITH_CODE)


@pytest.mark.parametrize("page", [page for page in PAGES if page != "api"])
def test_links_of_a_page_point_at_files(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if not link.startswith("http")]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    assert set(PAGES) <= set(re.findall(r"- (\w+)\.md$", navigation, re.MULTILINE))


def test_the_site_builds_and_has_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material", reason="mkdocs-material, the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    for name in public(convlora) | public(convlora.distill) | public(convlora.hub):
        assert name in page, name
    for page in PAGES:
        assert (tmp_path / ("" if page == "index" else page) / "index.html").exists(), page


# --- dependencies ------------------------------------------------------------------------------------------------


def bounds() -> dict[str, str]:
    return dict(line.split(">=") for line in setup()["options"]["install_requires"].split())


def test_every_dependency_has_a_lower_bound_and_the_readme_states_it() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, oldest in bounds().items():
        assert re.search(rf"{name} {re.escape(oldest)}\b", readme), f"{name} {oldest}"
    python = setup()["options"]["python_requires"].removeprefix(">=")
    assert f"Python {python}" in readme


def test_what_the_library_imports_it_declares() -> None:
    imported = {"numpy"}  # by torch, where a tensor's bytes are taken; by the examples
    for path in (ROOT / "convlora").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    optional = {"huggingface_hub", "lightning", "pytorch_lightning", "transformers", "ultralytics"}  # extras, told so
    assert imported - set(sys.stdlib_module_names) - {"convlora"} - optional == set(bounds())


def test_the_script_of_the_bounds_takes_them_from_setup_cfg() -> None:
    command = ["bash", str(ROOT / ".ci" / "bounds"), "--show"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert [f"{name}=={oldest}" for name, oldest in bounds().items()] == shown[: len(bounds())]
