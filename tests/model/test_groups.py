"""`parameter_groups`: every trainable Parameter once, and LoRA+'s rates."""

from __future__ import annotations

import pytest
import torch
from oracle import FACTORS, NET_INPUT, NET_LAYERS, net
from torch import nn

import convlora
from convlora import ConvLoRAError, parameter_groups
from convlora.factors.base import growing_factors

pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")


def several() -> nn.Sequential:
    """Two adapters, one with bias updates, one with copies of the norm and the head."""
    model = convlora.inject(net(), NET_LAYERS, rank=1, bias=True, name="night")
    return convlora.inject(model, ["0", "3"], rank=2, name="rain", factors="locon", modules_to_save=["1", "6"])


def names(model: nn.Module, group: dict) -> set[str]:
    known = {p: name for name, p in model.named_parameters()}
    return {known[p] for p in group["params"]}


def test_each_trainable_parameter_is_in_one_group() -> None:
    model = several()
    for name in (None, "night", "rain"):
        grouped = [p for group in parameter_groups(model, 1e-3, name=name) for p in group["params"]]
        assert len(grouped) == len(set(grouped))
        assert set(grouped) == set(convlora.parameters(model, name))


def test_groups_are_named_after_adapter_and_kind_and_hold_it() -> None:
    model = several()
    groups = {group["name"]: names(model, group) for group in parameter_groups(model, 1e-3)}
    assert list(groups) == ["night.A", "night.B", "night.bias", "rain.A", "rain.B", "rain.copies"]
    assert groups["night.A"] == {f"{layer}.convlora.night.lora_A" for layer in NET_LAYERS}
    assert groups["night.B"] == {f"{layer}.convlora.night.lora_B" for layer in NET_LAYERS}
    assert groups["night.bias"] == {f"{layer}.convlora.night.lora_bias" for layer in NET_LAYERS}
    assert groups["rain.B"] == {"0.convlora.rain.lora_B", "3.convlora.rain.lora_B"}
    assert groups["rain.copies"] == {f"{module}.convlora.rain.{t}" for module in "16" for t in ("weight", "bias")}


def test_rates_are_those_of_lora_plus() -> None:
    model = several()
    rates = {g["name"]: g["lr"] for g in parameter_groups(model, lr=1e-3, ratio=16, copies_lr=1e-4)}
    assert rates == {
        "night.A": 1e-3,
        "night.B": 1.6e-2,
        "night.bias": 1e-3,
        "rain.A": 1e-3,
        "rain.B": 1.6e-2,
        "rain.copies": 1e-4,
    }
    assert {g["lr"] for g in parameter_groups(model, lr=1e-3, ratio=1)} == {1e-3}


def test_an_optimizer_steps_b_by_its_own_rate() -> None:
    """Adam's first step moves each element by its rate."""
    model = convlora.inject(net(), NET_LAYERS, rank=1)
    optimizer = torch.optim.Adam(parameter_groups(model, lr=1e-4, ratio=8), eps=0)
    with torch.no_grad():
        for p in convlora.parameters(model):
            p.normal_()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(torch.randn(NET_INPUT)).square().mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        moved = (p - before[name]).abs().max().item()
        expected = 8e-4 if name.endswith("lora_B") else 1e-4 if name.endswith("lora_A") else 0
        assert moved == pytest.approx(expected, rel=1e-2), name


def test_tied_copies_are_in_one_group_once() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    model[2].weight = model[1].weight
    convlora.inject(model, "0", rank=1, modules_to_save=["1", "2"])
    copies = next(g for g in parameter_groups(model, 1e-3) if g["name"] == "default.copies")
    assert len(copies["params"]) == len(set(copies["params"])) == 3


def test_what_is_frozen_is_in_no_group() -> None:
    model = several()
    model[0].convlora.night.lora_A.requires_grad_(False)
    groups = parameter_groups(model, 1e-3)
    assert model[0].convlora.night.lora_A not in {p for group in groups for p in group["params"]}


@pytest.mark.parametrize("factors", FACTORS)
def test_the_factors_that_grow_are_those_that_start_at_zero(factors: str) -> None:
    model = convlora.inject(nn.Sequential(nn.Conv2d(16, 16, 3), nn.Linear(4, 4)), "*", rank=1, factors=factors)
    zero = {name.rpartition(".")[2] for name, p in model.named_parameters() if ".convlora." in name and not p.any()}
    assert growing_factors(factors) == (zero if factors != "dense" else set())  # beside it there is nothing


def test_a_registered_factorization_is_asked_by_its_start() -> None:
    class Flat:  # one full update: nothing beside it that does not start at zero
        inits = ("default",)

        def shapes(self, spec, rank):
            return {"whole": spec.shape}

        def init_(self, factors, method):
            nn.init.zeros_(factors["whole"])

        def delta(self, factors, spec):
            return factors["whole"]

        def drop(self, factors, keep):
            return dict(factors)

    convlora.register_factors("test-flat", Flat)
    model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), "*", rank=1, factors="test-flat")
    assert [(g["name"], g["lr"]) for g in parameter_groups(model, 1e-3)] == [("default.A", 1e-3)]


@pytest.mark.parametrize(
    "wrong", [{"lr": 0}, {"lr": -1.0}, {"lr": float("nan")}, {"ratio": 0}, {"ratio": "16"}, {"copies_lr": -1}]
)
def test_a_rate_that_is_no_positive_number_is_refused(wrong: dict) -> None:
    (label,) = wrong
    with pytest.raises(ConvLoRAError, match=f"parameter_groups: {label} "):
        parameter_groups(several(), **{"lr": 1e-3, **wrong})


def test_an_unknown_adapter_and_a_plain_model_are_refused() -> None:
    with pytest.raises(ConvLoRAError, match="no adapter 'fog'"):
        parameter_groups(several(), 1e-3, name="fog")
    with pytest.raises(ConvLoRAError, match="has no adapters"):
        parameter_groups(net(), 1e-3)
