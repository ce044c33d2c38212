"""The examples: metrics, degradations and network helpers against independent references; span.py as a user runs it."""

# ruff: noqa: E402  (the examples import from their own folder)

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("spandrel")
pytest.importorskip("accelerate")
ROOT = Path(__file__).parents[2]
DATA = Path(__file__).parents[3] / "shared/data"
WEIGHTS = ROOT / "examples/weights/span_x4_c26.safetensors"
sys.path.insert(0, str(ROOT / "examples"))

import evaluate
import pretrain
import span as example
from oracle import AFFINITIES
from PIL import Image as PilImage
from safetensors.torch import load_file, save_file
from spandrel import ModelLoader
from spandrel.architectures.SPAN.__arch.span import SPAN, Conv3XC
from sr import degradations, distillation
from sr.data import (
    InputError,
    Pair,
    Patches,
    Photo,
    bundled_photos,
    crop_photos,
    crop_to_multiple,
    degraded_pairs,
    image_files,
    read_image,
    to_image,
    to_tensor,
)
from sr.degradations import DEGRADATIONS, clean, enlarge
from sr.metrics import psnr_y, quality, ssim_y
from sr.models import (
    collapse,
    expand,
    load_span,
    new_span,
    predict,
    provenance,
    save_span,
    upscale,
)
from sr.operations import blur, gaussian_kernel, gaussian_noise, shot_noise, sinc_kernel
from sr.report import strongest_change
from sr.starts import balance_span, start_span
from sr.training import Schedule
from typer.testing import CliRunner

import convlora
from convlora.model.traversal import adapter_slots

needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="the data pack is not there")


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth random picture with some texture."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.uniform(0, 1, size=(1, 3, height // 8 + 2, width // 8 + 2))).float()
    smooth = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return to_image(smooth + torch.from_numpy(rng.normal(0, 0.03, size=tuple(smooth.shape))).float())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three small photos."""
    path = tmp_path_factory.mktemp("photos")
    for index in range(3):
        PilImage.fromarray(photo(96 + 4 * index, 101, index)).save(path / f"{index}.png")
    return path


# --- metrics ------------------------------------------------------------------------------------------------------


def naive_luma(image: np.ndarray) -> np.ndarray:
    red, green, blue = (image[..., channel].astype(np.float64) for channel in range(3))
    return 16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255


def naive_ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Wang et al. 2004, window by window."""
    offsets = np.arange(11) - 5
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for top in range(one.shape[0] - 10):
        for left in range(one.shape[1] - 10):
            x, y = one[top : top + 11, left : left + 11], other[top : top + 11, left : left + 11]
            mean_x, mean_y = (window * x).sum(), (window * y).sum()
            var_x, var_y = (window * (x - mean_x) ** 2).sum(), (window * (y - mean_y) ** 2).sum()
            both = (window * (x - mean_x) * (y - mean_y)).sum()
            numerator = (2 * mean_x * mean_y + c1) * (2 * both + c2)
            values.append(numerator / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)))
    return float(np.mean(values))


def test_psnr_is_ten_log_of_peak_over_squared_error() -> None:
    truth, output = photo(40, 52), photo(40, 52, seed=1)
    one, other = naive_luma(truth)[4:-4, 4:-4], naive_luma(output)[4:-4, 4:-4]
    expected = 10 * np.log10(255**2 / ((one - other) ** 2).mean())
    assert psnr_y(output, truth) == pytest.approx(expected, abs=1e-9)


def test_ssim_is_the_mean_over_gaussian_windows() -> None:
    truth = photo(36, 44)
    output = enlarge(clean(truth))
    expected = naive_ssim(naive_luma(truth)[4:-4, 4:-4], naive_luma(output)[4:-4, 4:-4])
    assert ssim_y(output, truth) == pytest.approx(expected, abs=1e-9)


def test_quality_is_the_mean_over_images() -> None:
    truths = [photo(40, 40), photo(48, 44, 1)]
    outputs = [enlarge(clean(truth)) for truth in truths]
    reached = quality(outputs, truths)
    assert reached.psnr == pytest.approx(np.mean([psnr_y(*pair) for pair in zip(outputs, truths, strict=True)]))
    assert reached.ssim == pytest.approx(np.mean([ssim_y(*pair) for pair in zip(outputs, truths, strict=True)]))


