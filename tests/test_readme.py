"""The README's code runs, its links point at files, and its commands are those that run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    written = [".pth"] * code.count("torch.save(") + [".safetensors"] * code.count("convlora.save(")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == written


def test_links_point_at_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_there_is_one_test_command_and_it_is_what_ci_runs() -> None:
    assert README.count("<!-- tests -->") == 1
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()
