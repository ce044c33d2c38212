"""SwinIR and RRDBNet in the examples: reading, starting, adapting and handing on, each variant that spandrel loads."""

# ruff: noqa: E402  (the examples import from their own folder)

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("spandrel")
pytest.importorskip("accelerate")
ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[3] / "shared/data"
sys.path.insert(0, str(ROOT / "examples"))

import evaluate
import pretrain
import rrdb as rrdb_script
import swinir as swinir_script
from PIL import Image as PilImage
from safetensors.torch import save_file
from spandrel import ModelLoader
from spandrel.architectures.Compact import Compact
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SwinIR import SwinIR
from sr.data import InputError, crop_to_multiple, image_files, read_image, to_tensor
from sr.degradations import clean, enlarge
from sr.metrics import psnr_y, quality
from sr.models import new_span, predict, provenance, save_span, upscale
from sr.networks import NETWORKS, load_any, network_of, new_rrdb, new_swinir, quiet
from sr.starts import balance_layers, start_rrdb, start_swinir
from test_examples import photo
from typer.testing import CliRunner

import convlora

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data pack is not there")
both = pytest.mark.parametrize("name", ["swinir", "rrdb"])
SCRIPTS = {"swinir": swinir_script, "rrdb": rrdb_script}
MAKE = {"swinir": lambda: new_swinir(8, depths=(2, 2)), "rrdb": lambda: new_rrdb(8)}
START = {"swinir": start_swinir, "rrdb": start_rrdb}
CARRIERS = {  # their first three outputs carry the image, or are silent
    "swinir": {"conv_first", "conv_after_body"},
    "rrdb": {"model.0", "model.1.sub.1", "model.3", "model.6", "model.8"},
}


def small_swinir(**options: object) -> SwinIR:
    usual = dict(img_size=16, embed_dim=8, depths=(2,), num_heads=(2,), window_size=8, mlp_ratio=2.0, upscale=2)
    with quiet():
        return SwinIR(**usual | options)


VARIANTS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "SwinIR, light-weight": ("swinir", lambda: small_swinir(upsampler="pixelshuffledirect")),
    "SwinIR, classical": ("swinir", lambda: small_swinir(upsampler="pixelshuffle", resi_connection="3conv")),
    "SwinIR, real-world": (
        "swinir",
        lambda: small_swinir(upsampler="nearest+conv", upscale=4, depths=(2, 2), num_heads=(2, 2)),
    ),
    "SwinIR, JPEG": ("swinir", lambda: small_swinir(img_size=14, window_size=7, img_range=255.0, upscale=1)),
    "SwinIR, unshuffled": (
        "swinir",
        lambda: small_swinir(upsampler="pixelshuffle", upscale=4, start_unshuffle=2),
    ),
    "ESRGAN x4": ("rrdb", lambda: ESRGAN(num_filters=8, num_blocks=2, scale=4)),
    "ESRGAN x1": ("rrdb", lambda: ESRGAN(num_filters=8, num_blocks=1, scale=1)),
    "ESRGAN+ x2": ("rrdb", lambda: ESRGAN(num_filters=8, num_blocks=1, scale=2, plus=True)),
    "Real-ESRGAN x2": ("rrdb", lambda: ESRGAN(in_nc=12, num_filters=8, num_blocks=1, scale=4, shuffle_factor=2)),
    "SPAN x2": ("span", lambda: new_span(8, scale=2)),
}


def of_real_esrgan(state: dict[str, torch.Tensor], blocks: int) -> dict[str, torch.Tensor]:
    """The state of an ESRGAN x4 under the names of the Real-ESRGAN repository."""
    ends = {"0": "conv_first", f"1.sub.{blocks}": "conv_body", "3": "conv_up1", "6": "conv_up2", "8": "conv_hr"}
    names = {f"model.{old}.": f"{new}." for old, new in (ends | {"10": "conv_last"}).items()}
    names |= {
        f"model.1.sub.{block}.RDB{dense}.conv{conv}.0.": f"body.{block}.rdb{dense}.conv{conv}."
        for block in range(blocks)
        for dense in (1, 2, 3)
        for conv in range(1, 6)
    }
    return {
        new + key.removeprefix(old): state[key] for old, new in names.items() for key in state if key.startswith(old)
    }


def perturb(model: nn.Module) -> nn.Module:
    for parameter in convlora.parameters(model):
        nn.init.normal_(parameter, std=0.02)
    return model


