"""segment.py: its images, its measure and its self-training, and the script as a user runs it."""

# ruff: noqa: E402  (the examples import from their own folder)

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer
from torch import Tensor

pytest.importorskip("skimage")
pytest.importorskip("matplotlib")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import segment as example
from PIL import Image as PilImage
from promises import check_promises, is_default_run
from safetensors.torch import load_file
from segmentation.cells import SOURCE, TARGET, Cells, draw
from segmentation.report import FOUND, MISSED, WRONG, paint
from segmentation.training import BATCH, CROP, dice, random_crops, segment, train
from segmentation.unet import EARLY, EarlyHead, UNet

import convlora

# As in the script: the first convolution has fewer weights than an adapter of it.
pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters")


@pytest.fixture(scope="module")
def target() -> Cells:
    return draw(TARGET, 10, seed=5)


def states(*modules: torch.nn.Module) -> list[dict[str, Tensor]]:
    return [copy.deepcopy(module.state_dict()) for module in modules]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_depend_on_the_seed_alone_and_have_eight_bits(target: Cells) -> None:
    np.random.default_rng(1).normal(size=10)
    again, other = draw(TARGET, 3, seed=5), draw(TARGET, 3, seed=6)
    assert torch.equal(again.images, target.images[:3])
    assert not torch.equal(again.images, other.images)
    assert again.images.shape == again.masks.shape == (3, 1, 96, 96)
    levels = again.images * 255
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert again.images.min() >= 0
    assert again.images.max() <= 1


def test_both_microscopes_see_the_same_tissue_with_other_contrast_on_other_ground(target: Cells) -> None:
    source = draw(SOURCE, 10, seed=5)
    assert torch.equal(source.masks, target.masks)
    assert 0.05 < source.masks.mean() < 0.3
    for images, masks in ((source.images, source.masks), (target.images, target.masks)):
        assert images[masks > 0].mean() > images[masks == 0].mean()
    ground, brighter = (cells.images[cells.masks == 0].mean() for cells in (source, target))
    assert brighter > ground + 0.02
    contrast, less = (
        cells.images[cells.masks > 0].mean() - cells.images[cells.masks == 0].mean() for cells in (source, target)
    )
    assert less < 0.75 * contrast


def test_the_target_scan_adds_lines(target: Cells) -> None:
    def along_over_across(images: Tensor) -> float:
        return float(images.diff(dim=2).mean(3).var() / images.diff(dim=3).mean(2).var())

    assert along_over_across(target.images) > 5 * along_over_across(draw(SOURCE, 10, seed=5).images)


def test_crops_of_images_and_masks_show_the_same_place(target: Cells) -> None:
    batches = list(random_crops((target.images, target.images + 1), 4, seed=0))
    assert len(batches) == 4
    for images, others in batches:
        assert images.shape == (BATCH, 1, CROP, CROP)
        assert torch.equal(images + 1, others)
    repeated = list(random_crops((target.images,), 4, seed=0))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(batches, repeated, strict=True))
    assert not torch.equal(batches[0][0], batches[1][0])


# --- measure and picture ----------------------------------------------------------------------------------------------


def test_dice_is_twice_the_overlap_over_the_sizes_averaged_over_images() -> None:
    logits, masks = torch.randn(5, 1, 8, 8), (torch.rand(5, 1, 8, 8) > 0.6).float()
    expected = []
    for image, mask in zip(logits[:, 0].numpy() > 0, masks[:, 0].numpy() > 0, strict=True):
        expected.append(2 * (image & mask).sum() / (image.sum() + mask.sum()))
    assert dice(logits, masks) == pytest.approx(np.mean(expected), abs=1e-6)
    assert dice(-torch.ones(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)) == 1
    assert dice(-torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 4)) == 0


def test_the_picture_tells_found_missed_and_wrong() -> None:
    logits, mask = torch.tensor([[[1.0, -1.0], [1.0, -1.0]]]), torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    assert paint(logits, mask).tolist() == [[list(FOUND), list(MISSED)], [list(WRONG), [0, 0, 0]]]


def test_a_broken_promise_is_named_and_exits_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    check_promises({"water is wet": True})
    with pytest.raises(typer.Exit) as left:
        check_promises({"water is wet": True, "pigs fly": False})
    assert left.value.exit_code == 1
    assert capsys.readouterr().err == "failed: pigs fly\n"


# --- network and self-training ----------------------------------------------------------------------------------------


def test_early_features_are_those_of_the_whole_pass() -> None:
    model = UNet(4).eval()
    images = torch.rand(2, 1, 32, 24)
    features, logits = model.features_and_logits(images)
    assert torch.equal(features, model.early_features(images))
    assert torch.equal(logits, model(images))
    assert logits.shape == images.shape
    assert EarlyHead(features.shape[1])(features).shape == images.shape


