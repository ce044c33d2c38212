"""Large counts of what the tests try at small ones: `python -m benchmarks.trust`."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

# The modules beside this package, and the oracle and the networks of the tests, import each other by name.
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.append(str(ROOT / "tests"))


def environment(**settings: str) -> dict[str, str]:
    """Of a process, started in `ROOT`, that imports this checkout as this one does."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, **settings}
