"""Faults that once were: each as the shortest way to it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import NET_INPUT, NET_LAYERS, adapted_net, bits, net, randomise, snapshot
from safetensors.torch import save_file
from torch import Tensor, nn

import convlora
from convlora.adapter.file import checksum
from convlora.layer.lowrank import LowRank
from convlora.layer.slot import Slot


def x() -> Tensor:
    return torch.randn(NET_INPUT, generator=torch.Generator().manual_seed(1))


# --- the meta device -------------------------------------------------------------------------------------------


def test_loading_onto_a_model_without_values_is_refused() -> None:
    with torch.device("meta"):
        model = net()
    with pytest.raises(convlora.ConvLoRAError, match="no values yet"):
        convlora.load(model, convlora.adapter(adapted_net()))


def test_a_checkpoint_assigned_to_a_meta_model_brings_its_adapters() -> None:
    source = adapted_net(alpha=3, bias=True).eval()
    with torch.device("meta"):
        model = convlora.inject(net(), NET_LAYERS, rank=1, alpha=3, bias=True).eval()
    model.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(model(x()), source(x()))


# --- numbers ---------------------------------------------------------------------------------------------------

HUGE = [1e39, math.inf, math.nan, 10**400, -(10**30), "1", None, True]


@pytest.mark.parametrize("value", HUGE, ids=str)
def test_numbers_beyond_float32_are_refused_before_anything_changes(value: Any) -> None:
    model = adapted_net()
    before, y = snapshot(model), model.eval()(x())
    model.train()
    with pytest.raises(convlora.ConvLoRAError, match="strength"):
        convlora.activate(model, {"default": value})
    with pytest.raises(convlora.ConvLoRAError, match="strength"):
        convlora.adapter(model).apply_to(model.state_dict(), strength=value)
    if value is not None:
        with pytest.raises(convlora.ConvLoRAError, match="alpha"):
            convlora.inject(model, "0", rank=1, alpha=value, name="b")
    with pytest.raises(convlora.ConvLoRAError, match="rank_dropout"):
        convlora.inject(model, "0", rank=1, rank_dropout=value, name="b")
    adapter = convlora.adapter(model)
    bad = {**adapter.layers, "3": dataclasses.replace(adapter.layers["3"], alpha=value)}
    with pytest.raises(convlora.ConvLoRAError, match="alpha"):
        convlora.load(model, dataclasses.replace(adapter, layers=bad))
    assert snapshot(model) == before
    assert torch.equal(model.eval()(x()), y)


def test_a_rank_beyond_memory_is_one_clear_error() -> None:
    model = net()
    before = snapshot(model)
    for rank in (10**13, 10**30):
        with pytest.raises(convlora.ConvLoRAError, match="no factors of rank"), pytest.warns(convlora.ConvLoRAWarning):
            convlora.inject(model, "0", rank=rank)
    assert snapshot(model) == before


ENTRIES: dict[str, Any] = {
    "alpha NaN": [1, math.nan, [8, 3, 3, 3]],
    "alpha infinite": [1, math.inf, [8, 3, 3, 3]],
    "alpha huge": [1, 10**400, [8, 3, 3, 3]],
    "alpha text": [1, "1", [8, 3, 3, 3]],
    "rank fraction": [1.5, 1, [8, 3, 3, 3]],
    "rank infinite": [math.inf, 1, [8, 3, 3, 3]],
    "shape text": [1, 1, "8333"],
    "shape fraction": [1, 1, [8.5, 3, 3, 3]],
    "shape short": [1, 1, [8]],
    "groups do not divide": [1, 1, [8, 3, 3, 3], 3],
    "an object": {"rank": 1},
    "a number": 3,
    "too short": [1],
}


@pytest.mark.parametrize("case", [*ENTRIES, "a list", "a text", "empty"])
def test_files_with_bad_descriptions_are_refused(case: str, tmp_path: Path) -> None:
    model = convlora.inject(net(), "0", rank=1)
    tensors = {f"0.{n}": t.clone() for n, t in convlora.adapter(model).layers["0"].tensors.items()}
    layers: Any = {"0": ENTRIES[case]} if case in ENTRIES else {"a list": [1], "a text": "0", "empty": {}}[case]
    if case == "empty":
        tensors = {}
    metadata = {
        "format": "convlora",
        "convlora.format_version": "1",
        "config": convlora.adapters(model)["default"].to_json(),
        "layers": json.dumps(layers),
    }
    save_file(tensors, tmp_path / "bad.safetensors", {**metadata, "checksum": checksum(tensors, metadata)})
    fresh = net()
    before = snapshot(fresh)
    with pytest.raises(convlora.ConvLoRAError, match=r"read: '.*bad\.safetensors'"):
        convlora.load(fresh, tmp_path / "bad.safetensors")
    assert snapshot(fresh) == before


def test_float64_factors_beyond_float32_are_refused() -> None:
    adapter = convlora.adapter(adapted_net())
    large = {n: t.double() * 1e300 for n, t in adapter.layers["0"].tensors.items()}
    with pytest.raises(convlora.ConvLoRAError, match=r"non-finite: 0\.lora_A"):
        dataclasses.replace(adapter, layers={"0": dataclasses.replace(adapter.layers["0"], tensors=large)})


def test_the_default_dtype_does_not_round_the_scale() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = convlora.inject(net().float(), NET_LAYERS, rank=1, alpha=3 / 7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert model[0].convlora.default._gain.item() == torch.tensor(3 / 7).item()


# --- merged and stale ------------------------------------------------------------------------------------------


def test_a_merged_weight_sees_new_memory_behind_a_parameter() -> None:
    model = convlora.merge(adapted_net()).eval()
    model(x())
    factors = convlora.parameters(model)
    nn.utils.vector_to_parameters(torch.randn(sum(p.numel() for p in factors)), factors)
    assert torch.equal(model(x()), convlora.unmerge(copy.deepcopy(model))(x()))
    base = model[0]._parameters["weight"]
    base.data = base.data * 2
    assert torch.equal(model(x()), convlora.unmerge(copy.deepcopy(model))(x()))


def test_a_merged_weight_sees_writes_to_a_base_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = convlora.merge(convlora.inject(net().eval(), NET_LAYERS, rank=1))
        y = model(x())
        model[0]._parameters["weight"].mul_(2)
        assert not torch.equal(model(x()), y)


@pytest.mark.parametrize("write", ["load", "assign", "factors"])
def test_an_export_of_a_merged_model_is_never_stale(write: str) -> None:
    model = convlora.merge(adapted_net().eval())
    model(x())
    doubled = {key: value * (1 if key.endswith("scale") else 2) for key, value in model.state_dict().items()}
    if write == "factors":
        randomise(model)
    else:
        model.load_state_dict(doubled, assign=write == "assign")
    torch.testing.assert_close(torch.export.export(model, (x(),)).module()(x()), model(x()))


# --- nothing half done -----------------------------------------------------------------------------------------


class Stubborn(nn.Conv2d):
    def __init_subclass__(cls, *, tag: str, **options: Any) -> None:
        super().__init_subclass__(**options)


def test_a_class_that_refuses_subclasses_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Stubborn(8, 8, 3))
    before = snapshot(model)
    with pytest.raises(convlora.ConvLoRAError, match="'1' cannot be adapted: Stubborn cannot be subclassed"):
        convlora.inject(model, "*", rank=1)
    assert snapshot(model) == before


def test_lazy_and_scripted_neighbours_are_frozen_and_come_back() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer ones warn of TorchScript
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 3, 3)))
    model = nn.Sequential(nn.Conv2d(3, 3, 3), scripted, nn.Flatten(), nn.LazyLinear(3))
    convlora.inject(model, "0", rank=1)
    assert [p for p in model.parameters() if p.requires_grad] == convlora.parameters(model)
    convlora.remove(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_base_made_in_inference_mode_comes_back() -> None:
    with torch.inference_mode():
        model = net()
    before = snapshot(model)
    convlora.inject(model, NET_LAYERS, rank=1)
    convlora.activate(model, {"default": 0.5})
    convlora.remove(model)
    assert snapshot(model) == before


def test_audit_restores_expanded_and_sparse_buffers_and_modules_put_in_by_the_forward() -> None:
    class Growing(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            self.extra = nn.ReLU()
            return super().forward(x)

    model = Growing(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    model[0].register_buffer("mean", torch.zeros(1).expand(5))
    model[0].register_buffer("thin", torch.eye(2).to_sparse())
    convlora.inject(model, "0", rank=1)
    modules, mean = list(model._modules), model[1].running_mean.clone()
    convlora.audit(model, torch.randn(2, 3, 6, 6))
    assert list(model._modules) == modules
    assert torch.equal(model[1].running_mean, mean)


# --- names -----------------------------------------------------------------------------------------------------


def test_no_adapter_is_named_like_an_attribute_of_the_module_that_holds_it() -> None:
    for name in dir(Slot()):
        with pytest.raises(convlora.ConvLoRAError, match="name"):
            convlora.AdapterConfig(targets="*", name=name)


def test_no_tensor_is_named_like_an_attribute_of_the_module_that_holds_it() -> None:
    low_rank = adapted_net()[0].convlora.default
    assert isinstance(low_rank, LowRank)
    for name in {*dir(low_rank), *vars(low_rank)} - {"lora_A", "lora_B"}:

        class Named:
            inits = ("default",)
            tensor = name

            def shapes(self, spec: Any, rank: int) -> dict[str, tuple[int, ...]]:
                return {self.tensor: (rank, *spec.shape)}

            def init_(self, factors: Mapping[str, Tensor], method: str) -> None:
                nn.init.zeros_(factors[self.tensor])

            def delta(self, factors: Mapping[str, Tensor], spec: Any) -> Tensor:
                return factors[self.tensor].sum(0)

            def drop(self, factors: Mapping[str, Tensor], keep: Tensor) -> Mapping[str, Tensor]:
                return factors

        with pytest.raises(convlora.ConvLoRAError, match="unusable tensor names"):
            convlora.register_factors("test-named", Named)


def test_a_factorization_that_raises_is_one_clear_error() -> None:
    class Needy:
        def __init__(self, argument: int) -> None:
            raise AssertionError

    with pytest.raises(convlora.ConvLoRAError, match="fails on a small weight"):
        convlora.register_factors("test-needy", Needy)


def test_stored_names_select_the_same_layers_again() -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3), "a": nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3)})})
    model["x[0]"] = nn.Conv2d(4, 4, 3)
    for chosen in (["conv"], ["x[0]"], ["conv", "a.conv"]):
        convlora.inject(model, lambda name, module, chosen=chosen: name in chosen, rank=1)
        config = convlora.adapters(model)["default"]
        convlora.inject(convlora.remove(model), config=config)
        assert list(convlora.adapter(model).layers) == chosen
        convlora.remove(model)


def test_full_names_are_compared_without_globbing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of full names against thousands of layers are usual (allocated ranks); globbing them took a minute."""

    def glob(*arguments: object) -> bool:
        raise AssertionError(arguments)

    monkeypatch.setattr("convlora.support.patterns.fnmatchcase", glob)
    model = nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 1)) for _ in range(30)])
    convlora.inject(model, [f"{i}.0" for i in range(30)], rank=1, ranks={f"{i}.0": 2 for i in range(30)})
    assert len(convlora.adapter(model).layers) == 30


