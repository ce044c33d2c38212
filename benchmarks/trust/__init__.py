"""Large counts of what the tests try at small ones: `python -m benchmarks.trust`."""

import sys
from pathlib import Path

# The modules beside this package, and the oracle and the networks of the tests, import each other by name.
sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parents[2] / "tests"))
