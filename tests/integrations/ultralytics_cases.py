"""`callbacks` in a trainer of ultralytics: what trains, averages, files, resuming, validation and prediction."""

from __future__ import annotations

import copy
import pickletools
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import convlora
from convlora import Adapter, AdapterConfig, ConvLoRAError

try:
    from ultralytics import YOLO, settings
except ImportError as missing:
    pytest.skip(str(missing), allow_module_level=True)

from convlora.integrations.ultralytics import STATE, callbacks

CONFIG = AdapterConfig(targets="*.conv", exclude="*.dfl.*", rank=1, modules_to_save="re:model\\.22\\.cv3\\.\\d\\.2")
QUIET: dict[str, Any] = {
    "imgsz": 64, "batch": 2, "workers": 0, "plots": False, "amp": False, "verbose": False, "device": "cpu",
    "optimizer": "SGD", "lr0": 0.05, "warmup_epochs": 0, "nbs": 2, "exist_ok": True, "rect": True,
}  # fmt: skip
STILL = dict.fromkeys(("mosaic", "hsv_h", "hsv_s", "hsv_v", "fliplr", "translate", "scale", "erasing"), 0.0)
EPOCHS = 3


@pytest.fixture(scope="module")
def data(detection: Path) -> Path:
    settings.update(sync=False)
    return detection


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint to start from. Its values are no half precision, as those of a fresh network."""
    torch.manual_seed(3)
    yolo = YOLO("yolov8n.yaml")
    for module in yolo.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
    path = tmp_path_factory.mktemp("base") / "base.pt"
    torch.save({"model": yolo.model, "train_args": {}}, path)
    return path


class Interrupted(Exception):
    """What ends a run in its middle."""


def train(base: Path, data: Path, folder: Path, hooks: dict[str, Any] | None = None, **options: Any) -> Any:
    """The YOLO object after a run."""
    config, merged = options.pop("config", CONFIG), options.pop("merged", None)
    yolo = YOLO(base)
    for event, callback in callbacks(config, merged=merged).items():
        yolo.add_callback(event, callback)
    for event, callback in (hooks or {}).items():
        yolo.add_callback(event, callback)
    settings = {**QUIET, **STILL, "epochs": EPOCHS, "project": str(folder), "name": "run", "data": str(data), **options}
    yolo.train(**settings)
    return yolo


@pytest.fixture(scope="module")
def run(base: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, dict[str, Any]]:
    """A finished run, its folder of weights, and what its trainer had at each epoch."""
    folder, seen = tmp_path_factory.mktemp("ultralytics"), {"merged": [], "saved": []}

    def look(trainer: Any) -> None:
        seen["trainer"] = trainer
        seen.setdefault("base", {k: v.clone() for k, v in trainer.model.state_dict().items() if ".convlora." not in k})

    def keep(trainer: Any) -> None:
        seen["saved"].append(torch.load(trainer.last, weights_only=False))
        seen["merged"].append(convlora.merged_state_dict(trainer.ema.ema))

    hooks = {"on_train_start": look, "on_model_save": keep}
    yolo = train(base, data, folder, hooks, merged=folder / "merged.safetensors", save_period=1)
    return yolo, folder / "run" / "weights", seen


def state_of(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=False)["model"].state_dict()  # type: ignore[no-any-return]


def raw(model: nn.Module) -> Tensor:
    """The head's output before it is decoded, for a fixed image."""
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        output = copy.deepcopy(model).float().eval()(image)
    return output[0] if isinstance(output, tuple) else output


def names_the_library(path: Path) -> bool:
    """Whether a pickle needs this library to be read."""
    with zipfile.ZipFile(path) as archive:
        (pickled,) = (name for name in archive.namelist() if name.endswith("data.pkl"))
        said = [argument for _, argument, _ in pickletools.genops(archive.read(pickled))]
    return any(isinstance(argument, str) and argument.startswith("convlora") for argument in said)