def test_names_of_another_type_are_one_clear_error() -> None:
    model = adapted_net()
    for call in (convlora.remove, convlora.parameters, convlora.adapter):
        with pytest.raises(convlora.ConvLoRAError, match=r"no adapter \['default'\]"):
            call(model, ["default"])  # type: ignore[arg-type]


# --- calls that contradict themselves --------------------------------------------------------------------------


def test_config_and_keywords_contradict_each_other() -> None:
    config = convlora.AdapterConfig(targets="0")
    with pytest.raises(convlora.ConvLoRAError, match="give rank, name or config"):
        convlora.inject(net(), config=config, rank=16, name="b")
    with pytest.raises(convlora.ConvLoRAError, match="must be an AdapterConfig"):
        convlora.inject(net(), config={"targets": "0"})  # type: ignore[arg-type]


def test_parts_of_one_name_with_different_factors_are_not_saved_as_one(tmp_path: Path) -> None:
    model = net()
    convlora.inject(model[0], "*", rank=1, rank_scaling="sqrt")
    convlora.inject(model[3], "*", rank=1)
    with pytest.raises(convlora.ConvLoRAError, match="parts of 'default' differ"):
        convlora.save(model, tmp_path / "a.safetensors")


def test_a_callable_that_raises_names_the_layer() -> None:
    with pytest.raises(convlora.ConvLoRAError, match="target <lambda> fails on '': ZeroDivisionError"):
        convlora.inject(net(), lambda name, module: 1 / 0)


