"""Everything that was trained travels: copies of modules and running statistics, on nets that train in train mode."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import TORCH
from processes import in_processes
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import convlora
from convlora import Adapter, ConvLoRAError, ConvLoRAWarning
from convlora.cli.app import app
from convlora.layer.adapted import slot_of
from convlora.layer.copies import statistics_names

STEPS = 20


class UNet(nn.Module):
    """Two levels with BatchNorm, a skip, and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.fc = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        return self.fc(torch.cat([skip, self.up(self.deep(skip))], 1))  # type: ignore[no-any-return]


class Headed(nn.Module):
    """A convolution, a norm of any sort, and a head of any sort."""

    def __init__(self, norm: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.norm = norm
        self.fc = nn.Linear(8, 3) if head is None else head

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.body(x)).mean((2, 3)))  # type: ignore[no-any-return]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Embedding(5, 8)
        self.body = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.fc(x[:, 0, 0].abs().long() % 5))  # type: ignore[no-any-return]


class Tied(Words):
    """The embedding's weight is the output layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 5, bias=False)
        self.out.weight = self.fc.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(super().forward(x))  # type: ignore[no-any-return]


class Twice(Headed):
    """One norm at two places, registered under two names."""

    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(8))
        self.again = self.norm

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.again(self.norm(self.body(x))).mean((2, 3)))  # type: ignore[no-any-return]


def resnet18() -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.ResNet(models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=3)  # type: ignore[no-any-return]


def from_timm(name: str) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=3)  # type: ignore[no-any-return]


NETS: dict[str, tuple[Callable[[], nn.Module], Any, Any]] = {  # made by, targets, modules to save
    "resnet": (resnet18, "layer*", "fc"),
    "unet": (UNet, ["down.0", "deep.0", "up"], "fc"),
    "instance norm": (lambda: Headed(nn.InstanceNorm2d(8, affine=True, track_running_stats=True)), "body", "fc"),
    "without affine": (lambda: Headed(nn.BatchNorm2d(8, affine=False, momentum=None)), "body", "fc"),
    "group norm": (lambda: Headed(nn.GroupNorm(2, 8)), "body", ["fc", nn.GroupNorm]),
    "nested head": (
        lambda: Headed(nn.BatchNorm2d(8), nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))),
        "body",
        "fc",
    ),
    "embedding": (Words, "body", "fc"),
    "tied": (Tied, "body", ["fc", "out"]),
    "twice": (Twice, "body", ["fc", "norm"]),
    "resnet10t": (from_timm("resnet10t"), "layer*", "fc"),
    "mobilenetv3": (from_timm("mobilenetv3_small_050"), "blocks.1.*.conv_pw", "classifier"),
    "convnext": (from_timm("convnext_atto"), "stages.0.*.fc?", ["head.fc", lambda n, m: n.endswith("norm")]),
}


def made(name: str) -> tuple[nn.Module, Any, Any, Tensor]:
    torch.manual_seed(0)
    make, targets, saved = NETS[name]
    side = 32 if name in ("resnet10t", "mobilenetv3", "convnext", "resnet") else 8
    return make().eval(), targets, saved, torch.randn(4, 3, side, side) * 2 + 1


def trained(model: nn.Module, x: Tensor, parameters: Any = None, steps: int = STEPS) -> nn.Module:
    """After some steps in train mode, in eval mode."""
    optimizer = torch.optim.SGD(convlora.parameters(model) if parameters is None else parameters, lr=0.01)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(x + step / steps) - 1).square().mean()
        loss.backward()
        optimizer.step()
    return model.eval()


def adapted(name: str, **options: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """(base, the same with a trained adapter, input)."""
    base, targets, saved, x = made(name)
    options = {"modules_to_save": saved, "rank": 1, **options}
    return base, trained(convlora.inject(copy.deepcopy(base), targets, **options), x), x


def same_state(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(
        torch.equal(one[k], other[k]) and one[k].dtype == other[k].dtype for k in one
    )


def base_state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in model.state_dict().items() if ".convlora." not in f".{key}"}


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_what_was_trained_travels_and_the_base_comes_back(name: str, tmp_path: Path) -> None:
    with torch.enable_grad():
        base, model, x = adapted(name)
    y, before, state = model(x), base(x), base.state_dict()
    assert not torch.equal(y, before)
    assert same_state(base_state(model), state)
    assert convlora.changed(model) == []
    # the file, in a fresh base
    convlora.save(model, tmp_path / "a.safetensors")
    fresh = convlora.load(copy.deepcopy(base), tmp_path / "a.safetensors").eval()
    assert torch.equal(fresh(x), y)
    # switched off and on
    with convlora.disabled(model):
        assert torch.equal(model(x), before)
    assert torch.equal(convlora.activate(model, [])(x), before)
    assert torch.equal(convlora.activate(model, "default")(x), y)
    with convlora.using(model, []):
        assert torch.equal(model(x), before)
    # merged, in every way
    merged = convlora.merged_state_dict(model)
    assert same_state(base_state(model), state)
    by_value = convlora.adapter(model).apply_to(state)
    assert torch.equal(convlora.merge(model)(x), y)
    assert torch.equal(convlora.unmerge(model)(x), y)
    plain = convlora.remove(convlora.merge(fresh))
    assert type(plain) is type(base)
    assert torch.equal(plain(x), y)
    assert same_state(plain.state_dict(), merged)
    assert same_state(by_value, merged)
    other = copy.deepcopy(base)
    other.load_state_dict(merged, strict=True)
    assert torch.equal(other(x), y)
    # removed: the base
    removed = convlora.remove(model)
    assert torch.equal(removed(x), before)
    assert same_state(removed.state_dict(), state)
    assert all(type(a) is type(b) for a, b in zip(removed.modules(), base.modules(), strict=True))


def test_the_command_merges_bitwise(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    base, model, _ = adapted("unet")
    torch.save(base.state_dict(), tmp_path / "base.pth")
    convlora.save(model, tmp_path / "a.safetensors")
    files = [str(tmp_path / name) for name in ("base.pth", "a.safetensors", "merged.pth")]
    result = CliRunner().invoke(app, ["merge", *files[:2], "-o", files[2]])
    assert result.exit_code == 0
    assert same_state(torch.load(files[2]), convlora.merged_state_dict(model))


def two_tasks() -> tuple[nn.Module, nn.Module, Tensor]:
    """A U-Net with two adapters that were trained one after the other, and the base."""
    base, targets, saved, x = made("unet")
    model = copy.deepcopy(base)
    for name, shift in (("a", 0.0), ("b", 3.0)):
        convlora.inject(model, targets, rank=1, modules_to_save=saved, name=name)
        convlora.activate(model, name)
        trained(model, x + shift, convlora.parameters(model, name), steps=5)
    return base, model, x


@torch.no_grad()
def test_two_tasks_on_one_base_switch_bitwise() -> None:
    with torch.enable_grad():
        base, model, x = two_tasks()
    first, second = (convlora.activate(model, name)(x) for name in ("a", "b"))
    assert not torch.equal(first, second)
    for name, y in (("a", first), ("b", second), ("a", first)):
        assert torch.equal(convlora.activate(model, name)(x), y)
        with convlora.using(model, "b" if name == "a" else "a"):
            assert torch.equal(model(x), second if name == "a" else first)
    assert torch.equal(convlora.activate(model, [])(x), base(x))
    assert same_state(base_state(model), base.state_dict())


@torch.no_grad()
def test_strengths_mix_copies_with_the_base() -> None:
    with torch.enable_grad():
        base, model, _ = two_tasks()
    copies = [slot_of(model.fc).copies()[name].tensor("weight") for name in ("a", "b")]
    w, counted = base.fc.weight, slot_of(model.down[1]).copies()["b"].tensor("num_batches_tracked")
    convlora.activate(model, {"a": 0.5})
    torch.testing.assert_close(model.fc.weight, w + 0.5 * (copies[0] - w))
    convlora.activate(model, {"a": 0.5, "b": -2.0})
    expected = w + 0.5 * (copies[0] - w) - 2.0 * (copies[1] - w)
    torch.testing.assert_close(model.fc.weight, expected)
    assert torch.equal(model.down[1].num_batches_tracked, counted)
    mean = base.down[1].running_mean
    expected = mean + sum(
        s * (slot_of(model.down[1]).copies()[n].tensor("running_mean") - mean) for n, s in (("a", 0.5), ("b", -2.0))
    )
    torch.testing.assert_close(model.down[1].running_mean, expected)
    by_value = {n: convlora.adapter(model, n) for n in ("a", "b")}
    one = by_value["a"].apply_to(base.state_dict(), 0.5)
    assert same_state(one, convlora.merged_state_dict(model, {"a": 0.5}))


@pytest.mark.parametrize("second", [{"modules_to_save": "fc"}, {}, {"norm_statistics": "frozen"}])
@torch.no_grad()
def test_a_second_adapter_starts_bitwise_beside_a_copy(second: dict[str, Any]) -> None:
    with torch.enable_grad():
        _, model, x = adapted("unet")
    y = model(x)
    convlora.inject(
        model, "*", rank=1, name="second", exclude=("fc",) if second.get("modules_to_save") else (), **second
    )
    assert torch.equal(model(x), y)
    together, alone = convlora.merged_state_dict(model), convlora.merged_state_dict(model, ["default"])
    counters = {key for key, value in alone.items() if not value.is_floating_point()}  # of several, the last one's
    assert all(torch.equal(together[key], alone[key]) for key in alone.keys() - counters)


def test_a_hot_swap_keeps_whose_statistics_move() -> None:
    base, model, _ = adapted("unet")
    targets, saved_modules = NETS["unet"][1:]
    frozen = convlora.inject(base, targets, rank=1, modules_to_save=saved_modules, norm_statistics="frozen")
    convlora.load(model, convlora.adapter(frozen))
    assert convlora.adapters(model)["default"].norm_statistics == "adapter"


def test_statistics_of_several_adapters_move_for_the_one_that_trains() -> None:
    base, model, x = two_tasks()
    convlora.activate(model, ["a", "b"])
    with pytest.raises(ConvLoRAError, match="act together and 2 of them train, so statistics cannot move"):
        model.train()(x)
    for p in convlora.parameters(model, "a"):
        p.requires_grad_(False)
    still, moving = (slot_of(model.down[1]).copies()[name].tensor("running_mean") for name in ("a", "b"))
    before = still.clone(), moving.clone()
    model(x)
    assert torch.equal(still, before[0])
    assert not torch.equal(moving, before[1])
    assert same_state(base_state(model), base.state_dict())


@torch.no_grad()
def test_the_base_gets_another_head(tmp_path: Path) -> None:
    base, _, _, x = made("resnet")
    model = copy.deepcopy(base)
    model.fc = nn.Linear(512, 7)
    with torch.enable_grad():
        trained(convlora.inject(model, "layer*", rank=1, modules_to_save="fc"), x, steps=3)
    convlora.save(model, tmp_path / "a.safetensors")
    loaded = convlora.load(copy.deepcopy(base), tmp_path / "a.safetensors").eval()
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(ConvLoRAError, match=r"'fc.weight' in another shape than the base"):
        convlora.activate(loaded, {"default": 0.5})
    assert torch.equal(loaded(x), model(x))
    assert torch.equal(convlora.activate(loaded, [])(x), base(x))
    plain = convlora.remove(convlora.merge(convlora.activate(loaded, "default")))
    assert plain.fc.weight.shape == (7, 512)
    assert torch.equal(plain(x), model(x))
    assert Adapter.read(tmp_path / "a.safetensors").apply_to(base.state_dict())["fc.weight"].shape == (7, 512)


def test_tied_modules_stay_tied_or_it_is_said() -> None:
    base, model, _ = adapted("tied")
    assert slot_of(model.fc).copies()["default"].tensor("weight") is slot_of(model.out).copies()["default"].tensor(
        "weight"
    )
    plain = convlora.remove(convlora.merge(model))
    assert plain.fc.weight is plain.out.weight
    with pytest.warns(ConvLoRAWarning, match=r"out.weight shared with modules_to_save"):
        convlora.inject(base, "body", rank=1, modules_to_save="fc")


@pytest.mark.parametrize("how", ["deepcopy", "averaged", "pickle", "half", "compiled"])
def test_copies_survive(how: str, tmp_path: Path) -> None:
    _, model, x = adapted("unet")
    y = model(x).detach()
    with torch.no_grad():
        if how == "deepcopy":
            assert torch.equal(copy.deepcopy(model)(x), y)
        elif how == "averaged":
            averaged = AveragedModel(model)
            averaged.update_parameters(model)
            assert torch.equal(averaged(x), y)
        elif how == "pickle":
            again = torch.load(io.BytesIO(saved(model)), weights_only=False)
            assert torch.equal(again(x), y)
        elif how == "half":
            torch.testing.assert_close(model.bfloat16()(x.bfloat16()).float(), y, atol=0.2, rtol=0.1)
            assert slot_of(model.fc).copies()["default"].tensor("weight").dtype == torch.bfloat16
        else:
            torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), y)


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def test_a_whole_model_is_unpickled_in_a_fresh_process(tmp_path: Path) -> None:
    model = convlora.inject(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "0", rank=1, modules_to_save=nn.BatchNorm2d
    )
    x = torch.randn(2, 3, 6, 6)
    trained(model, x, steps=2)
    torch.save((model, x, model(x).detach()), tmp_path / "model.pt")
    code = (
        f"import torch; torch.set_num_threads({torch.get_num_threads()});"  # another number rounds differently
        f" m, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); assert m(x).equal(y)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_compiled_training_moves_the_copies_alone() -> None:
    base, targets, saved_modules, x = made("unet")
    model = convlora.inject(copy.deepcopy(base), targets, rank=1, modules_to_save=saved_modules)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    trained(compiled, x, convlora.parameters(model), steps=3)
    assert same_state(base_state(model), base.state_dict())
    assert slot_of(model.down[1]).copies()["default"].tensor("num_batches_tracked").item() == 3


def test_bf16_training_is_bitwise_through_the_file(tmp_path: Path) -> None:
    base, targets, saved_modules, x = made("unet")
    base, x = base.bfloat16(), x.bfloat16()
    model = trained(convlora.inject(copy.deepcopy(base), targets, rank=1, modules_to_save=saved_modules), x)
    convlora.save(model, tmp_path / "a.safetensors")
    loaded = convlora.load(copy.deepcopy(base), tmp_path / "a.safetensors").eval()
    assert torch.equal(loaded(x), model(x))
    assert loaded.fc.weight.dtype == torch.bfloat16


def test_saving_in_half_precision_keeps_integers(tmp_path: Path) -> None:
    _, model, _ = adapted("unet")
    convlora.save(model, tmp_path / "a.safetensors", dtype=torch.float16)
    modules = Adapter.read(tmp_path / "a.safetensors").modules
    assert modules["fc"]["weight"].dtype == torch.float16
    assert modules["down.1"]["num_batches_tracked"].dtype == torch.int64


def _trains_under_ddp(rank: int, folder: str) -> dict[str, Any]:
    """What one of two processes has after three steps, each on images of its own."""
    base, targets, saved_modules, x = made("unet")
    model = convlora.inject(copy.deepcopy(base), targets, rank=1, modules_to_save=saved_modules)
    trained(nn.parallel.DistributedDataParallel(model), x + rank, convlora.parameters(model), steps=3)
    convlora.save(nn.parallel.DistributedDataParallel(model), f"{folder}/a.safetensors")
    with torch.no_grad():
        y = model(x)
    return {
        "same base": same_state(base_state(model), base.state_dict()),
        "output": y,
        "changed": convlora.changed(model),
    }


def test_two_processes_train_one_adapter_with_its_copies(tmp_path: Path) -> None:
    found = in_processes(tmp_path, _trains_under_ddp, str(tmp_path))
    base, _, _, x = made("unet")
    loaded = convlora.load(base, tmp_path / "a.safetensors").eval()
    for each in found:
        assert each["same base"]
        assert each["changed"] == []
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), found[0]["output"])  # threads round differently


# --- norms -----------------------------------------------------------------------------------------------------------


def test_who_keeps_statistics_is_told_by_the_buffers() -> None:
    every = ["num_batches_tracked", "running_mean", "running_var"]
    for norm in (
        nn.BatchNorm1d(4),
        nn.BatchNorm3d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, track_running_stats=True),
    ):
        assert sorted(statistics_names(norm)) == every
    for other in (nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.Conv2d(3, 4, 3)):
        assert statistics_names(other) == []
    layers = pytest.importorskip("timm.layers")
    assert sorted(statistics_names(layers.BatchNormAct2d(4))) == every


@pytest.mark.parametrize("compiled", [False, True])
def test_frozen_statistics_are_nobodys(compiled: bool) -> None:
    if compiled and TORCH < (2, 14):
        pytest.skip("Dynamo of PyTorch 2.6 cannot trace a property named training; between, it was not tried")
    base, targets, saved_modules, x = made("unet")
    model = convlora.inject(
        copy.deepcopy(base), targets, rank=1, modules_to_save=saved_modules, norm_statistics="frozen"
    )
    expected = model(x).detach()
    run: Any = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    torch.testing.assert_close(run.train()(x), expected)  # normalises with the base's statistics, dropout apart
    trained(run, x, convlora.parameters(model), steps=3)
    assert same_state(base_state(model), base.state_dict())
    assert "down.1" not in convlora.adapter(model).modules
    assert convlora.load(copy.deepcopy(base), convlora.adapter(model)).train()(x).equal(model.train()(x))
    assert convlora.remove(model).down[1].training


def test_statistics_of_the_base_move_with_a_warning_and_are_named(tmp_path: Path) -> None:
    base, targets, saved_modules, x = made("unet")
    with pytest.warns(ConvLoRAWarning, match="the statistics of 2 modules"):
        model = convlora.inject(base, targets, rank=1, modules_to_save=saved_modules, norm_statistics="base")
    trained(model, x, steps=1)
    with pytest.warns(ConvLoRAWarning, match=r"save: 6 Parameters or buffers .*: down\.1\.running_mean"):
        convlora.save(model, tmp_path / "a.safetensors")


def test_update_bn_is_adabn_on_the_acting_adapter() -> None:
    base, targets, _, x = made("unet")
    model = convlora.inject(copy.deepcopy(base), targets, rank=1, name="target")
    update_bn([x, x + 1], model)
    assert same_state(base_state(model), base.state_dict())
    assert model.down[1].num_batches_tracked.item() == 2
    assert not torch.equal(model.down[1].running_mean, base.down[1].running_mean)


class Average(nn.Module):
    """Keeps a moving average by assignment, as some quantisers do."""

    ema: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.ema = self.ema * 0.5 + x.detach().mean()
        return x - self.ema


def test_a_buffer_that_is_assigned_moves_the_copy() -> None:
    model = convlora.inject(
        nn.Sequential(nn.Conv2d(1, 8, 3), Average()), "0", rank=1, factors="locon", modules_to_save="1"
    )
    model.train()(torch.ones(2, 1, 4, 4))
    assert base_state(model)["1.ema"].item() == 0
    assert model[1].ema.item() != 0
    assert convlora.adapter(model).modules["1"]["ema"].equal(model[1].ema)


# --- files and values ------------------------------------------------------------------------------------------------


def test_only_what_needs_it_has_format_version_2(tmp_path: Path) -> None:
    from safetensors import safe_open

    def version(model: nn.Module) -> str:
        convlora.save(model, tmp_path / "a.safetensors")
        with safe_open(tmp_path / "a.safetensors", "pt") as file:
            return file.metadata()["convlora.format_version"]  # type: ignore[no-any-return]

    base, model, _ = adapted("unet")
    assert version(model) == "2"
    assert version(convlora.inject(base, "down.0", rank=1)) == "1"  # no statistics have moved


def test_a_hot_swap_takes_the_copies_along() -> None:
    base, model, x = two_tasks()
    first, second = (convlora.adapter(model, name).config for name in ("a", "b"))
    assert first.name != second.name
    adapters = [convlora.adapter(model, name) for name in ("a", "b")]
    outputs = [convlora.activate(model, name)(x).detach() for name in ("a", "b")]
    live = convlora.load(copy.deepcopy(base), adapters[0], name="task").eval()
    ids = [id(p) for p in convlora.parameters(live)]
    for adapter, y in zip([adapters[1], adapters[0]], [outputs[1], outputs[0]], strict=True):
        convlora.load(live, adapter, name="task")
        assert torch.equal(live(x), y)
    assert ids == [id(p) for p in convlora.parameters(live)]


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a module that is not there": (lambda m: m.update({"nowhere": m["fc"]}), "unexpected: nowhere"),
    "a tensor too many": (lambda m: m["fc"].update(scale=torch.ones(2)), r"fc \(the file has scale"),
    "a tensor too few": (lambda m: m["fc"].pop("bias"), r"fc \(the file lacks bias\)"),
    "statistics of another size": (lambda m: m["down.1"].update(running_mean=torch.ones(3)), r"down.1 \(the file has"),
    "numbers of another kind": (
        lambda m: m["fc"].update(bias=torch.ones(2).cfloat()),
        r"of torch.complex64, the model of",
    ),
    "another number of dimensions": (
        lambda m: m["fc"].update(weight=torch.ones(2)),
        r"fc \(the file has weight \(2,\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_copies_that_do_not_fit_are_one_error_and_nothing_changes(case: str) -> None:
    base, model, _ = adapted("unet")
    value = convlora.adapter(model)
    modules = {path: dict(tensors) for path, tensors in value.modules.items()}
    change, message = BROKEN[case]
    change(modules)
    before = {key: t.clone() for key, t in base.state_dict().items()}
    with pytest.raises(ConvLoRAError, match=message):
        convlora.load(base, Adapter(value.config, value.layers, value.fingerprint, modules=modules))
    assert convlora.adapters(base) == {}
    assert same_state(base.state_dict(), before)
    assert all(p.requires_grad for p in base.parameters())


def test_values_that_are_not_finite_are_refused() -> None:
    _, model, _ = adapted("unet")
    with torch.no_grad():
        model.fc.bias[0] = torch.nan
    with pytest.raises(ConvLoRAError, match=r"non-finite: fc\.bias"):
        convlora.adapter(model)


def test_combine_averages_copies_and_keeps_the_rest() -> None:
    _, model, _ = two_tasks()
    one, other = convlora.adapter(model, "a"), convlora.adapter(model, "b")
    both = Adapter.combine([one, other], [0.25, 0.75])
    expected = 0.25 * one.modules["fc"]["weight"] + 0.75 * other.modules["fc"]["weight"]
    torch.testing.assert_close(both.modules["fc"]["weight"], expected)
    with pytest.raises(ConvLoRAError, match="weights that sum to 2 instead of 1"):
        Adapter.combine([one, other], [1, 1])
    for same in (one.resize(rank=1), one.refactor("locon"), one.to(torch.float32)):
        assert same.modules.keys() == one.modules.keys()


def test_per_sample_refuses_copies_that_have_moved() -> None:
    base, model, x = two_tasks()
    refused = pytest.raises(ConvLoRAError, match=r"\['a', 'b'\] have whole modules of their own")
    with refused, convlora.per_sample(model, ["a", "b", None, "a"]):
        pass
    plain = convlora.inject(base, "down.0", rank=1)  # statistics that are the base's do not count
    with torch.no_grad(), convlora.per_sample(plain, ["default", None, None, "default"]):
        plain(x)


def test_summary_and_audit_know_of_copies() -> None:
    _, model, x = adapted("unet")
    report = convlora.summary(model)
    head = next(row for row in report.layers if row.name == "fc")
    assert (head.factors, head.rank, head.parameters, head.share) == ("copy", 0, 34, 1.0)
    assert report.statistics == {"default": 2}
    assert report.trainable == sum(p.numel() for p in convlora.parameters(model))
    assert "'default' has running statistics of 2 modules" in str(report)
    assert convlora.audit(model, x).ok
    model.fc.forward = lambda x: x
    assert "fc" in convlora.audit(model, x).problems


def test_patterns_of_modules_to_save_are_checked() -> None:
    base, _, _, _ = made("unet")
    for saved_modules, message in (
        ("head", "modules_to_save 'head' selects no module; nearest"),
        ("down.2", "hold no tensors"),
    ):
        with pytest.raises(ConvLoRAError, match=message):
            convlora.inject(base, "*", rank=1, modules_to_save=saved_modules)
    with pytest.raises(ConvLoRAError, match="modules_to_save leaves no layer"):
        convlora.inject(base, "fc", rank=1, modules_to_save="fc")
    with pytest.raises(ConvLoRAError, match="norm_statistics"):
        convlora.inject(base, "*", rank=1, norm_statistics="mine")
    assert convlora.adapters(base) == {}
    convlora.inject(base, "*", rank=1, modules_to_save=nn.BatchNorm2d)
    assert list(convlora.adapters(base)["default"].modules_to_save) == ["re:down\\.1", "re:deep\\.1"]
