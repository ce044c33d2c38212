"""Three adapters on one network, switched and blended by blend.py."""

# ruff: noqa: E402  (the examples import from their own folder)

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("spandrel")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import blend
import typer
from PIL import Image as PilImage
from sr.data import InputError, Photo, bundled_photos, read_image
from sr.degradations import DEGRADATIONS
from sr.metrics import quality
from sr.models import load_span, predict, upscale
from sr.networks import NETWORKS
from test_examples import photo
from typer.testing import CliRunner

import convlora

ADAPTERS = [blend.BASE.with_name(f"span_{name}.safetensors") for name in blend.NAMES]
needs_adapters = pytest.mark.skipif(not all(map(Path.is_file, ADAPTERS)), reason="adapters are yet to be trained")


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained adapters beside a copy of the base, where blend.py looks for them."""
    base = tmp_path / "base" / blend.BASE.name
    base.parent.mkdir()
    shutil.copy(blend.BASE, base)
    for name in blend.NAMES:
        model = convlora.inject(load_span(base)[0], list(NETWORKS["span"].targets), rank=1, name=name)
        for parameter in convlora.parameters(model):
            torch.nn.init.normal_(parameter, std=0.02)
        convlora.save(model, base.with_name(f"span_{name}.safetensors"))
    monkeypatch.setattr(blend, "BASE", base)


def run(*options: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command()(blend.main)
    result = CliRunner().invoke(app, options)
    return result.exit_code, result.output


@needs_adapters
def test_shipped_adapters_are_small_and_know_their_base() -> None:
    for path in ADAPTERS:
        assert path.stat().st_size < 60_000
        convlora.load(load_span(blend.BASE)[0], path)  # of another base it would warn, and warnings are errors here


@needs_adapters
def test_each_adapter_is_the_best_on_its_own_degradation() -> None:
    high = bundled_photos()[1][0].pixels[:256, 128:384]
    model, scale = blend.load_with_adapters()
    for name in blend.NAMES:
        lows = [DEGRADATIONS[name](high, blend.SEED + draw, scale) for draw in range(3)]
        reached = {}
        for acting in ("", *blend.NAMES):
            convlora.activate(model, [acting] if acting else [])
            reached[acting] = quality([upscale(model, low) for low in lows], [high] * 3, scale).psnr
        assert max(reached, key=reached.get) == name, reached


@pytest.mark.usefixtures("adapters")
def test_no_adapter_acts_until_told_and_the_base_is_bitwise_there() -> None:
    model, low = blend.load_with_adapters(blend.BASE)[0], photo(20, 24)
    base = predict(load_span(blend.BASE)[0], low)
    assert torch.equal(predict(model, low), base)
    blended = predict(convlora.activate(model, {"night": 0.6, "jpeg": 0.4}), low)
    assert not torch.equal(blended, base)
    assert torch.equal(predict(convlora.activate(model, []), low), base)


def test_strengths_are_read_and_shown() -> None:
    assert blend.parse(["night=0.6", "jpeg"]) == {"night": 0.6, "jpeg": 1.0}
    assert blend.label({"night": 0.6, "jpeg": 1.0}) == "0.6 night + jpeg"
    assert blend.label({}) == "base"
    with pytest.raises(InputError, match="strength night=x: expected NAME or NAME=NUMBER"):
        blend.parse(["night=x"])


@pytest.mark.usefixtures("adapters")
def test_a_photo_is_enlarged_with_the_strengths_given(tmp_path: Path) -> None:
    PilImage.fromarray(photo(24, 32)).save(tmp_path / "cat.png")
    code, printed = run(
        "--photo", str(tmp_path / "cat.png"), "--strength", "night=0.5", "--strength", "camera", "--out", str(tmp_path)
    )
    assert (code, "0.5 night + camera" in printed) == (0, True), printed
    model = convlora.activate(blend.load_with_adapters(blend.BASE)[0], {"night": 0.5, "camera": 1.0})
    assert np.array_equal(read_image(tmp_path / "cat_x4.png"), upscale(model, photo(24, 32)))


@pytest.mark.usefixtures("adapters")
def test_an_unknown_adapter_is_refused_in_one_line(tmp_path: Path) -> None:
    code, printed = run("--strength", "fog", "--out", str(tmp_path))
    assert (code, printed.count("\n")) == (1, 1)
    assert "fog" in printed


@pytest.mark.usefixtures("adapters")
def test_the_table_has_a_line_for_each_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend, "bundled_photos", lambda: ([], [Photo("a", photo(160, 160))] * 2))
    monkeypatch.setattr(blend, "DRAWS", 1)
    code, printed = run("--out", str(tmp_path))
    assert code == 0, printed
    for line in ("bicubic", "base", "camera", "night", "jpeg", "0.6 night + 0.4 jpeg"):
        assert f"│ {line} " in printed
    with PilImage.open(tmp_path / "blend.png") as picture:
        assert min(picture.size) > 200
