"""Seeds and threads: the same numbers at every run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

settings.register_profile("convlora", deadline=None, derandomize=True)  # shared machines are slow at times
settings.load_profile("convlora")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
