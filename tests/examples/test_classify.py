"""classify.py: its data share nothing with what is held out, its methods do what the table says, and it runs."""

# ruff: noqa: E402  (the examples import from their own folder)

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

for needed in ("matplotlib", "PIL", "sklearn", "torchvision"):
    pytest.importorskip(needed)
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import classify
import torchvision
from classification import data
from classification.methods import full_fine_tuning, has_peft, linear_probe, peft_lora, with_new_head
from classification.network import SmallResNet
from classification.report import lines_of, percent
from classification.training import Training, accuracy, outputs, train
from PIL import Image as PilImage
from torch import nn

import convlora

TINY = Training(steps=2, batch=8)
needs_peft = pytest.mark.skipif(not has_peft(), reason="PEFT is not there")


@pytest.fixture(scope="module")
def tasks() -> dict[str, data.Task]:
    return {task.name: task for task in (data.letters_task(), data.digits_task(), data.greek_task())}


@pytest.fixture
def small(tasks: dict[str, data.Task]) -> data.Task:
    """The digits, judged by 64 of them."""
    digits = tasks["digits"]
    test = data.Labelled(digits.test.images[:64], digits.test.labels[:64])
    return data.Task(digits.name, digits.classes, digits.originals, test, digits.disturb)


@pytest.fixture(scope="module")
def fresh(tasks: dict[str, data.Task]) -> Callable[[], SmallResNet]:
    torch.manual_seed(0)
    base = SmallResNet(26)
    train(base, base.parameters(), tasks["letters"], TINY, 1e-3)

    def make() -> SmallResNet:
        model = SmallResNet(26)
        model.load_state_dict(base.state_dict())
        return model.eval()

    return make


# --- data -------------------------------------------------------------------------------------------------------------


def test_every_class_is_learned_and_judged(tasks: dict[str, data.Task]) -> None:
    counts = {
        name: (len(task.classes), len(task.originals.labels), len(task.test.labels)) for name, task in tasks.items()
    }
    assert counts == {"letters": (26, 468, 832), "digits": (10, 898, 899), "greek": (24, 288, 768)}
    for task in tasks.values():
        for part in (task.originals, task.test):
            assert part.labels.unique().tolist() == list(range(len(task.classes)))
            assert part.images.min() >= 0
            assert part.images.max() <= 1
        assert task.test.images.shape[1:] == (1, data.SIDE, data.SIDE)


def test_what_is_held_out_is_never_learned(tasks: dict[str, data.Task]) -> None:
    assert not {*data.STIX} & {*data.DEJAVU, *data.COMPUTER_MODERN}
    assert len({*data.DEJAVU}) == 12
    digits = tasks["digits"]
    learned = {image.numpy().tobytes() for image in data.enlarge(digits.originals.images, data.SIDE)}
    assert not learned & {image.numpy().tobytes() for image in digits.test.images}
    for search, full in ((data.digits_task(searching=True), digits), (data.greek_task(searching=True), tasks["greek"])):
        pool = {image.numpy().tobytes() for image in full.originals.images}
        assert {image.numpy().tobytes() for image in search.originals.images} < pool


def test_fonts_have_every_character(tasks: dict[str, data.Task]) -> None:
    missing = data.glyphs(data.DEJAVU + data.STIX + data.COMPUTER_MODERN, ["\U000f0000"]).images
    absent = {image.numpy().tobytes() for image in missing}
    for name, held_out in (("letters", data.LATIN), ("greek", data.GREEK)):
        for images in (tasks[name].originals.images, data.glyphs(data.STIX, held_out).images):
            drawn = [image.numpy().tobytes() for image in images]
            assert len({*drawn}) == len(drawn)
            assert not absent & {*drawn}


def test_batches_follow_their_seed(tasks: dict[str, data.Task]) -> None:
    for task in tasks.values():
        one, same, other = (task.batch(4, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
        assert torch.equal(one.images, same.images)
        assert torch.equal(one.labels, same.labels)
        assert not torch.equal(one.images, other.images)


def test_a_picture_that_is_not_turned_stays_upright() -> None:
    bar = torch.zeros(64, 1, data.DRAWN, data.DRAWN)
    bar[:, :, 8:24, 20:28] = 1
    turned = data.warp(bar, torch.Generator().manual_seed(0))
    assert (turned[:, 0, :8].sum((1, 2)) > turned[:, 0, 8:].sum((1, 2))).all()
    assert torch.isclose(turned.mean(), bar.mean(), rtol=0.2)


# --- network and training ---------------------------------------------------------------------------------------------


def test_the_network_is_torchvisions_but_for_width_and_stem() -> None:
    small, stock = SmallResNet(26), torchvision.models.resnet18()
    assert list(small.state_dict()) == list(stock.state_dict())
    assert sum(parameter.numel() for parameter in small.parameters()) == 703_242
    for (name, module), (_, wide) in zip(small.named_modules(), stock.named_modules(), strict=True):
        if isinstance(module, nn.Conv2d) and name != "conv1":
            assert (4 * module.in_channels, 4 * module.out_channels) == (wide.in_channels, wide.out_channels)
            assert (module.kernel_size, module.stride) == (wide.kernel_size, wide.stride)


def test_frozen_statistics_do_not_move(small: data.Task, fresh: Callable[[], SmallResNet]) -> None:
    for frozen in (True, False):
        model = with_new_head(fresh(), small)
        before = model.bn1.running_mean.clone()
        train(model, model.fc.parameters(), small, TINY, 1e-2, frozen_statistics=frozen)
        assert torch.equal(model.bn1.running_mean, before) == frozen
        assert not model.training


def test_training_learns(small: data.Task) -> None:
    torch.manual_seed(0)
    model = with_new_head(SmallResNet(26), small)
    train(model, model.parameters(), small, Training(steps=30), 3e-3)
    assert accuracy(outputs(model, small.test.images), small.test) > 0.4


def test_accuracy_counts_the_largest_logit() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [5.0, 4.0]])
    truth = data.Labelled(torch.zeros(4, 1, 1, 1), torch.tensor([1, 0, 0, 0]))
    assert accuracy(logits, truth) == 0.75


