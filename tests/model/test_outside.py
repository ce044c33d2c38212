"""What no adapter holds is frozen, and is named if it has moved: never lost in silence."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convlora
from convlora import ConvLoRAWarning
from convlora.layer import copies


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(128, 4))


def x() -> Tensor:
    return torch.linspace(-1, 2, 4 * 3 * 6 * 6).view(4, 3, 6, 6)


def injected(**options: Any) -> nn.Sequential:
    return convlora.inject(base(), "0", rank=1, **options)


def step(model: nn.Module, parameters: Any) -> None:
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    model.train()(x()).square().mean().backward()
    optimizer.step()


def optimise_all(model: nn.Module) -> None:
    model.requires_grad_(True)  # as some trainers do
    step(model, model.parameters())
    model.requires_grad_(False)


def unfreeze_the_head(model: nn.Module) -> None:
    model[3].requires_grad_(True)
    step(model, [*convlora.parameters(model), *model[3].parameters()])


def write_a_buffer(model: nn.Module) -> None:
    with torch.no_grad(), convlora.disabled(model):
        model[1].running_mean.add_(1)


def move_statistics_with_adapters_off(model: nn.Module) -> None:
    with convlora.disabled(model):
        model.train()(x())


def replace_the_head(model: nn.Module) -> None:
    model[3] = nn.Linear(128, 4)


OUTSIDE: dict[str, tuple[Callable[[nn.Module], None], list[str]]] = {
    "optimizer over all parameters": (optimise_all, ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]),
    "a head unfrozen by hand": (unfreeze_the_head, ["3.weight", "3.bias"]),
    "a buffer written": (write_a_buffer, ["1.running_mean"]),
    "statistics, adapters off": (
        move_statistics_with_adapters_off,
        ["1.running_mean", "1.running_var", "1.num_batches_tracked"],
    ),
    "a new head": (replace_the_head, ["3.weight", "3.bias"]),
}


@pytest.mark.parametrize("how", OUTSIDE)
def test_what_was_trained_outside_is_named_by_all_that_would_lose_it(how: str, tmp_path: Path) -> None:
    model = injected()
    act, names = OUTSIDE[how]
    act(model)
    assert sorted(convlora.changed(model)) == sorted(names)
    calls: dict[str, Callable[[], Any]] = {
        "save": lambda: convlora.save(model, tmp_path / "a.safetensors"),
        "adapter": lambda: convlora.adapter(model),
        "merged_state_dict": lambda: convlora.merged_state_dict(model),
    }
    for operation, call in calls.items():
        with pytest.warns(ConvLoRAWarning, match=rf"{operation}: {len(names)} Parameters or buffers outside") as seen:
            call()
        assert len(seen) == 1
        assert seen[0].filename == __file__
        assert all(name in str(seen[0].message) for name in names[:5])
        assert "modules_to_save=" in str(seen[0].message)


def test_statistics_of_the_base_are_named() -> None:
    with pytest.warns(ConvLoRAWarning, match="norm_statistics='base'"):
        model = injected(norm_statistics="base")
    step(model, convlora.parameters(model))
    assert convlora.changed(model) == ["1.running_mean", "1.running_var", "1.num_batches_tracked"]


def a_life(model: nn.Module, folder: Path) -> nn.Module:
    """Whatever may happen to a model without anything being trained outside."""
    step(model, convlora.parameters(model))
    model = copy.deepcopy(model.eval())
    convlora.unmerge(convlora.merge(model))
    convlora.activate(convlora.activate(model, []), "default")
    model.load_state_dict(model.state_dict())
    torch.save(model, folder / "model.pt")
    model = torch.load(folder / "model.pt", weights_only=False)
    model(x())
    return model.double().float()


def test_a_life_of_an_adapter_alarms_nobody(tmp_path: Path) -> None:
    model = a_life(injected(modules_to_save="3"), tmp_path)
    assert convlora.changed(model) == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convlora.save(model, tmp_path / "a.safetensors")
        convlora.load(base(), tmp_path / "a.safetensors")


def test_a_model_without_adapters_has_nothing_to_lose() -> None:
    assert convlora.changed(base()) == []
    model = injected()
    optimise_all(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convlora.changed(convlora.remove(model)) == []


def test_what_the_model_froze_itself_is_its_own_to_write() -> None:
    model = base()
    model[3].requires_grad_(False)
    convlora.inject(model, "0", rank=1)
    with torch.no_grad():
        model[3].weight.mul_(2)
    assert convlora.changed(model) == []


def test_freeze_trains_what_adapters_train_and_nothing_else() -> None:
    model = injected(modules_to_save="3")
    expected = [name for name, p in model.named_parameters() if p.requires_grad]
    assert expected == [
        "0.convlora.default.lora_A", "0.convlora.default.lora_B",
        "3.convlora.default.weight", "3.convlora.default.bias",
    ]  # fmt: skip
    model.requires_grad_(True)
    assert convlora.freeze(model) is model
    assert [name for name, p in model.named_parameters() if p.requires_grad] == expected
    model.requires_grad_(False)
    assert [name for name, p in convlora.freeze(model).named_parameters() if p.requires_grad] == expected


def test_a_second_adapter_does_not_freeze_what_was_unfrozen_since(tmp_path: Path) -> None:
    model = injected(name="first")
    model[3].requires_grad_(True)
    convlora.inject(model, "0", rank=1, name="second")
    assert model[3].weight.requires_grad
    with pytest.warns(ConvLoRAWarning, match="outside the adapter"):
        value = convlora.adapter(model, "first")
    convlora.load(model, value, name="third")
    assert model[3].weight.requires_grad
    convlora.remove(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_base_checkpoint_after_inject_is_the_base_and_reaches_fresh_copies() -> None:
    other = base()
    step(other, other.parameters())
    model = injected(modules_to_save="3")
    model.load_state_dict(other.state_dict(), strict=True)
    assert torch.equal(model.eval()(x()), other.eval()(x()))
    assert convlora.changed(model) == []
    step(model, convlora.parameters(model))
    y = model.eval()(x())
    model.load_state_dict(other.state_dict(), strict=True)  # what was trained stays
    assert torch.equal(model(x()), y)


def test_a_base_checkpoint_leaves_the_copies_of_a_file() -> None:
    trained = injected(modules_to_save="3")
    step(trained, convlora.parameters(trained))
    y = trained.eval()(x())
    loaded = convlora.load(base(), convlora.adapter(trained)).eval()
    loaded.load_state_dict(base().state_dict(), strict=True)
    assert torch.equal(loaded(x()), y)


def test_a_full_checkpoint_does_not_hide_what_was_trained_outside() -> None:
    trained = injected()
    unfreeze_the_head(trained)
    model = injected()
    model.load_state_dict(trained.state_dict())
    assert convlora.changed(model) == ["3.weight", "3.bias"]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.complex64, torch.int32, torch.bool]
)
def test_large_tensors_are_summed_in_blocks_to_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [(torch.randn(shape) * 100).to(dtype) for shape in ((13, 7), (7,), (), (0, 3), (5, 6, 4))]
    whole = copies.sums_of_bits(tensors)
    assert len({*whole}) > 2
    for block in (1, 7, 8):
        monkeypatch.setattr(copies, "BLOCK", block)
        assert copies.sums_of_bits(tensors) == whole
