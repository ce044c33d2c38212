"""The factorizations: shapes as the papers and their codes have them, and the registry."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import FACTORS, PRODUCTS, change
from strategies import specs
from torch import Tensor, nn

import convlora
from convlora.factors.base import WeightSpec, gains_of, get_factors, needs_weight, start_factors, update_of
from convlora.factors.convlora import ConvLoRAFactors
from convlora.factors.locon import LoConFactors


def random_factors(factors: str, spec: WeightSpec, rank: int) -> dict[str, Tensor]:
    shapes = get_factors(factors).shapes(spec, rank)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


ALL = (*FACTORS, "dora_in")


@given(specs(), st.integers(1, 3), st.sampled_from(ALL))
def test_delta_is_the_naive_one(spec: WeightSpec, rank: int, factors: str) -> None:
    factorization = get_factors(factors)
    tensors = {
        name: torch.randn(shape, dtype=torch.float64) for name, shape in factorization.shapes(spec, rank).items()
    }
    weight = torch.randn(spec.shape, dtype=torch.float64)
    outside, inside = gains_of(0.5, 1.0, needs_weight(factorization))
    ours = update_of(factorization, tensors, spec, inside, weight) * outside
    torch.testing.assert_close(ours, change(factors, tensors, spec, 0.5, weight))


STARTS = [(factors, init) for factors in ALL for init in get_factors(factors).inits]


@given(specs(), st.integers(1, 3), st.sampled_from(STARTS), st.sampled_from([torch.float32, torch.bfloat16]))
def test_every_start_is_a_zero_update(spec: WeightSpec, rank: int, start: tuple[str, str], dtype: torch.dtype) -> None:
    factors, init = start
    factorization = get_factors(factors)
    tensors = {name: torch.full(shape, torch.nan) for name, shape in factorization.shapes(spec, rank).items()}
    weight = torch.randn(spec.shape).to(dtype)
    start_factors(factorization, tensors, init, spec, weight)
    assert bool(update_of(factorization, tensors, spec, 0.3, weight).eq(0).all())
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert factors == "dense" or any(tensor.ne(0).any() for tensor in tensors.values())


@given(specs(), st.integers(1, 3), st.sampled_from([name for name in ALL if name not in ("dora", "dora_in")]))
def test_rank_components_add_up(spec: WeightSpec, rank: int, factors: str) -> None:
    factorization = get_factors(factors)
    tensors = {
        name: torch.randn(shape, dtype=torch.float64) for name, shape in factorization.shapes(spec, rank).items()
    }
    parts = sum(factorization.delta(factorization.drop(tensors, keep), spec) for keep in torch.eye(rank).double())
    torch.testing.assert_close(parts, factorization.delta(tensors, spec))


def test_convlora_shapes_are_those_of_microsoft_lora() -> None:
    """loralib 0.1.2: A (r·k, in·k), B (out//groups·k, r·k)."""
    for layer in (nn.Conv2d(16, 48, 3), nn.Conv2d(16, 48, 5, groups=4), nn.Conv2d(16, 48, 1)):
        (k, _), r = layer.kernel_size, 4
        shapes = {n: tuple(p.shape) for n, p in _factors(layer, "convlora", r).items()}
        assert shapes == {"lora_A": (r * k, 16 * k), "lora_B": (48 // layer.groups * k, r * k)}


def test_locon_shapes_are_those_of_peft() -> None:
    shapes = {n: tuple(p.shape) for n, p in _factors(nn.Conv2d(16, 48, (3, 5)), "locon", 4).items()}
    assert shapes == {"lora_A": (4, 16, 3, 5), "lora_B": (48, 4, 1, 1)}


@pytest.mark.parametrize("factors", PRODUCTS)
def test_linear_and_pointwise_layers_are_plain_lora(factors: str) -> None:
    for layer in (nn.Linear(16, 48), nn.Conv2d(16, 48, 1), nn.Conv3d(16, 48, 1), nn.ConvTranspose2d(16, 48, 1)):
        tensors = _factors(layer, factors, 4)
        assert {n: tuple(p.shape) for n, p in tensors.items()} == {"lora_A": (4, 16), "lora_B": (48, 4)}


def test_default_start_is_kaiming_uniform() -> None:
    for factors, fan_in in (("convlora", 64 * 3), ("locon", 64 * 9)):
        a = _factors(nn.Conv2d(64, 64, 3), factors, 16)["lora_A"]
        bound = 1 / math.sqrt(fan_in)
        assert bound * 0.98 < a.abs().max().item() <= bound


def _factors(layer: nn.Module, factors: str, rank: int) -> Mapping[str, Tensor]:
    return convlora.adapter(convlora.inject(layer, "*", rank=rank, factors=factors)).layers[""].tensors


class Broken(LoConFactors):
    def init_(self, factors: Mapping[str, Tensor], method: str) -> None:
        nn.init.ones_(factors["lora_A"])
        nn.init.ones_(factors["lora_B"])


class BadNames(LoConFactors):
    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, tuple[int, ...]]:
        return {"forward": (1,)}


@pytest.mark.parametrize(
    ("name", "factorization", "message"),
    [
        ("locon", LoConFactors, "'locon' is taken"),
        ("", LoConFactors, "non-empty string"),
        ("half", object, "needs inits, shapes, init_, delta and drop"),
        ("broken", Broken, "does not start at ΔW = 0"),
        ("names", BadNames, "unusable tensor names"),
    ],
)
def test_a_factorization_that_fails_is_not_registered(name: str, factorization: type, message: str) -> None:
    with pytest.raises(convlora.ConvLoRAError, match=message):
        convlora.register_factors(name, factorization)
    with pytest.raises(convlora.ConvLoRAError, match="is not registered"):
        get_factors(f"{name}!")


def test_a_registered_factorization_lives_its_whole_life(tmp_path: object) -> None:
    class Dense:
        """ΔW itself, whatever the rank: full fine-tuning as an adapter."""

        inits = ("default",)

        def shapes(self, spec: WeightSpec, rank: int) -> dict[str, tuple[int, ...]]:
            return {"dense": (rank, spec.out_channels, spec.in_channels // spec.groups, *spec.kernel)}

        def init_(self, factors: Mapping[str, Tensor], method: str) -> None:
            nn.init.zeros_(factors["dense"])

        def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
            return factors["dense"].sum(0)

        def drop(self, factors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
            return {"dense": factors["dense"] * keep.view(-1, *[1] * (factors["dense"].dim() - 1))}

    convlora.register_factors("test-dense", Dense)
    base = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 6, 2, groups=2))
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ConvTranspose2d(4, 6, 2, groups=2))
    model.load_state_dict(base.state_dict())
    convlora.inject(model, "*", rank=1, factors="test-dense")
    with torch.no_grad():
        for p in convlora.parameters(model):
            p.normal_()
    x = torch.randn(1, 4, 6, 6)
    convlora.save(model, f"{tmp_path}/dense.safetensors")
    assert torch.equal(convlora.load(base, f"{tmp_path}/dense.safetensors")(x), model(x))
    assert torch.equal(convlora.remove(convlora.merge(base))(x), model(x))


def test_shapes_of_the_docstring_hold() -> None:
    assert ConvLoRAFactors().shapes(WeightSpec((8, 4, 5)), 2) == {"lora_A": (2, 20), "lora_B": (8, 2)}
    assert ConvLoRAFactors().shapes(WeightSpec((8, 4, 3, 3, 3)), 2) == {"lora_A": (6, 36), "lora_B": (24, 6)}
