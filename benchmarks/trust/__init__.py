"""Large counts of what the tests try at small ones: `python -m benchmarks.trust`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # the modules beside this package import each other by name