def test_self_training_changes_nothing_but_the_adapter_and_its_statistics(target: Cells) -> None:
    model, head = UNet(4), EarlyHead(4 * 2**EARLY)
    base, frozen_head = states(model, head)
    convlora.inject(model, example.ENCODER, rank=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    example.self_train(model, head, target.images, convlora.parameters(model), steps=3, rate=1e-2, seed=0)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.endswith("lora_B") for name in moved)
    assert any(name.endswith("running_mean") for name in moved)
    assert all(".convlora." in name for name in moved)
    assert equal(head.state_dict(), frozen_head)
    assert equal(convlora.remove(model).state_dict(), base)


def test_frozen_statistics_stay_and_are_not_in_the_file(target: Cells, tmp_path: Path) -> None:
    model, head = UNet(4), EarlyHead(4 * 2**EARLY)
    convlora.inject(model, example.ENCODER, rank=2, norm_statistics="frozen")
    example.self_train(model, head, target.images, convlora.parameters(model), steps=2, rate=1e-2, seed=0)
    convlora.save(model, tmp_path / "adapter.safetensors")
    assert not any("running" in name for name in load_file(tmp_path / "adapter.safetensors"))


def test_self_training_lets_the_head_agree_with_the_output(target: Cells) -> None:
    model, head = UNet(4), EarlyHead(4 * 2**EARLY)
    masks = target.masks
    train(
        model.parameters(), lambda batch, masks: example.cross_entropy(model(batch), masks), target.images, masks,
        steps=8, rate=1e-2, seed=0,
    )  # fmt: skip

    def disagreement() -> float:
        model.train()
        with torch.no_grad():
            features, logits = model.features_and_logits(target.images)
            return float(example.cross_entropy(head(features), logits.sigmoid()))

    head.eval()
    before = disagreement()
    tuned = list(model.encoder[: EARLY + 1].parameters())
    example.self_train(model, head, target.images, tuned, steps=8, rate=1e-2, seed=0)
    assert disagreement() < before


def test_pseudo_labels_pass_no_gradient(target: Cells) -> None:
    model, head = UNet(4), EarlyHead(4 * 2**EARLY)
    example.self_train(model, head, target.images, list(model.parameters()), steps=1, rate=1e-2, seed=0)
    reached = {name.split(".")[0] + name.split(".")[1] for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {f"encoder{block}" for block in range(EARLY + 1)}


# --- the script as a user runs it -------------------------------------------------------------------------------------


def run_script(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(ROOT / "examples/segment.py"), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1", "PYTHONWARNINGS": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict[str, Any]]:
    """(what it printed, where it wrote, results.json) of two seeds with a few steps."""
    out = tmp_path_factory.mktemp("segment")
    result = run_script(
        *("--seeds", "2", "--images", "8", "--base-steps", "20", "--head-steps", "3", "--steps", "2"),
        *("--threads", "1", "--out", str(out)),
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout, out, json.loads((out / "results.json").read_text())


def test_the_script_shows_every_method_and_holds_its_checks(short_run: tuple[str, Path, dict[str, Any]]) -> None:
    printed, _, results = short_run
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == [
        *("base, source images", "base", "AdaBN", "ConvLoRA", "ConvLoRA + AdaBN"),
        *("all weights + AdaBN", "with target labels"),
    ]
    for row in rows.values():
        assert len(row["dice"]) == 2
        assert f"{np.mean(row['dice']):.3f}" in printed
    assert rows["AdaBN"]["trained_parameters"] == 0
    assert rows["ConvLoRA"]["trained_parameters"] == rows["ConvLoRA + AdaBN"]["trained_parameters"] > 0
    assert rows["ConvLoRA + AdaBN"]["bytes"] < rows["all weights + AdaBN"]["bytes"] / 10
    assert "4 checks hold" in printed
    assert results["options"]["judge"] == "held-out"
    assert results["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize(("stem", "name"), [("adabn", "AdaBN"), ("convlora", "ConvLoRA"), ("both", "ConvLoRA + AdaBN")])
def test_what_the_script_wrote_gives_its_figures_again(
    short_run: tuple[str, Path, dict[str, Any]], stem: str, name: str
) -> None:
    _, out, results = short_run
    judged = draw(TARGET, 24, seed=13)
    model = UNet()
    model.load_state_dict(load_file(out / "base_1.safetensors"))
    figures = {row["name"]: row["dice"][1] for row in results["rows"]}
    assert dice(segment(model, judged.images), judged.masks) == pytest.approx(figures["base"], abs=1e-5)
    convlora.load(model, out / f"{stem}_1.safetensors")
    assert dice(segment(model, judged.images), judged.masks) == pytest.approx(figures[name], abs=1e-5)


def test_the_script_draws_three_images(short_run: tuple[str, Path, dict[str, Any]]) -> None:
    with PilImage.open(short_run[1] / "segment.png") as picture:
        assert picture.size[0] > 800
        assert picture.size[1] > 400


def test_only_a_default_run_promises_gains(short_run: tuple[str, Path, dict[str, Any]]) -> None:
    assert "gain" not in short_run[0]
    command = typer.main.get_command(example.app)
    for options, promised in (([], True), (["--threads", "1", "--out", "x"], True), (["--steps", "150"], False)):
        assert is_default_run(command.make_context("segment", options), ("threads", "out")) is promised
