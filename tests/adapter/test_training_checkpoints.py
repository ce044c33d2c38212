"""An adapter out of a training checkpoint equals the one that is taken out of the model."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import FACTORS, LAYERS, NET_INPUT, adapted_net, build, net, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convlora
from convlora import Adapter, AdapterConfig, ConvLoRAError, ConvLoRAWarning, formats
from convlora.adapter.parts import is_statistic
from convlora.layer.copies import statistics_names

StateDict = dict[str, Any]


def config_of(model: nn.Module, name: str = "default") -> AdapterConfig:
    return convlora.adapters(model)[name]


def taken(model: nn.Module, name: str | None = None) -> Adapter:
    """By the model, without the warning of what is beside."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvLoRAWarning)
        return convlora.adapter(model, name)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


def assert_equal(one: Adapter, other: Adapter) -> None:
    assert one.config == other.config
    assert one.fingerprint == other.fingerprint
    assert getattr(one.fingerprint, "summary", None) == getattr(other.fingerprint, "summary", None)
    assert list(one.layers) == list(other.layers)
    for path, layer in one.layers.items():
        twin = other.layers[path]
        assert (layer.spec, layer.rank, layer.alpha, layer.aliases) == (twin.spec, twin.rank, twin.alpha, twin.aliases)
        assert list(layer.tensors) == list(twin.tensors)
        assert all(same_bits(tensor, twin.tensors[name]) for name, tensor in layer.tensors.items())
    assert one.modules.keys() == other.modules.keys()
    for path, tensors in one.modules.items():
        assert tensors.keys() == other.modules[path].keys()
        assert all(same_bits(tensor, other.modules[path][name]) for name, tensor in tensors.items())


def through_a_file(state: StateDict) -> StateDict:
    buffer = io.BytesIO()
    torch.save({"epoch": 3, "state_dict": state}, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)["state_dict"]


@pytest.mark.filterwarnings("ignore:.*more parameters than the layer")  # depthwise ones
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("hazard", LAYERS)
def test_every_sort_of_layer_comes_back(hazard: str, factors: str) -> None:
    layer, _ = build(hazard)
    model = randomise(convlora.inject(nn.Sequential(layer), "0", rank=2, alpha=3, factors=factors, bias=False))
    state = through_a_file(model.state_dict())
    assert_equal(Adapter.from_state_dict(state, config_of(model)), taken(model))
    bare = dict(state)  # without what torch notes beside it
    specs = formats.specs_of(model)
    assert_equal(Adapter.from_state_dict(bare, config_of(model), specs=specs), taken(model))


def several() -> nn.Module:
    model = adapted_net(rank=1, name="rain", bias=True, alphas={"0": 5, "re:[34]": 0.5})
    convlora.inject(model, ["0", "4"], rank=1, ranks={"4": 2}, alpha=3, factors="locon", name="snow")
    return randomise(model)


def with_copies() -> nn.Module:
    model = convlora.inject(net(), ["0", "3"], rank=1, modules_to_save="6")
    model.train()(torch.randn(NET_INPUT))
    return randomise(model)


def with_unmoved_statistics() -> nn.Module:
    return randomise(convlora.inject(net(), ["0", "3"], rank=1, norm_statistics="adapter"))


def with_norms_saved() -> nn.Module:
    model = convlora.inject(net(), "0", rank=1, modules_to_save=nn.BatchNorm2d, norm_statistics="frozen")
    return randomise(model)


def of_one_layer() -> nn.Module:
    return randomise(convlora.inject(nn.Conv2d(3, 8, 3), "*", rank=1))


def shared() -> nn.Module:
    layer = nn.Conv2d(4, 4, 3, padding=1)
    norm = nn.BatchNorm2d(4)
    model = convlora.inject(nn.Sequential(layer, norm, layer, norm), "0", rank=1, modules_to_save="1")
    return randomise(model)


def half() -> nn.Module:
    return adapted_net(rank=1).half()


def double() -> nn.Module:
    return adapted_net(rank=1).double()