def set5() -> list[np.ndarray]:
    return [crop_to_multiple(read_image(path), 4) for path in image_files(DATA / "set5/HR")]


@needs_data
def test_bicubic_on_set5_has_the_published_figures() -> None:
    truths = set5()
    reached = quality([enlarge(clean(truth)) for truth in truths], truths)
    assert reached.psnr == pytest.approx(28.432, abs=0.005)
    assert reached.ssim == pytest.approx(0.8113, abs=0.0005)


@needs_data
def test_released_network_on_set5_has_its_measured_figures() -> None:
    model, scale = load_span(DATA / "weights/dscf_x4_c26_team23.safetensors")
    truths = set5()
    reached = quality([upscale(model, clean(truth, scale)) for truth in truths], truths)
    assert reached.psnr == pytest.approx(31.745, abs=0.005)
    assert reached.ssim == pytest.approx(0.8892, abs=0.0005)


@needs_data
def test_shipped_network_reaches_thirty_and_a_half_decibels_on_set5() -> None:
    model, _ = load_span(WEIGHTS)
    truths = set5()
    assert quality([upscale(model, clean(truth)) for truth in truths], truths).psnr > 30.5


# --- photos and degradations ------------------------------------------------------------------------------------------


def test_bundled_photos_are_disjoint_colour_photographs() -> None:
    training, held_out = bundled_photos()
    names = [p.name for p in training + held_out]
    assert len(set(names)) == len(names) == 8
    assert [p.name for p in held_out] == ["astronaut", "chelsea", "flower"]
    for p in training + held_out:
        assert p.pixels.dtype == np.uint8
        assert p.pixels.shape[2] == 3
        assert min(p.pixels.shape[:2]) >= 300


def test_every_degradation_can_be_chosen_by_name() -> None:
    assert set(get_args(degradations.Name)) == set(DEGRADATIONS)


@pytest.mark.parametrize("name", ["camera", "night", "jpeg", "real"])
def test_degradation_depends_on_the_seed_alone(name: str) -> None:
    high, degrade = photo(96, 128), DEGRADATIONS[name]
    first = degrade(high, 3, 4)
    np.random.default_rng(1).normal(size=10)
    torch.rand(3)
    assert np.array_equal(first, degrade(high, 3, 4))
    assert not np.array_equal(first, degrade(high, 4, 4))
    assert first.shape == (24, 32, 3)
    assert first.dtype == np.uint8
    assert degrade(high, 3, 2).shape == (48, 64, 3)


def test_jpeg_is_the_clean_low_resolution_at_a_quality_of_its_range() -> None:
    high, qualities = photo(64, 64), set()
    candidates = {}
    for quality_of_file in range(1, 96):
        buffer = io.BytesIO()
        PilImage.fromarray(clean(high)).save(buffer, "JPEG", quality=quality_of_file, subsampling=2)
        candidates.setdefault(np.asarray(PilImage.open(buffer)).tobytes(), quality_of_file)
    for seed in range(200):
        qualities.add(candidates[DEGRADATIONS["jpeg"](high, seed, 4).tobytes()])
    assert (min(qualities), max(qualities)) == (10, 40)


def test_real_keeps_a_flat_photo_at_its_grey_and_harms_more_variously_than_camera() -> None:
    flat, high = np.full((96, 96, 3), 120, dtype=np.uint8), photo(96, 96)
    assert all(abs(DEGRADATIONS["real"](flat, seed, 4).mean() - 120) < 6 for seed in range(8))
    errors = {
        name: [psnr_y(enlarge(DEGRADATIONS[name](high, seed, 4)), high) for seed in range(8)]
        for name in ("real", "camera")
    }
    assert np.std(errors["real"]) > 1.5 * np.std(errors["camera"])
    assert min(errors["real"]) < min(errors["camera"])


