"""Magnitude pruning, DARE and TIES beside their definitions on one flat vector an adapter, in numpy."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import NETS, adapter, build
from oracle import randomise

import convlora
from convlora import Adapter, ConvLoRAError

pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")
Flat = np.ndarray[Any, np.dtype[np.float64]]


def flat(one: Adapter) -> Flat:
    """All updates of an adapter, and its bias deltas, one after the other, layers by name."""
    parts = []
    for path in sorted(one.layers):
        parts.append(one.delta(path).double().flatten().numpy())
        if "lora_bias" in one.layers[path].tensors:
            parts.append(one.layers[path].tensors["lora_bias"].double().numpy())
    return np.concatenate(parts)


def trimmed(vector: Flat, density: float) -> Flat:
    kept = np.argsort(-np.abs(vector), kind="stable")[: int(np.ceil(density * vector.size))]
    out = np.zeros_like(vector)
    out[kept] = vector[kept]
    return out


def ties(vectors: list[Flat], weights: list[float], density: float) -> Flat:
    weighted = [w * trimmed(v, density) for v, w in zip(vectors, weights, strict=True)]
    elected = np.sign(sum(weighted))
    merged = np.zeros_like(vectors[0])
    for place in range(merged.size):
        chosen = [v[place] for v in weighted if v[place] != 0 and np.sign(v[place]) == elected[place]]
        merged[place] = np.mean(chosen) if chosen else 0.0
    return merged


def magnitude(vectors: list[Flat], weights: list[float], density: float) -> Flat:
    return np.asarray(sum(w * trimmed(v, density) for v, w in zip(vectors, weights, strict=True)))


@pytest.mark.parametrize("density", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("method", ["ties", "magnitude"])
@pytest.mark.parametrize("net", NETS)
def test_methods_are_their_definitions(net: str, method: str, density: float) -> None:
    base, _ = build(net)
    adapters = [adapter(base, rank=rank, alpha=3, bias=True) for rank in (1, 2, 3)]
    weights = [1.0, 0.5, 0.8]
    expected = {"ties": ties, "magnitude": magnitude}[method]([flat(one) for one in adapters], weights, density)
    merged = Adapter.combine(adapters, weights, method=method, density=density)
    assert merged.config.factors == "dense"
    np.testing.assert_allclose(flat(merged), expected, atol=1e-6)


def test_different_layers_and_factorizations_come_together() -> None:
    base, _ = build("2d")
    first = adapter(base, targets="stem", factors="convlora")
    second = adapter(base, targets="*", factors="locon")
    merged = Adapter.combine([first, second], [1, 1], method="magnitude", density=1.0)
    torch.testing.assert_close(merged.delta("stem"), first.delta("stem") + second.delta("stem"))
    torch.testing.assert_close(merged.delta("head"), second.delta("head"))


def test_dare_keeps_the_mean_and_a_share() -> None:
    base, _ = build("2d")
    one = adapter(base)
    exact, runs = flat(one), [flat(Adapter.combine([one], [1], method="dare", density=0.5, seed=i)) for i in range(200)]
    for run in runs[:5]:
        assert np.allclose(run[run != 0], exact[run != 0] * 2, atol=1e-5)
        assert 0.4 < np.mean(run != 0) < 0.6
    spread = np.abs(exact) / np.sqrt(len(runs))
    assert np.mean(np.abs(np.mean(runs, 0) - exact) < 3 * spread + 1e-6) > 0.98
    again = flat(Adapter.combine([one], [1], method="dare", density=0.5, seed=3))
    assert np.array_equal(again, runs[3])
    assert not np.array_equal(runs[0], runs[1])


def test_with_all_kept_magnitude_and_dare_are_the_sum() -> None:
    base, x = build("2d")
    adapters, weights = [adapter(base), adapter(base, rank=1)], [0.6, 0.4]
    expected = Adapter.combine(adapters, weights)
    for method in ("magnitude", "dare"):
        merged = Adapter.combine(adapters, weights, method=method, density=1.0)
        np.testing.assert_allclose(flat(merged), flat(expected), atol=1e-6)
        live = convlora.load(copy.deepcopy(base), merged)
        torch.testing.assert_close(live(x), convlora.load(copy.deepcopy(base), expected)(x), atol=1e-5, rtol=1e-5)


def test_the_result_is_an_adapter_as_any(tmp_path: Path) -> None:
    base, x = build("square")
    adapters = [adapter(base, factors="convlora", rank=2) for _ in range(2)]
    merged = Adapter.combine(adapters, [1, 1], method="ties", density=0.3)
    merged.write(tmp_path / "ties.safetensors")
    model = convlora.load(copy.deepcopy(base), tmp_path / "ties.safetensors")
    y = model(x)
    assert torch.equal(convlora.remove(convlora.merge(model))(x), y)
    low_rank = merged.refactor("locon", rank=2)
    assert low_rank.config.factors == "locon"
    assert max(low_rank.errors.values()) > 0.01


def test_wrong_input_is_one_clear_error() -> None:
    base, _ = build("2d")
    one = adapter(base)
    for options, message in [
        ({"method": "median"}, r"method \(='median'\) must be one of sum, magnitude, dare, ties"),
        ({"method": "ties"}, r"density \(=None\) must be in \(0, 1\]"),
        ({"method": "dare", "density": 0}, r"density \(=0\)"),
        ({"method": "dare", "density": float("nan")}, r"density \(=nan\)"),
        ({"density": 0.5}, "'sum' keeps all"),
    ]:
        with pytest.raises(ConvLoRAError, match=message):
            Adapter.combine([one], [1], **options)  # type: ignore[arg-type]
    dora = convlora.adapter(randomise(convlora.inject(base, "*", rank=1, factors="dora")))
    with pytest.raises(ConvLoRAError, match="dora"):
        Adapter.combine([dora], [1], method="ties", density=0.5)
