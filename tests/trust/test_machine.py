"""The state machine of `benchmarks/trust` at a small count, and that it finds what it looks for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.trust import machine
from convlora.layer import slot
from convlora.layer.copies import TensorCopies
from convlora.layer.lowrank import LowRank
from convlora.layer.slot import Slot


def test_random_lives_agree_with_a_dense_oracle() -> None:
    done = machine.run(steps=500, length=25)
    assert done["(weights)"] >= 7 * 500
    assert len(done) > 12  # operations of many sorts


def _off_by_some_ulp(fuse: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda weight, updates: fuse(weight, updates) * (1 + 2**-17)


def _doubles_strengths(restore: Callable[..., None]) -> Callable[..., None]:
    return lambda self, state: restore(self, ({name: 2 * strength for name, strength in state[0].items()}, *state[1:]))


def _halves(copy_: Callable[..., None]) -> Callable[..., None]:
    return lambda self, factors: copy_(self, {name: t.bfloat16().to(t.dtype) for name, t in factors.items()})


FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "an effective weight off by some ulp": (slot, "fuse_weight", _off_by_some_ulp),
    "a context manager that brings back other strengths": (Slot, "restore", _doubles_strengths),
    "a file whose factors lose digits": (LowRank, "copy_", _halves),
    "a mixture of copies off by some ulp": (slot, "difference", lambda f: lambda *a: f(*a) * (1 + 2**-17)),
    "copies that a hot swap leaves": (TensorCopies, "copy_", lambda f: lambda self, values: None),
    "statistics that move though frozen": (Slot, "freezes_statistics", lambda f: lambda self: False),
    "an unmerge that forgets what was active": (Slot, "unmerge", lambda f: lambda self: setattr(self, "merged", False)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_machine_finds(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, name, broken = FAULTS[fault]
    monkeypatch.setattr(where, name, broken(getattr(where, name)))
    with pytest.raises(AssertionError):
        machine.run(steps=20_000, length=25, shrink=False)  # ends with the first that it finds


def test_the_oracle_says_what_a_stock_network_computes() -> None:
    from benchmarks.trust.dense import INPUT_SHAPE, Oracle, OracleNet

    net, oracle, x = OracleNet().double(), Oracle(torch.float64), torch.randn(INPUT_SHAPE, dtype=torch.float64)
    oracle.take_base(net.state_dict())
    y, bound = oracle.output(x)
    assert bool(((net(x) - y).abs() <= bound).all())
    assert float(bound.max()) < 1e-10