def test_resizing_factors_fall_in_their_ranges_as_often_as_stated() -> None:
    rng, first = np.random.default_rng(0), degradations.Real().first
    factors = np.array([first.draw_factor(rng) for _ in range(4000)])
    assert (factors.min(), factors.max()) == pytest.approx((0.15, 1.5), abs=0.01)
    assert ((factors > 1).mean(), (factors == 1).mean()) == pytest.approx((0.2, 0.1), abs=0.02)


def test_noise_has_the_stated_strength() -> None:
    flat, rng = torch.full((1, 3, 100, 100), 0.25), np.random.default_rng(0)
    normal = (gaussian_noise(flat, 20.0, rng) - flat) * 255
    shot = (shot_noise(flat, 2.0, rng) - flat) * 255
    assert float(normal.std()) == pytest.approx(20, rel=0.02)
    assert float(shot.std()) == pytest.approx(2 * np.sqrt(0.25 * 255), rel=0.02)
    for noise in (gaussian_noise, shot_noise):
        grey = noise(flat, 3.0, rng, grey=True) - flat
        assert torch.equal(grey[:, 0], grey[:, 1])
        assert not torch.equal(*(noise(flat, 3.0, rng) - flat)[0, :2])


def test_sinc_passes_waves_below_its_cutoff_and_stops_those_above() -> None:
    kernel = sinc_kernel(np.pi / 2, size=41)
    response = np.abs(np.fft.fft2(kernel, (400, 400)))[0]  # along x, 400 samples to 2π
    assert kernel.sum() == pytest.approx(1)
    assert response[:80] == pytest.approx(1, abs=0.15)
    assert response[120:200].max() < 0.15


def test_generalised_gaussian_is_flatter_with_more_power() -> None:
    pointed, usual, flat = (gaussian_kernel(2, 2, 0, power=power) for power in (0.5, 1.0, 4.0))
    assert np.array_equal(usual, gaussian_kernel(2, 2, 0))
    middle = [kernel[10, 11] / kernel[10, 10] for kernel in (pointed, usual, flat)]
    assert middle == sorted(middle)
    edges = [kernel[10, 16] / kernel[10, 10] for kernel in (pointed, usual, flat)]
    assert edges == sorted(edges, reverse=True)


def test_night_is_worse_than_camera_is_worse_than_clean() -> None:
    high = photo(128, 128)
    errors = [
        np.mean([psnr_y(enlarge(degrade(high, seed, 4)), high) for seed in range(6)])
        for degrade in (DEGRADATIONS["night"], DEGRADATIONS["camera"], DEGRADATIONS["clean"])
    ]
    assert errors == sorted(errors)


def test_gaussian_kernel_has_the_stated_widths() -> None:
    kernel = gaussian_kernel(0.9, 1.8, np.pi / 2)
    y, x = np.meshgrid(np.arange(21) - 10, np.arange(21) - 10, indexing="ij")
    assert kernel.sum() == pytest.approx(1)
    assert np.sqrt((kernel * x**2).sum()) == pytest.approx(1.8, abs=1e-3)  # turned by a right angle
    assert np.sqrt((kernel * y**2).sum()) == pytest.approx(0.9, abs=1e-3)


def test_blur_keeps_a_flat_image_flat() -> None:
    flat = torch.full((1, 3, 40, 40), 0.3)
    assert torch.allclose(blur(flat, gaussian_kernel(2, 1, 0.4)), flat, atol=1e-6)


@needs_data
def test_camera_on_validation_photos_has_its_measured_bicubic_figure() -> None:
    truths = [crop_to_multiple(read_image(path), 4) for path in image_files(DATA / "bsds/val")]
    outputs = [enlarge(DEGRADATIONS["camera"](truth, seed, 4)) for seed, truth in enumerate(truths)]
    reached = np.mean([psnr_y(output, truth) for output, truth in zip(outputs, truths, strict=True)])
    assert reached == pytest.approx(24.763, abs=0.005)


def test_images_survive_the_way_to_tensors_and_back() -> None:
    image = photo(17, 23)
    assert np.array_equal(to_image(to_tensor(image)), image)


def test_numbered_files_are_sorted_by_number(tmp_path: Path) -> None:
    for name in ("10.png", "9.png", "b.jpg", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in image_files(tmp_path)] == ["9.png", "10.png", "a.png", "b.jpg"]


