"""An adapted layer that has left the model since `inject` is named, and nothing else is."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from oracle import randomise
from torch import Tensor, nn

import convlora
from convlora import ConvLoRAError, ConvLoRAWarning
from convlora.model.places import departed_modules


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3))
        self.head = nn.Sequential(nn.Conv2d(8, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))  # type: ignore[no-any-return]


TARGETS = ["stem", "body.*", "head.*"]


def injected(**options: object) -> Net:
    return randomise(convlora.inject(Net(), TARGETS, rank=1, **options))  # type: ignore[arg-type, return-value]


def replace_a_layer(model: Net) -> None:
    model.body[0] = nn.Conv2d(8, 8, 3).requires_grad_(False)


def replace_a_block(model: Net) -> None:
    model.body = nn.Sequential(nn.Conv2d(8, 8, 5)).requires_grad_(False)


def delete_a_layer(model: Net) -> None:
    model.head[0] = nn.Identity()


def replace_an_adapted_norm(model: Net) -> None:
    model.body[1] = nn.Identity()


LOSSES: dict[str, tuple[Callable[[Net], None], list[str]]] = {
    "a layer is replaced": (replace_a_layer, ["body.0"]),
    "a block is replaced": (replace_a_block, ["body.0", "body.2", "body.1"]),
    "a layer is deleted": (delete_a_layer, ["head.0"]),
    "a norm with statistics is replaced": (replace_an_adapted_norm, ["body.1"]),
}


def in_itself(model: Net, folder: Path) -> Net:
    return model


def deep_copied(model: Net, folder: Path) -> Net:
    return copy.deepcopy(model)


def pickled(model: Net, folder: Path) -> Net:
    torch.save(model, folder / "model.pt")
    return torch.load(folder / "model.pt", weights_only=False)  # type: ignore[no-any-return]


def loaded(model: Net, folder: Path) -> Net:
    value = convlora.adapter(model)
    return convlora.load(convlora.remove(model), value)


LIVES = [in_itself, deep_copied, pickled, loaded]


@pytest.mark.parametrize("life", LIVES)
@pytest.mark.parametrize("how", LOSSES)
def test_a_layer_that_has_left_is_named_by_all_that_would_lose_it(
    how: str, life: Callable[[Net, Path], Net], tmp_path: Path
) -> None:
    lose, names = LOSSES[how]
    model = life(injected(), tmp_path)
    lose(model)
    model = model if life is loaded else life(model, tmp_path)
    calls: dict[str, Callable[[], object]] = {
        "save": lambda: convlora.save(model, tmp_path / "a.safetensors"),
        "adapter": lambda: convlora.adapter(model),
        "merged_state_dict": lambda: convlora.merged_state_dict(model),
    }
    shown = ", ".join(map(repr, names))
    for operation, call in calls.items():
        with pytest.warns(ConvLoRAWarning, match=re.escape(f"{operation}: {shown} had an adapter and left")) as seen:
            call()
        assert seen[0].filename == __file__
        assert not [each for each in seen if "outside the adapter" in str(each.message)]


def test_many_names_are_counted() -> None:
    model = convlora.inject(nn.Sequential(*[nn.Conv2d(3, 3, 3) for _ in range(9)]), "*", rank=1)
    for i in range(8):
        model[i] = nn.Identity()
    with pytest.warns(ConvLoRAWarning, match="'0', '1', '2', '3', '4' and 3 more had an adapter"):
        convlora.adapter(model)


def test_a_model_that_has_lost_all_says_so() -> None:
    model = convlora.inject(nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU()), "0", rank=1)
    model[0] = nn.Conv2d(3, 3, 3)
    for call in (convlora.adapter, convlora.merge, convlora.parameters):
        with pytest.raises(ConvLoRAError, match="has no adapters any more; '0', which had them, left it since inject"):
            call(model)
    convlora.remove(model)
    with pytest.raises(ConvLoRAError, match="the model has no adapters; inject"):
        convlora.adapter(model)


def test_only_the_adapter_that_has_lost_something_is_named(tmp_path: Path) -> None:
    model = convlora.inject(Net(), "body.0", rank=1, name="rain", norm_statistics="frozen")
    convlora.inject(model, "stem", rank=1, name="snow", norm_statistics="frozen")
    convlora.inject(model, "stem", rank=1, name="fog", norm_statistics="frozen")
    model.stem = nn.Conv2d(3, 8, 3).requires_grad_(False)
    convlora.save(model, tmp_path / "a.safetensors", "rain")  # warnings are errors in tests
    assert departed_modules(model, "snow") == departed_modules(model, "fog") == ["stem"]
    with pytest.raises(ConvLoRAError, match="'snow' has no layer any more; 'stem', which had it, left"):
        convlora.save(model, tmp_path / "a.safetensors", "snow")


# --- what is meant alarms nobody


def take_a_part_out(model: Net, folder: Path) -> Net:
    convlora.remove(model.body)
    model.body = nn.Sequential(nn.Conv2d(8, 8, 5)).requires_grad_(False)
    return model


def take_a_part_of_a_copy_out(model: Net, folder: Path) -> Net:
    return take_a_part_out(copy.deepcopy(model), folder)


def move_a_layer(model: Net, folder: Path) -> Net:
    model.first = model.stem
    model.stem = nn.Identity()
    return model


def exchange_two_layers(model: Net, folder: Path) -> Net:
    model.body[0], model.body[2] = model.body[2], model.body[0]
    return model


def put_a_copy_in(model: Net, folder: Path) -> Net:
    model.body = copy.deepcopy(model.body)
    return model


def put_into_another(model: Net, folder: Path) -> Net:
    return nn.ModuleDict({"net": model})  # type: ignore[return-value]


def a_part_alone(model: Net, folder: Path) -> Net:
    return model.body  # type: ignore[return-value]


def a_copy_of_a_part(model: Net, folder: Path) -> Net:
    return copy.deepcopy(model.body)  # type: ignore[return-value]


def remove_one_of_two(model: Net, folder: Path) -> Net:
    convlora.inject(model, "stem", rank=1, name="snow")
    model.stem = nn.Conv2d(3, 8, 3).requires_grad_(False)
    return convlora.inject(convlora.remove(model), TARGETS, rank=1)


def merge_and_swap(model: Net, folder: Path) -> Net:
    value = convlora.adapter(model)
    return convlora.unmerge(convlora.load(convlora.merge(model), value))


MEANT = [
    take_a_part_out, take_a_part_of_a_copy_out, move_a_layer, exchange_two_layers, put_a_copy_in, put_into_another,
    a_part_alone, a_copy_of_a_part, remove_one_of_two, merge_and_swap, *LIVES,
]  # fmt: skip


@pytest.mark.parametrize("act", MEANT)
def test_what_is_meant_alarms_nobody(act: Callable[[Net, Path], Net], tmp_path: Path) -> None:
    model = act(injected(norm_statistics="frozen"), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convlora.save(model, tmp_path / "a.safetensors")
        convlora.merged_state_dict(model)


def test_remove_leaves_no_trace() -> None:
    model = Net()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    convlora.remove(convlora.inject(model, TARGETS, rank=1))
    assert {name: list(module.__dict__) for name, module in model.named_modules()} == {
        name: list(attributes) for name, attributes in before.items()
    }
    convlora.inject(convlora.inject(model, TARGETS, rank=1, name="a"), "stem", rank=1, name="b")
    convlora.remove(model, "a")
    model.stem = nn.Identity()
    assert departed_modules(model) == ["stem"]
    convlora.remove(model)
    assert departed_modules(model) == []
