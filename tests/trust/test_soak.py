"""The soak of `benchmarks/trust` at a small count: what lives afterwards, no times."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.trust import soak
from benchmarks.trust.soak import KINDS, RARE
from convlora.layer.adapted import adapted_class


def test_nothing_piles_up_over_lives() -> None:
    before, after, _, _, done = soak.soak(cycles=30)
    assert done["cycles"] == soak.WARM_UP + 30
    assert all(done[name] >= 5 for name in RARE)
    assert not {kind: (before[kind], after[kind]) for kind in (*KINDS, "hooks") if after[kind] > before[kind]}
    assert after["objects"] - before["objects"] < 20


LEAKS = {
    "tensors": lambda: torch.zeros(1),
    "modules": lambda: nn.Identity(),
    "hooks": lambda: nn.modules.module.register_module_forward_hook(lambda *_: None),
    "classes": lambda: adapted_class(type("Own", (nn.Conv2d,), {})),
}


def test_the_census_sees_what_is_kept() -> None:
    before = soak.census()
    kept = {kind: leak() for kind, leak in LEAKS.items()}
    grown = soak.census()
    kept["hooks"].remove()
    assert all(grown[kind] > before[kind] for kind in LEAKS)