# --- methods ----------------------------------------------------------------------------------------------------------


def test_probe_and_full_fine_tuning_come_back_from_their_files(
    small: data.Task, fresh: Callable[[], SmallResNet], tmp_path: Path
) -> None:
    probe = linear_probe(fresh, small, TINY, tmp_path / "probe")
    full = full_fine_tuning(fresh, small, TINY, tmp_path / "full")
    assert (probe.trained, probe.base_back, probe.difference) == (1290, True, 0)
    assert (full.trained, full.base_back, full.difference) == (701_178, False, 0)
    assert probe.file_bytes < 6_000 < 2_800_000 < full.file_bytes


def test_without_peft_its_rows_are_left_out(
    small: data.Task, fresh: Callable[[], SmallResNet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classify, "has_peft", lambda: False)
    outcomes = classify.run_other_methods(fresh, small, TINY)
    assert [outcome.method for outcome in outcomes] == ["linear probe", "full fine-tuning"]


@needs_peft
def test_peft_loses_statistics_unless_the_batch_norms_are_saved(
    small: data.Task, fresh: Callable[[], SmallResNet], tmp_path: Path
) -> None:
    options = dict(targets=classify.IN_PEFT, rank=4)
    bare = peft_lora(fresh, small, TINY, tmp_path / "bare", modules_to_save=["fc"], **options)
    whole = peft_lora(fresh, small, TINY, tmp_path / "whole", modules_to_save=["fc", *classify.BATCH_NORMS], **options)
    assert bare.difference > 0
    assert not bare.base_back
    assert whole.difference == 0
    assert whole.base_back
    assert whole.trained == bare.trained + 2400


@pytest.mark.parametrize("factors", classify.RANKS)
def test_an_adapter_comes_back_from_its_file_and_leaves_the_base(
    factors: str, small: data.Task, fresh: Callable[[], SmallResNet], tmp_path: Path
) -> None:
    reached, live = classify.adapt(fresh, small, TINY, factors, tmp_path / "digits.safetensors")
    assert live.shape == (64, 10)
    assert reached.difference == 0
    assert reached.base_back
    served = convlora.load(fresh(), tmp_path / "digits.safetensors")
    assert torch.equal(outputs(served, small.test.images), live)
    convlora.activate(served, [])
    assert torch.equal(outputs(served, small.test.images), outputs(fresh(), small.test.images))


# --- the report, and the script as a user runs it ---------------------------------------------------------------------


def test_lines_keep_the_methods_apart(small: data.Task, fresh: Callable[[], SmallResNet], tmp_path: Path) -> None:
    runs = [linear_probe(fresh, small, Training(steps=1, batch=4, seed=seed), tmp_path / "probe") for seed in (0, 1)]
    runs.append(full_fine_tuning(fresh, small, TINY, tmp_path / "full"))
    lines = lines_of(runs)
    assert [line.method for line in lines] == ["linear probe", "full fine-tuning"]
    assert lines[0].accuracies("digits", "live") == [runs[0].live, runs[1].live]
    assert lines[0].largest("digits", "trained") == 1290
    assert (percent([0.5]), percent([0.5, 0.7])) == ("50.0", "60.0 ± 14.1")


def test_the_script_runs_and_writes_what_it_shows(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-W", "error", str(ROOT / "examples/classify.py"), "--steps", "2", "--base-steps", "2"),
        *("--threads", "1", "--out", str(tmp_path)),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1", "PYTHONWARNINGS": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    assert "6 checks hold" in result.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    methods = [
        "linear probe",
        "full fine-tuning",
        *(["PEFT", "PEFT, BatchNorms saved"] if has_peft() else []),
        *classify.NAMES.values(),
    ]
    assert [(reached["task"], reached["method"]) for reached in results["outcomes"]] == [
        (task, method) for task in ("digits", "greek") for method in methods
    ]
    for reached in results["outcomes"]:
        assert f"{100 * reached['live']:.1f}" in result.stdout
        assert f"{100 * reached['reloaded']:.1f}" in result.stdout
    ours = [reached for reached in results["outcomes"] if reached["method"] == "convlora"]
    for reached in ours:
        assert reached["file_bytes"] == (tmp_path / f"{reached['task']}-convlora-0.safetensors").stat().st_size
    with PilImage.open(tmp_path / "classify.png") as picture:
        assert min(picture.size) > 500