def test_a_layer_parametrized_after_inject_is_one_clear_error(tmp_path: Path) -> None:
    model = convlora.activate(convlora.inject(net(), "0", rank=1), [])
    nn.utils.parametrizations.weight_norm(model[0])
    for call in (convlora.adapter, convlora.merge, convlora.remove):
        with pytest.raises(convlora.ConvLoRAError, match="parametrized after inject"):
            call(model)


def test_apply_to_refuses_what_cannot_hold_an_update() -> None:
    adapter = convlora.adapter(convlora.inject(nn.Conv2d(8, 8, 3), "*", rank=1))
    with pytest.raises(convlora.ConvLoRAError, match="expected a state dict, got list"):
        adapter.apply_to([])  # type: ignore[arg-type]
    for dtype in (torch.int8, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(convlora.ConvLoRAError, match="instead of floating point"):
            adapter.apply_to({"weight": torch.zeros(8, 8, 3, 3).to(dtype)})
    large = {"weight": torch.full((8, 8, 3, 3), 65000.0, dtype=torch.float16)}
    model = randomise(convlora.inject(nn.Conv2d(8, 8, 3), "*", rank=1), std=100)
    with pytest.raises(convlora.ConvLoRAError, match="non-finite: weight"):
        convlora.adapter(model).apply_to(large)
    with pytest.raises(convlora.ConvLoRAError, match="too narrow"):
        adapter.to(torch.float8_e4m3fn)


def test_only_files_are_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(convlora.ConvLoRAError, match="a folder or a device"):
        convlora.save(adapted_net(), tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


# --- copies of classes with ways of their own ------------------------------------------------------------------


class Reduced(nn.Conv2d):
    """A class that says itself how it is pickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Reduced, (self.in_channels, self.out_channels, self.kernel_size), self.__dict__


def test_classes_with_their_own_reduce_keep_their_adapter() -> None:
    model = randomise(convlora.inject(nn.Sequential(Reduced(3, 8, 3)), "*", rank=1))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x()), model(x()))
        assert bits(twin) == bits(model)
        assert type(convlora.remove(twin)[0]) is Reduced


def test_averaged_models_use_the_names_of_the_bare_model() -> None:
    averaged = torch.optim.swa_utils.AveragedModel(adapted_net())
    assert list(convlora.adapter(averaged).layers) == NET_LAYERS


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("acts", [False, True])
def test_a_base_checkpoint_brings_the_statistics_of_the_base(acts: bool, assign: bool) -> None:
    source = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    model = convlora.inject(copy.deepcopy(source), "0", rank=1)
    model.train()(torch.randn(2, 3, 8, 8))
    own = {key: value.clone() for key, value in model.state_dict().items() if ".convlora." in key}
    source.train()(torch.randn(2, 3, 8, 8))
    convlora.activate(model, "default" if acts else [])
    model.load_state_dict(copy.deepcopy(source.state_dict()), assign=assign)
    found = model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in {**source.state_dict(), **own}.items())