def test_patches_are_aligned_and_seeded() -> None:
    highs = [np.kron(photo(40, 48, seed), np.ones((4, 4, 1), dtype=np.uint8)) for seed in range(2)]
    pairs = [Pair(str(index), high[::4, ::4], high) for index, high in enumerate(highs)]
    low, high = next(iter(Patches(pairs, patch=16, batch=6, seed=5)))
    assert low.shape == (6, 3, 16, 16)
    assert torch.equal(high, low.repeat_interleave(4, 2).repeat_interleave(4, 3))
    again = next(iter(Patches(pairs, patch=16, batch=6, seed=5)))
    other = next(iter(Patches(pairs, patch=16, batch=6, seed=6)))
    assert torch.equal(low, again[0])
    assert not torch.equal(low, other[0])


def test_degraded_pairs_differ_in_seed() -> None:
    pairs = degraded_pairs([Photo("a", photo(64, 64))], DEGRADATIONS["camera"], scale=4, draws=3, seed=7)
    assert [np.array_equal(p.low, DEGRADATIONS["camera"](p.high, 7 + i, 4)) for i, p in enumerate(pairs)] == [True] * 3


def test_small_photos_are_refused_with_their_size() -> None:
    with pytest.raises(InputError, match=r"1 of 2 .*192x192.*'b' \(100x300\)"):
        crop_photos([Photo("a", photo(200, 200)), Photo("b", photo(300, 100))], 4, least=192)


def test_the_square_shown_is_where_the_pictures_differ() -> None:
    one, other = photo(80, 100), photo(80, 100)
    other[30:50, 60:80] ^= 64
    top, left = strongest_change(one, other, 24)
    assert 26 <= top <= 30
    assert 56 <= left <= 60


# --- networks ---------------------------------------------------------------------------------------------------------