# --- every variant ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_merged_variant_loads_in_spandrel_with_equal_output(variant: str, tmp_path: Path) -> None:
    kind, make = VARIANTS[variant]
    base, network = make(), NETWORKS[kind]
    base_file, merged_file = tmp_path / "base.safetensors", tmp_path / "merged.safetensors"
    network.save(base, base_file)
    assert network_of(base_file) is network
    model, scale = load_any(base_file)
    low = photo(32, 48)
    before = predict(model, low)
    assert torch.allclose(before, predict(base, low), atol=1e-6)
    assert before.shape == (1, 3, 32 * scale, 48 * scale)

    convlora.inject(model, list(network.targets), rank=1)
    adapted = predict(perturb(model), low)
    assert not torch.allclose(adapted, before, atol=1e-4)
    network.save(convlora.remove(convlora.merge(model)), merged_file)
    foreign = ModelLoader("cpu").load_from_file(merged_file)
    assert (isinstance(foreign.model, network.kind), foreign.scale) == (True, scale)
    assert torch.allclose(predict(foreign.model, low), adapted, atol=1e-6)
    assert foreign.model.state_dict().keys() == ModelLoader("cpu").load_from_file(base_file).model.state_dict().keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_targets_reach_every_convolution_and_linear_layer(variant: str) -> None:
    kind, make = VARIANTS[variant]
    model = make()
    layers = {name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    convlora.inject(model, list(NETWORKS[kind].targets), rank=1)
    assert {layer.name for layer in convlora.summary(model).layers} == layers


def test_pickled_checkpoints_under_other_names_are_the_same_network(tmp_path: Path) -> None:
    base = ESRGAN(num_filters=8, num_blocks=2, scale=4)
    state = base.state_dict()
    renamed = of_real_esrgan(state, blocks=2)
    assert len(renamed) == len(state)
    torch.save({"params_ema": renamed}, tmp_path / "RealESRGAN.pth")
    model, scale = load_any(tmp_path / "RealESRGAN.pth")
    assert scale == 4
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_swinir_trains_without_stochastic_depth(tmp_path: Path) -> None:
    base = small_swinir(upsampler="pixelshuffledirect", depths=(4,), drop_path_rate=0.5)
    NETWORKS["swinir"].save(base, tmp_path / "base.safetensors")
    model, _ = load_any(tmp_path / "base.safetensors")
    low = to_tensor(photo(16, 16)).repeat(8, 1, 1, 1)
    assert torch.equal(model.train()(low), model(low))
    assert not torch.equal(base.train()(low), base(low))


def test_other_networks_and_grey_ones_are_refused_in_one_line(tmp_path: Path) -> None:
    save_file(Compact(num_feat=8, num_conv=2).state_dict(), tmp_path / "compact.safetensors")
    save_file(small_swinir(in_chans=1, upscale=1).state_dict(), tmp_path / "grey.safetensors")
    save_file({"weight": torch.ones(2)}, tmp_path / "strange.safetensors")
    NETWORKS["rrdb"].save(new_rrdb(8), tmp_path / "rrdb.safetensors")
    save_span(new_span(8), tmp_path / "span.safetensors")
    cases = [
        ("compact", load_any, "a RealESRGAN Compact, not SPAN, SwinIR or RRDBNet"),
        ("grey", load_any, "a SwinIR from 1 to 1 channels, not of RGB"),
        ("strange", load_any, "not a checkpoint that spandrel knows"),
        ("rrdb", NETWORKS["swinir"].load, "a ESRGAN, not SwinIR"),
        ("span", NETWORKS["rrdb"].load, "a SPAN, not RRDBNet"),
        ("rrdb", NETWORKS["span"].load, "not a SPAN"),
        ("none", load_any, "no such file"),
    ]
    for file, load, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            load(tmp_path / f"{file}.safetensors")
        assert "\n" not in str(caught.value)


# --- before training --------------------------------------------------------------------------------------------------


@both
def test_the_start_is_bicubic_and_balance_keeps_it(name: str) -> None:
    high = photo(64, 64)
    model = START[name](MAKE[name]())
    before = predict(model, clean(high))
    assert psnr_y(upscale(model, clean(high)), enlarge(clean(high)), shave=8) > 30
    balance_layers(model, torch.cat([to_tensor(photo(24, 24, seed)) for seed in range(4)]))
    assert torch.equal(predict(model, clean(high)), before)


@both
def test_balanced_layers_all_speak(name: str) -> None:
    model = START[name](MAKE[name]())
    low = torch.cat([to_tensor(photo(24, 24, seed)) for seed in range(4)])
    balance_layers(model, low)
    layers = {key: module for key, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    seen: dict[str, torch.Tensor] = {}
    for key, module in layers.items():
        module.register_forward_hook(lambda _, __, output, key=key: seen.update({key: output.detach().clone()}))
    model(low)
    last = list(layers)[-1]
    for key in set(layers) - {last}:
        output = seen[key].movedim(1 if isinstance(layers[key], nn.Conv2d) else -1, 0).flatten(1)
        random = output[3 if key in CARRIERS[name] else 0 :]
        assert random.std() == pytest.approx(1, rel=1e-2), key
        assert random.mean(1).abs().max() < 1e-3, key


@both
def test_pretraining_teaches_more_than_bicubic_knows(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    PilImage.fromarray(photo(288, 288)).save(tmp_path / "0.png")
    out = tmp_path / "out.safetensors"
    pretrain.main(
        tmp_path, test=tmp_path, network=name, out=out, exclude=None, minutes=0.03, peak=1e-3, batch=2, channels=8,
        average=0.5, seed=0, threads=torch.get_num_threads(), every=1000, compiled=False,
    )  # fmt: skip
    torch.set_flush_denormal(False)
    assert "1 photos, 2 pairs, 1 test photos" in capsys.readouterr().out
    facts = provenance(out)
    assert facts["steps"] >= 1
    assert facts["architecture"].startswith({"swinir": "SwinIR", "rrdb": "RRDBNet"}[name])
    assert network_of(out) is NETWORKS[name]
    high = photo(96, 96)
    assert psnr_y(upscale(load_any(out)[0], clean(high)), high) > psnr_y(enlarge(clean(high)), high) - 3


# --- what is shipped --------------------------------------------------------------------------------------------------


@both
def test_shipped_weights_say_where_they_come_from(name: str) -> None:
    path = NETWORKS[name].weights
    assert path.stat().st_size < 2_000_000
    assert {"architecture", "data", "excluded", "input", "recipe", "steps"} <= provenance(path).keys()
    assert provenance(path)["excluded"] == ["302003"]


@needs_data
@both
def test_shipped_network_reaches_its_decibels_on_set5(name: str) -> None:
    model, _ = load_any(NETWORKS[name].weights)
    truths = [crop_to_multiple(read_image(path), 4) for path in image_files(DATA / "set5/HR")]
    assert quality([upscale(model, clean(truth)) for truth in truths], truths).psnr >= 30.3


# --- the scripts as a user runs them ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small photos."""
    path = tmp_path_factory.mktemp("photos")
    for index in range(2):
        PilImage.fromarray(photo(96 + 4 * index, 101, index)).save(path / f"{index}.png")
    return path


def short_run(name: str, folder: Path, out: Path, *more: str) -> dict[str, dict[str, object]]:
    """The rows of a run of a few steps."""
    options = {"photos": folder, "held-out": folder, "steps": 6, "batch": 2, "patch": 16, "draws": 1, "out": out}
    texts = [str(text) for option, value in options.items() for text in (f"--{option}", value)]
    result = CliRunner().invoke(SCRIPTS[name].app, [*texts, *more])
    assert result.exit_code == 0, result.output
    assert "4 checks hold" in result.output
    return {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}


@both
def test_script_adapts_merges_and_hands_on(name: str, folder: Path, tmp_path: Path) -> None:
    rows = short_run(name, folder, tmp_path)
    assert list(rows) == ["bicubic", "base", "adapted", "merged", "in spandrel", "reloaded", "removed"]
    assert rows["adapted"]["psnr_y"] != rows["base"]["psnr_y"] == rows["removed"]["psnr_y"]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["options"]["targets"] == list(NETWORKS[name].targets)
    assert results["trained_parameters"] < 0.08 * results["base_parameters"]
    for picture in (f"{name}.png", f"{name}_curve.png"):
        with PilImage.open(tmp_path / picture) as image:
            assert min(image.size) > 200
    # What the run wrote, used without the run.
    model, _ = load_any(NETWORKS[name].weights)
    low = clean(read_image(folder / "0.png"))
    adapted = predict(convlora.load(model, tmp_path / "adapter.safetensors"), low)
    merged = ModelLoader("cpu").load_from_file(tmp_path / f"{name}_merged.safetensors").model
    assert torch.allclose(predict(merged, low), adapted, atol=1e-5)


@pytest.mark.parametrize("variant", ["SwinIR, classical", "Real-ESRGAN x2"])
def test_script_takes_a_network_from_elsewhere(variant: str, folder: Path, tmp_path: Path) -> None:
    name, make = VARIANTS[variant]
    NETWORKS[name].save(make(), tmp_path / "base.safetensors")
    rows = short_run(name, folder, tmp_path, "--base", str(tmp_path / "base.safetensors"), "--degradation", "real")
    assert rows["in spandrel"]["largest_difference"] <= 1e-5
    assert ModelLoader("cpu").load_from_file(tmp_path / f"{name}_merged.safetensors").scale == 2


@both
def test_script_refuses_another_network_in_one_line(name: str, tmp_path: Path) -> None:
    other = NETWORKS[{"swinir": "rrdb", "rrdb": "swinir"}[name]].weights
    result = CliRunner().invoke(SCRIPTS[name].app, ["--base", str(other), "--out", str(tmp_path)])
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    assert result.output.startswith("error: base ")


@both
def test_evaluate_measures_each_network(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    path = NETWORKS[name].weights
    evaluate.main([folder], base=path, adapter=None, degradation="clean", threads=None)
    truths = [crop_to_multiple(read_image(file), 4) for file in image_files(folder)]
    reached = quality([upscale(load_any(path)[0], clean(truth)) for truth in truths], truths)
    assert f"{reached.psnr:.3f} / {reached.ssim:.4f}" in capsys.readouterr().out