def by_classes() -> nn.Module:
    return randomise(convlora.inject(net(), [nn.Linear, nn.Conv2d], exclude=lambda name, _: name == "3", rank=1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    make.__name__: make
    for make in (
        several, with_copies, with_unmoved_statistics, with_norms_saved, of_one_layer, shared, half, double, by_classes
    )
}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_every_adapter_of_a_model_comes_back(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    state = through_a_file(model.state_dict())
    for name, config in convlora.adapters(model).items():
        adapter = Adapter.from_state_dict(state, config)
        assert_equal(adapter, taken(model, name))
        adapter.write(tmp_path / "one.safetensors")
        taken(model, name).write(tmp_path / "other.safetensors")
        assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()
        base = {key: value for key, value in state.items() if ".convlora." not in f".{key}"}
        applied, expected = adapter.apply_to(base), taken(model, name).apply_to(base)
        assert all(same_bits(applied[key], value) for key, value in expected.items())


def test_the_adapter_in_a_fresh_base_gives_the_trained_output() -> None:
    torch.manual_seed(0)
    base = net()
    model = convlora.inject(copy.deepcopy(base), "*", exclude="6", rank=1, modules_to_save="6")
    optimizer = torch.optim.SGD(convlora.parameters(model), lr=0.1)
    x = torch.randn(NET_INPUT)
    for _ in range(3):
        model.train()(x).square().mean().backward()
        optimizer.step()
    fresh = convlora.load(base, Adapter.from_state_dict(model.state_dict(), config_of(model))).eval()
    assert torch.equal(fresh(x), model.eval()(x))


def test_prefixes_of_wrappers_are_left_out() -> None:
    model = adapted_net(rank=1)
    expected = taken(model)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    wrapped: list[nn.Module] = [
        nn.DataParallel(model), torch.compile(model, backend="eager"), averaged,
        nn.DataParallel(torch.compile(model, backend="eager")),
    ]  # fmt: skip
    for wrapper in wrapped:
        assert_equal(Adapter.from_state_dict(through_a_file(wrapper.state_dict()), config_of(model)), expected)


def test_a_trainer_may_take_the_prefix_off_the_keys_alone() -> None:
    model = convlora.inject(nn.Sequential(nn.ConvTranspose2d(4, 4, 3)), "0", rank=1)
    state = nn.DataParallel(randomise(model)).state_dict()
    for key in list(state):
        state[key.removeprefix("module.")] = state.pop(key)
    assert_equal(Adapter.from_state_dict(through_a_file(state), config_of(model)), taken(model))


def test_a_config_with_classes_gets_the_names() -> None:
    model = by_classes()
    given = AdapterConfig(targets=nn.Conv2d, rank=1, modules_to_save=nn.Linear)
    model = randomise(convlora.inject(net(), config=given))
    adapter = Adapter.from_state_dict(model.state_dict(), given)
    assert AdapterConfig.from_json(adapter.config.to_json()) == adapter.config
    again = convlora.inject(net(), config=adapter.config)
    assert list(taken(again).layers) == list(adapter.layers)


def test_a_scale_that_the_checkpoint_states_is_no_factor() -> None:
    model = adapted_net(rank=2, alpha=3)
    state = {**model.state_dict(), "0.convlora.default.lora_scale": torch.tensor(1.5)}
    adapter = Adapter.from_state_dict(state, config_of(model), specs=formats.specs_of(model))
    assert list(adapter.layers["0"].tensors) == ["lora_A", "lora_B"]


def test_a_norm_in_the_base_leaves_the_fingerprint_unknown() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
    model = randomise(convlora.inject(nn.Sequential(layer, nn.Conv2d(8, 3, 3)), "*", rank=1))
    adapter = Adapter.from_state_dict(model.state_dict(), config_of(model))
    assert adapter.fingerprint is None
    assert torch.equal(adapter.delta("0"), taken(model).delta("0"))
    assert torch.equal(adapter.delta("1"), taken(model).delta("1"))


def test_what_a_bare_dict_does_not_tell_is_said(tmp_path: Path) -> None:
    """A transposed convolution with as many channels in as out has the shapes of a convolution."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3), nn.Linear(4, 4))
    randomise(convlora.inject(model, "*", rank=1))
    save_file(model.state_dict(), tmp_path / "all.safetensors")
    state = load_file(tmp_path / "all.safetensors")
    with pytest.warns(ConvLoRAWarning, match=r"1 layers \(first: '1'\) count as convolutions") as seen:
        guessed = Adapter.from_state_dict(state, config_of(model))
    assert seen[0].filename == __file__
    assert not guessed.layers["1"].spec.transposed
    exact = Adapter.from_state_dict(state, config_of(model), specs=formats.specs_of(model))
    assert torch.equal(exact.delta("1"), taken(model).delta("1"))
    assert not torch.equal(guessed.delta("1"), exact.delta("1"))


def test_statistics_have_the_names_that_norms_give_them() -> None:
    for norm in (nn.BatchNorm2d(4), nn.InstanceNorm1d(4, track_running_stats=True, affine=True)):
        assert [name for name in norm.state_dict() if is_statistic(name)] == statistics_names(norm)


def drop(key: str) -> Callable[[StateDict], StateDict]:
    return lambda state: {k: v for k, v in state.items() if k != key}


def replace_value(key: str, value: Any) -> Callable[[StateDict], StateDict]:
    return lambda state: {**state, key: value}


WRONG: dict[str, tuple[Callable[[StateDict], Any], dict[str, Any], str]] = {
    "another name": (dict, {"name": "snow"}, "no adapter 'snow' in the state dict; it has ['rain']"),
    "a base": (
        lambda state: {k: v for k, v in state.items() if "convlora" not in k}, {},
        "no key is '<layer>.convlora.<adapter>.<tensor>'",
    ),
    "nested": (lambda state: {"epoch": 1, "net": state}, {}, "the state dict may be in 'net'"),
    "no mapping": (lambda state: [state], {}, "expected a state dict and an AdapterConfig, got list"),
    "another rank": (dict, {"rank": 3}, "mismatched: 0 has rank 2, by the config 3, 3 has rank 2, by the config 3"),
    "another rank of one layer": (dict, {"ranks": {"3": 1}}, "mismatched: 3 has rank 2, by the config 1"),
    "rank 0": (dict, {"ranks": {"3": 0}}, "mismatched: 3 has rank 2, by the config 0"),
    "other factors": (
        dict, {"factors": "locon"}, "mismatched: 0 has {'lora_A': (6, 9), 'lora_B': (24, 6)}, no 'locon' factors"
    ),
    "half a layer": (drop("3.convlora.rain.lora_B"), {}, "missing: 3.lora_B"),
    "no base weight": (drop("3.weight"), {}, "missing: 3.weight"),
    "no bias delta": (drop("3.convlora.rain.lora_bias"), {}, "missing: 3.lora_bias"),
    "a bias delta too many": (dict, {"bias": False}, "unexpected: 0.lora_bias, 3.lora_bias"),
    "a whole layer": (
        lambda state: {k: v for k, v in state.items() if not k.startswith("3.convlora")}, {},
        "missing: 3 (of target '3')",
    ),
    "another config": (dict, {"targets": "4"}, "unexpected: 0 (the config's targets select another layer), 3 (the"),
    "half a copy": (drop("6.convlora.rain.bias"), {}, "missing: 6.bias"),
    "half of the statistics": (drop("1.convlora.rain.running_var"), {}, "missing: 1.running_var"),
    "no copy": (
        lambda state: {k: v for k, v in state.items() if not k.startswith("6.convlora")}, {},
        "missing: copies of modules_to_save '6'",
    ),
    "a copy too many": (dict, {"modules_to_save": ()}, "unexpected: 6.bias, 6.weight"),
    "on the meta device": (lambda state: {k: v.to("meta") for k, v in state.items()}, {}, "not whole tensors"),
    "not finite": (
        replace_value("0.convlora.rain.lora_A", torch.full((6, 9), float("nan"))), {}, "non-finite: 0.lora_A"
    ),
    "another scale": (
        replace_value("0.convlora.rain.lora_scale", torch.tensor(0.5)), {},
        "mismatched: 0 has scale 0.5, by the config 1",
    ),
    "an unknown tensor": (
        replace_value("0.convlora.rain.lora_C", torch.zeros(1)), {}, "no 'convlora' factors of a weight (8, 3, 3, 3)"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_fit_is_named(what: str) -> None:
    change, other, message = WRONG[what]
    config = AdapterConfig(targets=["0", "3"], rank=2, name="rain", bias=True, modules_to_save="6")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvLoRAWarning)
        model = randomise(convlora.inject(net(), config=config))
    model.train()(torch.randn(NET_INPUT))
    Adapter.from_state_dict(model.state_dict(), config)
    state, specs = change(model.state_dict()), formats.specs_of(model)
    with pytest.raises(ConvLoRAError, match=re.escape(message)):
        Adapter.from_state_dict(state, config.replace(**other), specs=specs)
