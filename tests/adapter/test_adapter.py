"""`Adapter`: factors without a model."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import FACTORS, NET_LAYERS, PRODUCTS, adapted_net, change, net
from torch import nn

import convlora
from convlora.adapter.adapter import Adapter
from convlora.adapter.parts import LayerFactors
from convlora.factors.base import WeightSpec
from convlora.layer.adapted import slot_of


@pytest.mark.parametrize("factors", FACTORS)
def test_delta_is_the_naive_one_with_its_scale(factors: str) -> None:
    model = adapted_net(factors=factors, rank=2, alpha=6)
    adapter, base = convlora.adapter(model), model.state_dict()
    for path, layer in adapter.layers.items():
        expected = change(factors, dict(layer.tensors), layer.spec, 3.0, base[f"{path}.weight"])
        found = adapter.delta(path, base[f"{path}.weight"])
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
        assert found.dtype == torch.float32


def test_delta_of_an_unknown_layer_names_the_known_ones() -> None:
    with pytest.raises(convlora.ConvLoRAError, match="no layer 'x'; the adapter has '0', '3', '4', '6'"):
        convlora.adapter(adapted_net()).delta("x")


def test_an_adapter_is_detached_from_its_model() -> None:
    model = adapted_net()
    adapter = convlora.adapter(model)
    before = copy.deepcopy(dict(adapter.layers["0"].tensors))
    with torch.no_grad():
        for p in convlora.parameters(model):
            p.zero_()
    assert all(torch.equal(adapter.layers["0"].tensors[name], value) for name, value in before.items())
    assert not adapter.layers["0"].tensors["lora_A"].requires_grad


@pytest.mark.parametrize("strength", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factors", FACTORS)
def test_apply_to_a_checkpoint_is_bitwise_merge(factors: str, dtype: torch.dtype, strength: float) -> None:
    model = adapted_net(factors=factors, rank=2, alpha=3, bias=True).to(dtype)
    adapter = convlora.adapter(model)
    base = OrderedDict((k, v) for k, v in model.state_dict().items() if ".convlora." not in k)
    given = {key: value.clone() for key, value in base.items()}
    applied = adapter.apply_to(base, strength=strength)
    convlora.activate(model, {"default": strength})
    convlora.remove(convlora.merge(model))
    assert list(applied) == list(base) == list(model.state_dict())
    assert all(torch.equal(applied[key], value) for key, value in model.state_dict().items())
    assert all(applied[key].dtype == value.dtype for key, value in base.items())
    assert all(torch.equal(base[key], value) for key, value in given.items())


def test_apply_to_keeps_other_entries_and_the_metadata() -> None:
    model = adapted_net()
    state = net().state_dict()
    state["note"] = "anything"  # type: ignore[assignment]
    applied = convlora.adapter(model).apply_to(state)
    assert applied["note"] == "anything"
    assert applied["1.running_mean"] is state["1.running_mean"]
    assert applied._metadata == state._metadata  # type: ignore[attr-defined]


def test_apply_to_reaches_every_name_of_a_shared_module() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = convlora.inject(nn.Sequential(shared, nn.ReLU(), shared), "0", rank=1)
    with torch.no_grad():
        for p in convlora.parameters(model):
            p.normal_()
    adapter, state = convlora.adapter(model), convlora.remove(copy.deepcopy(model)).state_dict()
    applied = adapter.apply_to(state)
    assert torch.equal(applied["0.weight"], applied["2.weight"])
    assert torch.equal(applied["0.weight"], model[0].weight)


def test_apply_to_lists_all_that_does_not_fit() -> None:
    adapter, state = convlora.adapter(adapted_net(bias=True)), net().state_dict()
    del state["3.weight"]
    state["6.bias"] = torch.zeros(7)
    with pytest.raises(
        convlora.ConvLoRAError, match=r"missing: 3\.weight; mismatched: 6\.bias \(7,\) instead of \(5,\)"
    ):
        adapter.apply_to(state)


def test_construction_lists_all_that_is_wrong() -> None:
    config, spec = convlora.AdapterConfig(targets="*"), WeightSpec((4, 4, 3, 3))
    nan = torch.full((4, 12), float("nan"))
    layers = {
        "a": LayerFactors({"lora_A": torch.zeros(3, 12)}, spec, 1, 1.0),
        "b": LayerFactors({"lora_A": torch.zeros(3, 9), "lora_B": torch.zeros(12, 3), "x": nan}, spec, 1, 1.0),
        "c": LayerFactors({"lora_A": nan[:3], "lora_B": torch.zeros(12, 3).int()}, spec, 1, 1.0),
    }
    with pytest.raises(convlora.ConvLoRAError) as caught:
        Adapter(config, layers)
    assert str(caught.value) == (
        "Adapter: missing: a.lora_B; unexpected: b.x; mismatched: b.lora_A (3, 9) instead of (3, 12), "
        "c.lora_B torch.int32 instead of floating point; non-finite: c.lora_A"
    )


def test_to_casts_and_refuses_overflow(tmp_path: Path) -> None:
    model = adapted_net()
    half = convlora.adapter(model).to(torch.float16)
    assert {t.dtype for layer in half.layers.values() for t in layer.tensors.values()} == {torch.float16}
    with torch.no_grad():
        slot_of(model[0]).low_rank("default").lora_A.fill_(1e6)
    with pytest.raises(convlora.ConvLoRAError, match=r"non-finite: 0\.lora_A"):
        convlora.adapter(model).to(torch.float16)
    with pytest.raises(convlora.ConvLoRAError, match=r"non-finite: 0\.lora_A"):
        convlora.save(model, tmp_path / "half.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())
    with pytest.raises(convlora.ConvLoRAError, match="floating point dtype"):
        half.to(torch.int8)


def small(factors: str, scale: float, layers: tuple[str, ...] = ("0", "6"), **options: Any) -> Adapter:
    """An adapter of which two layers have a large A and a B of some size; the other layers' ΔW are comparable."""
    model = adapted_net(factors=factors, rank=1, **options)
    with torch.no_grad():
        for path in NET_LAYERS:
            sizes = {"lora_A": 1e3, "lora_B": scale} if path in layers else {"lora_A": 0.02, "lora_B": 0.02}
            for name, p in slot_of(model.get_submodule(path)).low_rank("default").factors().items():
                p.mul_(sizes[name] / p.abs().max())
    return convlora.adapter(model)


