"""Inference while adapters are live: the effective weight is formed once, and is never an old one."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import NET_INPUT, NET_LAYERS, adapted_net, randomise
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import convlora
from convlora.layer import slot as slot_module
from convlora.layer.adapted import Adapted, slot_of


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each effective weight that is formed."""
    calls: list[str] = []
    plain = slot_module.fuse_weight

    def count(*arguments: Any) -> Tensor:
        calls.append("weight")
        return plain(*arguments)

    monkeypatch.setattr(slot_module, "fuse_weight", count)
    return calls


@pytest.mark.parametrize("still", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_effective_weight_is_formed_once(still: Any, formed: list[str]) -> None:
    model, x = adapted_net(), torch.randn(NET_INPUT)
    with still():
        first = model.eval()(x)
        forms_each = len(formed)
        assert forms_each == len(NET_LAYERS)
        for _ in range(3):
            assert torch.equal(model(x), first)
    assert len(formed) == forms_each
    model(x).sum().backward()
    assert len(formed) == 3 * forms_each  # once for forward, once for backward
    assert all(not slot_of(module)._fused for module in model.modules() if isinstance(module, Adapted))


def an_optimizer_step(model: Any, tmp_path: Path) -> None:
    optimizer = torch.optim.SGD(convlora.parameters(model), lr=0.1)
    with torch.enable_grad():
        model(torch.ones(NET_INPUT)).square().sum().backward()
    optimizer.step()


def a_hot_swap(model: Any, tmp_path: Path) -> None:
    convlora.save(adapted_net(), tmp_path / "other.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convlora.ConvLoRAWarning)  # another base
        convlora.load(model, tmp_path / "other.safetensors")


def an_average_through_data(model: Any, tmp_path: Path) -> None:
    """As BasicSR writes its moving average."""
    for parameter in convlora.parameters(model):
        parameter.data.mul_(0.5)


def shifted(model: nn.Module) -> dict[str, Tensor]:
    """Other values of all tensors but counters and the scales of adapters."""
    return {name: value + 0.1 for name, value in model.state_dict().items() if value.dim()}


def a_full_checkpoint(model: Any, tmp_path: Path) -> None:
    model.load_state_dict(shifted(model), strict=False)


def an_assigned_checkpoint(model: Any, tmp_path: Path) -> None:
    model.load_state_dict(shifted(model), strict=False, assign=True)


def new_memory(model: Any, tmp_path: Path) -> None:
    for parameter in convlora.parameters(model):
        parameter.data = parameter.data + 0.1


def another_adapter(model: Any, tmp_path: Path) -> None:
    convlora.inject(model, NET_LAYERS, rank=1, name="second")
    randomise(model, "second")
    convlora.activate(model, {"default": 1, "second": 0.5})


def another_alpha(model: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(convlora.adapter(model).config, alpha=3.0)
    for layer in model.modules():
        if isinstance(layer, Adapted) and slot_of(layer).low_ranks():
            low_rank = slot_of(layer).low_rank("default")
            slot_of(layer).swap("default", dict(low_rank.factors()), config, 3.0)


def baking(model: Any, tmp_path: Path) -> None:
    convlora.remove(convlora.merge(model))


CHANGES: list[Callable[[Any, Path], Any]] = [
    an_optimizer_step, a_hot_swap, an_average_through_data, a_full_checkpoint, an_assigned_checkpoint, new_memory,
    another_adapter, another_alpha,
    lambda model, path: convlora.activate(model, {"default": 0.5}),
    lambda model, path: convlora.activate(model, []),
    lambda model, path: model.double(),
    lambda model, path: model.bfloat16(),
    baking,
    lambda model, path: nn.init.normal_(convlora.parameters(model)[0]),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_weight_kept_for_inference_is_never_stale(change: Callable[[Any, Path], Any], tmp_path: Path) -> None:
    """The model that has run before the change and its copy that has not agree to the bit."""
    model, x = adapted_net().eval(), torch.randn(NET_INPUT)
    with torch.no_grad():
        before = model(x)
    torch.manual_seed(1)
    change(fresh := copy.deepcopy(model), tmp_path)
    torch.manual_seed(1)
    change(model, tmp_path)
    x = x.to(next(model.parameters()).dtype)
    with torch.no_grad():
        after = model(x)
        assert torch.equal(after, fresh(x))
        assert torch.equal(after, model(x))
    with torch.enable_grad():
        assert torch.equal(after, model(x).detach())
    assert torch.equal(after, before) == (change is baking)


@pytest.mark.parametrize("kept", [False, True], ids=["fresh", "after a forward in eval mode"])
def test_rank_dropout_draws_anew_without_gradients(kept: bool) -> None:
    model = adapted_net(rank=2, rank_dropout=0.5)
    x = torch.randn(NET_INPUT)
    with torch.no_grad():
        if kept:
            model.eval()(x)
        model.train()
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        outputs = [model(x) for _ in range(12)]
    assert any(not torch.equal(outputs[0], output) for output in outputs)


def test_a_trace_without_gradients_keeps_its_adapters() -> None:
    model, x = adapted_net().eval(), torch.randn(NET_INPUT)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(x)
        traced = torch.jit.trace(model, x)
        for parameter in convlora.parameters(model):
            parameter.mul_(2)
        assert torch.equal(traced(x), model(x))


def test_fake_tensors_are_not_kept() -> None:
    model, x = adapted_net().eval(), torch.randn(NET_INPUT)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        model(mode.from_tensor(x))
    with torch.no_grad():
        assert type(model(x)) is Tensor