def plain(data: Path, base: Path) -> nn.Module:
    """The network that the trainer makes: that of the base, with a head for two classes."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    overrides = {**QUIET, "model": str(base), "data": str(data), "project": tempfile.mkdtemp()}
    return DetectionTrainer(overrides=overrides).get_model(YOLO(base).model.yaml, YOLO(base).model, False)  # type: ignore[no-any-return]


def test_exactly_the_adapter_is_trained(run: tuple[Any, Path, dict[str, Any]]) -> None:
    _, _, seen = run
    trainer = seen["trainer"]
    after = trainer.model.state_dict()
    assert len(seen["base"]) > 300
    assert all(torch.equal(after[key], value) for key, value in seen["base"].items())
    assert convlora.changed(trainer.model) == []
    trainable = {id(p) for p in trainer.model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in convlora.parameters(trainer.model)}
    stepped = {id(p) for p, state in trainer.optimizer.state.items() if state}
    assert stepped == trainable
    grown = [p for name, p in trainer.model.named_parameters() if name.endswith("lora_B")]
    assert sum(bool(p.any()) for p in grown) > len(grown) / 2


def test_the_average_holds_the_adapter_and_the_base_itself(run: tuple[Any, Path, dict[str, Any]]) -> None:
    trainer = run[2]["trainer"]
    live, average = trainer.model.state_dict(), trainer.ema.ema.state_dict()
    assert live.keys() == average.keys()
    assert all(torch.equal(average[key], value) for key, value in run[2]["base"].items())
    moved = [key for key in live if ".convlora." in key and not torch.equal(live[key], average[key])]
    assert any(key.endswith("lora_B") for key in moved)
    assert any(key.endswith("running_mean") for key in moved)


def test_while_it_runs_files_hold_the_adapted_average(run: tuple[Any, Path, dict[str, Any]], tmp_path: Path) -> None:
    torch.save(run[2]["saved"][0], tmp_path / "adapted.pt")
    assert names_the_library(tmp_path / "adapted.pt")
    for checkpoint in run[2]["saved"]:
        assert set(convlora.adapters(checkpoint["ema"])) == {"default"}
    assert not (run[1] / STATE).exists()  # no more


def test_the_final_files_hold_plain_networks_with_the_original_keys(
    run: tuple[Any, Path, dict[str, Any]], data: Path, base: Path
) -> None:
    (_, weights, seen), net = run, plain(data, base)
    for name in ("last.pt", "best.pt", *(f"epoch{i}.pt" for i in range(EPOCHS))):
        checkpoint = torch.load(weights / name, weights_only=False)
        model = checkpoint["ema"] if checkpoint["ema"] is not None else checkpoint["model"]
        assert not any(type(module).__name__.startswith("Adapted") for module in model.modules()), name
        assert set(model.state_dict()) == set(seen["base"])
        net.load_state_dict(model.float().state_dict(), strict=True)
        assert not names_the_library(weights / name), name
    last = state_of(weights / "last.pt")
    for key, value in seen["merged"][-1].items():
        assert torch.equal(last[key], value.half() if value.is_floating_point() else value)


def test_the_adapter_file_and_the_merged_checkpoint_give_the_same_output(
    run: tuple[Any, Path, dict[str, Any]], data: Path, base: Path
) -> None:
    from safetensors.torch import load_file

    _, weights, seen = run
    net, merged = plain(data, base), plain(data, base)
    net.load_state_dict(seen["base"], strict=True)
    merged.load_state_dict(load_file(weights.parent.parent / "merged.safetensors"), strict=True)
    best = convlora.load(copy.deepcopy(net), weights / "best.safetensors")
    assert torch.equal(raw(best), raw(merged))
    assert (raw(merged) - raw(net)).abs().max() > 1e-3
    last = convlora.load(copy.deepcopy(net), weights / "last.safetensors")
    assert torch.equal(raw(last), raw(seen["trainer"].ema.ema))
    half = {key: value.float() for key, value in state_of(weights / "best.pt").items()}
    net.load_state_dict(half, strict=True)
    torch.testing.assert_close(raw(net), raw(merged), rtol=1e-2, atol=1e-2)


def test_validation_and_prediction_are_those_of_the_merged_network(
    run: tuple[Any, Path, dict[str, Any]], data: Path
) -> None:
    """Both fuse convolutions with their norms; in training, validation takes the adapted average as it is."""
    yolo, weights, seen = run
    assert not convlora.adapters(yolo.model)
    image = data.parent / "images" / "val" / "0.png"
    unfused = raw(YOLO(weights / "best.pt").model)
    yolo.predict(image, imgsz=64, conf=0.0, verbose=False)
    assert yolo.predictor.model.model.is_fused()
    torch.testing.assert_close(raw(yolo.predictor.model.model), unfused, rtol=1e-3, atol=1e-3)
    for key, value in YOLO(weights / "best.pt").val(data=str(data), plots=False, **VALIDATION).results_dict.items():
        if key != "fitness":
            assert value == pytest.approx(seen["trainer"].metrics[key], abs=1e-6), key


VALIDATION: dict[str, Any] = {"imgsz": 64, "batch": 4, "workers": 0, "device": "cpu", "verbose": False}


def test_resuming_gives_the_bits_of_a_run_without_a_break(
    run: tuple[Any, Path, dict[str, Any]], base: Path, data: Path, tmp_path: Path
) -> None:
    """Also of the base, which the trainer's own file rounds to half precision."""

    def stop(trainer: Any) -> None:
        if trainer.epoch == 0:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(base, data, tmp_path, {"on_fit_epoch_end": stop})
    last = tmp_path / "run" / "weights" / "last.pt"
    assert not torch.equal(state_in_run(last)["model.0.conv.weight"].float(), run[2]["base"]["model.0.conv.weight"])
    seen: dict[str, Any] = {}
    yolo = YOLO(last)
    for event, callback in callbacks(CONFIG).items():
        yolo.add_callback(event, callback)
    yolo.add_callback("on_train_end", lambda trainer: seen.update(trainer=trainer))
    yolo.train(resume=True)
    for resumed, whole in (
        (seen["trainer"].model, run[2]["trainer"].model),
        (seen["trainer"].ema.ema, run[2]["trainer"].ema.ema),
    ):
        for key, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[key], value), key