def test_collapsed_span_equals_the_train_form() -> None:
    model = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=4)
    low = torch.rand(1, 3, 13, 17)
    with torch.no_grad():
        fused, train_form = model.eval()(low), model.train()(low)
        collapsed = collapse(model).train()(low)
    assert not any(isinstance(module, Conv3XC) for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(collapsed, fused)
    # The train form sums in another order; its features reach some hundreds.
    assert torch.allclose(collapsed, train_form, rtol=1e-4, atol=1e-4 * float(train_form.abs().max()))


@pytest.mark.parametrize("joined", [12, 5], ids=["square", "fewer joined channels"])
def test_spandrel_loads_what_save_span_writes_bitwise(tmp_path: Path, joined: int) -> None:
    model = new_span(12)
    if joined != 12:
        model.conv_cat = nn.Conv2d(48, joined, 1)
        model.upsampler[0] = nn.Conv2d(joined, 48, 3, padding=1)
    save_span(model, tmp_path / "span.safetensors")
    descriptor = ModelLoader("cpu").load_from_file(tmp_path / "span.safetensors")
    low = photo(24, 31)
    assert (descriptor.architecture.id, descriptor.scale) == ("SPAN", 4)
    again = collapse(descriptor.model).state_dict()
    for key, value in model.state_dict().items():
        slices = tuple(slice(side) for side in value.shape)
        assert torch.equal(again[key][slices], value), key
        assert again[key].count_nonzero() == value.count_nonzero(), key
    fresh = ModelLoader("cpu").load_from_file(tmp_path / "span.safetensors").model
    assert torch.equal(predict(fresh, low), predict(model, low))


def test_expanded_span_trains_from_where_it_was() -> None:
    model = new_span(8)
    train_form = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=4)
    train_form.load_state_dict(expand(model.state_dict()))
    low = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected, output = model(low), train_form.train()(low)
    assert torch.allclose(output, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("form", ["collapsed", "eval_conv", "train"])
def test_load_span_takes_every_form(tmp_path: Path, form: str) -> None:
    model, path = new_span(8), tmp_path / "span.safetensors"
    state = model.state_dict()
    if form == "train":
        save_span(model, path)
    else:
        infix = ".eval_conv" if form == "eval_conv" else ""
        whole = {"conv_cat", "upsampler.0"}
        names = {key: key.rpartition(".") for key in state}
        save_file({f"{k[0]}{'' if k[0] in whole else infix}.{k[2]}": state[key] for key, k in names.items()}, path)
    loaded, scale = load_span(path)
    assert scale == 4
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


@needs_data
def test_released_networks_of_both_widths_go_to_spandrel_and_back(tmp_path: Path) -> None:
    low = clean(photo(96, 96))
    for name in ("dscf_x4_c26_team23", "span_x4_c28_team46"):
        model, _ = load_span(DATA / f"weights/{name}.safetensors")
        save_span(model, tmp_path / "span.safetensors")
        fresh = ModelLoader("cpu").load_from_file(tmp_path / "span.safetensors").model
        assert torch.allclose(predict(fresh, low), predict(model, low), atol=1e-5)


def test_a_started_span_enlarges_as_bicubic_before_any_training() -> None:
    high = photo(64, 64)
    for img_range in (4.0, 255.0):
        output = upscale(start_span(new_span(8, img_range=img_range)), clean(high))
        assert psnr_y(output, enlarge(clean(high)), shave=8) > 35


def test_balanced_blocks_all_speak_and_the_start_stays_bicubic() -> None:
    model, low = (
        start_span(new_span(8, img_range=4.0)),
        torch.cat([to_tensor(photo(24, 24, seed)) for seed in range(4)]),
    )
    high = photo(64, 64)
    before = upscale(model, clean(high))
    balance_span(model, low)
    stds: dict[str, float] = {}
    for name, module in model.named_modules():
        if name.endswith(("c1_r", "c3_r")):
            module.register_forward_hook(
                lambda _, __, output, name=name: stds.update({name: float(output.detach().std())})
            )
    model(low)
    assert len(stds) == 12
    for name, std in stds.items():
        assert std == pytest.approx(2.5 if name.endswith("c3_r") else 1.0, rel=1e-3), name
    assert np.array_equal(upscale(model, clean(high)), before)


def test_shipped_weights_say_where_they_come_from() -> None:
    assert WEIGHTS.stat().st_size < 2_000_000
    state = load_file(WEIGHTS)
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert sum(value.numel() for value in state.values()) == 130_828
    assert {"architecture", "data", "excluded", "input", "recipe", "steps"} <= provenance(WEIGHTS).keys()


def test_schedule_rises_then_falls_and_time_ends_it() -> None:
    schedule = Schedule(steps=100, seconds=60, rate=1.0, warmup=10)
    factors = [schedule.factor(step, schedule.progress(step, 0.0)) for step in range(101)]
    assert int(np.argmax(factors)) == 10
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == 0
    assert schedule.progress(10, 60.0) == 1


# --- span.py as a user runs it ---------------------------------------------------------------------------------------


def run_example(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / script), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100", "NO_COLOR": "1", "PYTHONWARNINGS": ""}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> tuple[str, Path]:
    """(what it printed, where it wrote) of a run of a few steps."""
    out = tmp_path_factory.mktemp("out")
    result = run_example(
        *(
            "span.py",
            "--photos",
            str(folder),
            "--held-out",
            str(folder),
            "--steps",
            "12",
            "--batch",
            "2",
            "--patch",
            "16",
        ),
        *("--draws", "2", "--lr", "1e-3", "--warmup", "2", "--threads", "1", "--out", str(out)),
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout, out


def test_span_shows_every_row_and_holds_its_checks(short_run: tuple[str, Path]) -> None:
    printed, out = short_run
    rows = {row["name"]: row for row in json.loads((out / "results.json").read_text())["rows"]}
    assert list(rows) == ["bicubic", "base", "adapted", "merged", "in spandrel", "reloaded", "removed"]
    for row in rows.values():
        assert f"{row['psnr_y']:.3f}" in printed
        assert np.mean(row["psnr_y_each"]) == pytest.approx(row["psnr_y"])
    assert rows["adapted"]["psnr_y"] != rows["base"]["psnr_y"]
    for name, same in (("merged", "adapted"), ("reloaded", "adapted"), ("removed", "base")):
        assert rows[name]["equals"] == same
        assert rows[name]["psnr_y"] == pytest.approx(rows[same]["psnr_y"], abs=1e-3)
    assert rows["reloaded"]["largest_difference"] == rows["removed"]["largest_difference"] == 0
    assert "4 checks hold" in printed


def test_span_writes_adapter_merged_network_pictures_and_figures(short_run: tuple[str, Path], folder: Path) -> None:
    _, out = short_run
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 12
    assert results["adapter_bytes"] == (out / "adapter.safetensors").stat().st_size
    for name in ("span.png", "span_curve.png"):
        with PilImage.open(out / name) as picture:
            assert min(picture.size) > 200
    # What the run wrote, used without the run: adapter on the base, and the merged file in spandrel.
    model, _ = load_span(WEIGHTS)
    low = clean(read_image(folder / "0.png"))
    base = predict(model, low)
    adapted = predict(convlora.load(model, out / "adapter.safetensors"), low)
    merged = predict(ModelLoader("cpu").load_from_file(out / "span_merged.safetensors").model, low)
    assert not torch.equal(adapted, base)
    assert torch.allclose(merged, adapted, atol=1e-5)


def test_span_help_names_every_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    result = CliRunner().invoke(example.app, ["--help"])
    assert result.exit_code == 0
    for text in ("Network and photos", "Adapter", "Training", "Machine and output", "--held-out", "--rank", "--seed"):
        assert text in result.output


def test_span_refuses_bad_input_in_one_line(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.png").write_bytes(b"no image")
    (tmp_path / "base.pth").write_bytes(b"no network")
    save_file({"weight": torch.ones(2)}, tmp_path / "other.safetensors")
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    cases = {
        ("--base", str(tmp_path / "none.pth")): "no such file",
        ("--base", str(tmp_path / "base.pth")): "cannot be read",
        ("--base", str(tmp_path / "other.safetensors")): "not a SPAN",
        ("--photos", str(tmp_path / "none")): "no such folder",
        ("--photos", str(tmp_path / "empty")): "no image in it",
        ("--photos", str(tmp_path / "broken")): "cannot be read",
        ("--photos", str(folder)): "smaller than 192x192",
        ("--targets", "block_9.c1_r"): "selects no",
    }
    for options, message in cases.items():
        result = CliRunner().invoke(example.app, [*options, *out])
        assert result.exit_code == 1, (options, result.output)
        assert message in result.output
        assert result.output.startswith("error: ")
        assert result.output.count("\n") == 1, result.output


# --- dsclora.py -------------------------------------------------------------------------------------------------------


def test_dsclora_puts_adapters_where_the_paper_has_them() -> None:
    model = distillation.inject_dsclora(load_span(WEIGHTS)[0])
    layers = {layer.name: layer.rank for layer in convlora.summary(model).layers}
    blocks = {f"block_{block}.c{conv}_r": 2 for block in range(1, 7) for conv in (1, 2, 3)}
    assert layers == {**blocks, "conv_2": 8, "upsampler.0": 8}
    assert {slot.low_rank("default").scale for slot in adapter_slots(model)} == {2.0}


def test_dsclora_minimises_the_three_terms() -> None:
    model, _ = load_span(WEIGHTS)
    distillation.inject_dsclora(model)
    for parameter in convlora.parameters(model):
        torch.nn.init.normal_(parameter, std=0.02)
    low, high = torch.rand(2, 3, 12, 12), torch.rand(2, 3, 48, 48)
    got = distillation.Distillation(high=0.5, teacher=0.3, affinity=2.0, clean_teacher=True)(model)(low, high)
    features = []
    hooks = [
        model.get_submodule(f"block_{block}").register_forward_hook(lambda _m, _i, out: features.append(out[0].clone()))
        for block in range(1, 7)
    ]
    with convlora.disabled(model):
        taught = model(distillation.reduced(high, low))
    output = model(low)
    for hook in hooks:
        hook.remove()
    pairs = zip(features[:6], features[6:], strict=True)
    affinity = sum(AFFINITIES["spatial_affinity"](s.double(), t.double()) for t, s in pairs) / 6
    expected = 0.5 * (output - high).abs().mean() + 0.3 * (output - taught).abs().mean() + 2.0 * affinity
    torch.testing.assert_close(got.double(), expected.double())


def test_the_clean_teacher_sees_what_a_clean_photo_gives() -> None:
    photo_pixels = photo(96, 64)
    expected = to_tensor(clean(photo_pixels))
    assert torch.equal(distillation.reduced(to_tensor(photo_pixels), expected), expected)


def test_dsclora_runs_and_writes_what_it_shows(folder: Path, tmp_path: Path) -> None:
    result = run_example(
        *("dsclora.py", "--photos", str(folder), "--held-out", str(folder), "--steps", "6", "--batch", "2"),
        *("--patch", "16", "--threads", "1", "--out", str(tmp_path)),
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    assert "2 checks hold" in result.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    rows = {row["name"]: row for row in results["rows"]}
    assert list(rows) == ["bicubic", "base, the teacher", "adapted", "merged"]
    assert rows["adapted"]["psnr_y"] != rows["base, the teacher"]["psnr_y"]
    assert results["trained_parameters"] == 25_920
    for name in ("affinity.png", "curve.png"):
        with PilImage.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
    model, _ = load_span(WEIGHTS)
    low = clean(read_image(folder / "0.png"))
    adapted = predict(convlora.load(model, tmp_path / "adapter.safetensors"), low)
    merged = predict(ModelLoader("cpu").load_from_file(tmp_path / "span_merged.safetensors").model, low)
    assert torch.allclose(merged, adapted, atol=1e-5)


def test_dsclora_refuses_bad_input_in_one_line(tmp_path: Path) -> None:
    result = run_example("dsclora.py", "--base", str(tmp_path / "none.pth"), "--out", str(tmp_path))
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "no such file" in result.stderr


# --- evaluate.py and pretrain.py --------------------------------------------------------------------------------------


def test_evaluate_measures_base_and_adapter(
    short_run: tuple[str, Path], folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    adapter = short_run[1] / "adapter.safetensors"
    evaluate.main([folder], base=WEIGHTS, adapter=adapter, degradation="camera", threads=None)
    printed = capsys.readouterr().out
    photos = crop_photos([Photo(path.stem, read_image(path)) for path in image_files(folder)], 4, least=64)
    lows = [DEGRADATIONS["camera"](p.pixels, seed, 4) for seed, p in enumerate(photos)]
    model, _ = load_span(WEIGHTS)
    for network in (model, convlora.load(load_span(WEIGHTS)[0], adapter)):
        reached = quality([upscale(network, low) for low in lows], [p.pixels for p in photos])
        assert f"{reached.psnr:.3f} / {reached.ssim:.4f}" in printed


def test_pretraining_writes_a_network_for_the_usual_range(tmp_path: Path) -> None:
    model = start_span(new_span(8, img_range=pretrain.RANGE))
    pretrain.save(model, tmp_path / "span.safetensors", {"steps": 0})
    loaded, _ = load_span(tmp_path / "span.safetensors")
    low = photo(24, 24)
    assert loaded.img_range == 255
    assert torch.allclose(predict(loaded, low), predict(model, low), atol=1e-5)


def test_pretraining_runs_for_the_time_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(2):
        PilImage.fromarray(photo(288, 288, index)).save(tmp_path / f"{index}.png")
    out = tmp_path / "span.safetensors"
    pretrain.main(
        tmp_path, test=tmp_path, network="span", out=out, exclude=["1"], minutes=0.02, peak=1e-3, batch=2, channels=8,
        average=0.9, seed=0, threads=torch.get_num_threads(), every=1000, compiled=False,
    )  # fmt: skip
    torch.set_flush_denormal(False)
    facts = provenance(out)
    assert facts["steps"] >= 1
    assert facts["excluded"] == ["1"]
    assert "1 photos, 2 pairs, 2 test photos" in capsys.readouterr().out
    high = photo(96, 96)
    assert psnr_y(upscale(load_span(out)[0], clean(high)), high) > psnr_y(enlarge(clean(high)), high) - 3