def naive_share(before: Adapter, after: Adapter, layers: Iterable[str]) -> float:
    lost = sum(float((before.delta(path).double() - after.delta(path).double()).square().sum()) for path in layers)
    return (lost / sum(float(before.delta(path).double().square().sum()) for path in layers)) ** 0.5


@pytest.mark.parametrize("factors", PRODUCTS)
@pytest.mark.parametrize("scale", [1e-8, 3e-7])
def test_what_underflows_is_told_by_its_share(factors: str, scale: float, tmp_path: Path) -> None:
    adapter = small(factors, scale)
    with pytest.warns(convlora.ConvLoRAWarning, match="Adapter.to: values too small for float16") as seen:
        half = adapter.to(torch.float16)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    share, worst, path = re.search(r"ΔW by (\S+)%, '(\d)' by (\S+)% and 2 in all", str(seen[0].message)).group(1, 3, 2)  # type: ignore[union-attr]
    assert float(share) == pytest.approx(100 * naive_share(adapter, half, adapter.layers), abs=0.05)
    assert path == max(("0", "6"), key=lambda name: naive_share(adapter, half, [name]))
    assert float(worst) == pytest.approx(100 * naive_share(adapter, half, [path]), abs=0.05)
    adapter.to(torch.bfloat16)  # warnings are errors in tests
    model = convlora.load(net(), replace(adapter, fingerprint=None))
    with pytest.warns(convlora.ConvLoRAWarning, match="save: values too small for float16") as seen:
        convlora.save(model, tmp_path / "half.safetensors", dtype=torch.float16)
    assert seen[0].filename == __file__


def test_of_copies_and_bias_deltas_what_underflows_is_told() -> None:
    adapter = convlora.adapter(adapted_net(bias=True, modules_to_save="1"))
    tensors = {**adapter.layers["3"].tensors, "lora_bias": torch.full((8,), 1e-9)}
    bias = replace(adapter, layers={**adapter.layers, "3": replace(adapter.layers["3"], tensors=tensors)})
    with pytest.warns(convlora.ConvLoRAWarning, match=r"ΔW by 0\.0\d%, '3\.lora_bias' by 100\.00% and 1 in all"):
        bias.to(torch.float16)
    copied = replace(adapter, modules={"1": {**adapter.modules["1"], "running_var": torch.full((8,), 1e-9)}})
    with pytest.warns(convlora.ConvLoRAWarning, match=r"'1\.running_var' by 100\.00%"):
        copied.to(torch.float16)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factors", PRODUCTS)
def test_rounding_alone_alarms_nobody(factors: str, dtype: torch.dtype) -> None:
    adapter = small(factors, 1e-2)
    assert naive_share(adapter, adapter.to(dtype), adapter.layers) < 0.005


def test_a_rank_component_that_is_lost_is_found_beside_large_ones() -> None:
    """Its row of A is small beside the others, and its column of B so large that it makes most of ΔW."""
    model = convlora.inject(nn.Sequential(nn.Linear(40, 30)), "0", rank=4)
    with torch.no_grad():
        factors = slot_of(model[0]).low_rank("default")
        factors.lora_A.normal_()[0].mul_(1e-8)
        factors.lora_B.normal_()[:, 0].mul_(5e4 / 4)
        factors.lora_B[:, 1:] *= 1e-5
    with pytest.warns(convlora.ConvLoRAWarning, match=r"too small for float16 change ΔW by \d\d"):
        convlora.adapter(model).to(torch.float16)


def test_a_name_is_needed_among_several() -> None:
    model = convlora.inject(adapted_net(name="a"), "0", rank=1, name="b")
    with pytest.raises(convlora.ConvLoRAError, match=r"the model has adapters \['a', 'b'\]; say which"):
        convlora.adapter(model)
    assert list(convlora.adapter(model, "a").layers) == NET_LAYERS
    assert list(convlora.adapter(model, "b").layers) == ["0"]