def state_in_run(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=False)["ema"].state_dict()  # type: ignore[no-any-return]


def test_after_a_loss_that_is_not_finite_the_base_is_still_exact(base: Path, data: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        seen.setdefault("base", {k: v.clone() for k, v in trainer.model.state_dict().items() if ".convlora." not in k})

    def spoil(trainer: Any) -> None:
        if trainer.epoch == 1 and not seen.get("spoilt"):
            seen["spoilt"] = True
            trainer.loss = torch.tensor(torch.nan)

    def end(trainer: Any) -> None:
        seen["trainer"] = trainer

    train(base, data, tmp_path, {"on_train_start": look, "on_train_batch_end": spoil, "on_train_end": end})
    assert seen["spoilt"]
    after = seen["trainer"].model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in seen["base"].items())
    assert convlora.changed(seen["trainer"].model) == []


@pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")
def test_what_the_trainer_is_told_to_freeze_stays_frozen(base: Path, data: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    hooks = {"on_train_end": lambda trainer: seen.update(trainer=trainer)}
    train(base, data, tmp_path, hooks, freeze=2, epochs=1, config=AdapterConfig(targets="*.conv", rank=1))
    trainable = {name for name, p in seen["trainer"].model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".convlora.default." in name for name in trainable)
    assert not any(name.startswith(("model.0.", "model.1.")) or ".dfl." in name for name in trainable)


def test_predicting_with_a_file_of_a_run_that_lasts_is_refused_until_it_is_merged(
    run: tuple[Any, Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    """Fusing a convolution with its norm would count the update twice."""
    torch.save(run[2]["saved"][-1], tmp_path / "last.pt")
    image = data.parent / "images" / "val" / "0.png"
    with pytest.raises(ConvLoRAError, match="merge"):
        YOLO(tmp_path / "last.pt").predict(image, imgsz=64, verbose=False)
    yolo = YOLO(tmp_path / "last.pt")
    live = raw(yolo.model)
    convlora.remove(convlora.merge(yolo.model))
    assert torch.equal(raw(yolo.model), live)
    yolo.predict(image, imgsz=64, conf=0.0, verbose=False)
    torch.testing.assert_close(raw(yolo.predictor.model.model), live, rtol=1e-3, atol=1e-3)


def test_an_adapter_of_the_file_holds_the_new_head(run: tuple[Any, Path, dict[str, Any]]) -> None:
    adapter = Adapter.read(run[1] / "best.safetensors")
    assert any(path.startswith("model.22.cv3.") for path in adapter.modules)
    assert "model.0.conv" in adapter.layers


def test_resuming_without_the_state_is_refused(base: Path, data: Path, tmp_path: Path) -> None:
    def stop(trainer: Any) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        train(base, data, tmp_path, {"on_fit_epoch_end": stop})
    (tmp_path / "run" / "weights" / STATE).unlink()
    yolo = YOLO(tmp_path / "run" / "weights" / "last.pt")
    for event, callback in callbacks(CONFIG).items():
        yolo.add_callback(event, callback)
    with pytest.raises(ConvLoRAError, match=rf"resume: '.*{STATE}' is missing"):
        yolo.train(resume=True)


def test_several_processes_are_refused() -> None:
    class Trainer:
        world_size = 2

    with pytest.raises(ConvLoRAError, match="callbacks: 2 processes; train in one"):
        callbacks(CONFIG)["on_pretrain_routine_start"](Trainer())
