"""Seeds and threads: the same numbers at every run."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parents[1]))  # `benchmarks` can be imported

settings.register_profile("convlora", deadline=None, derandomize=True)  # shared machines are slow at times
settings.load_profile("convlora")

# Processes that test side by side share the cores.
torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
