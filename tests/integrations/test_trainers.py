"""The tests of each trainer, in a process of its own: these packages change PyTorch's settings for a whole process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.mark.parametrize("cases", sorted(path.stem for path in HERE.glob("*_cases.py")))
def test_in_a_process_of_its_own(cases: str) -> None:
    package = cases.removesuffix("_cases")
    if package != "recipe":
        imported = subprocess.run(
            [sys.executable, "-c", f"import {package}"], capture_output=True, text=True, check=False
        )
        if imported.returncode:
            pytest.skip(imported.stderr.strip().splitlines()[-1])
    paths = [HERE / f"{cases}.py", ROOT / "convlora" / "integrations" / f"{package}.py"]
    options = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts=", "--doctest-modules", "-rs"]
    command = [sys.executable, "-m", "pytest", *options, *(str(path) for path in paths if path.exists())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
