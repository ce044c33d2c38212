"""Files of other libraries on the command line: without a scale, of several networks, LoHa and LoKr, DoRA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import net, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import convlora
from convlora import Adapter, formats
from convlora.cli.app import app


def base() -> nn.Module:
    torch.manual_seed(0)
    return net().eval()


LAYERS = [path for path, spec in formats.specs_of(base()).items() if not spec.transposed and spec.groups == 1]


def adapter(factors: str, **options: Any) -> Adapter:
    torch.manual_seed(1)
    model = convlora.inject(base(), LAYERS, factors=factors, **{"rank": 2, "alpha": 3, **options})
    magnitudes = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("lora_magnitude")}
    randomise(model, std=0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in magnitudes:
                parameter.copy_(magnitudes[name] * 1.5)
    return convlora.adapter(model)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file(base().state_dict(), "base.safetensors")
    return tmp_path


def run(line: str, *more: str) -> str:
    result = CliRunner().invoke(app, [*line.split(), *more], catch_exceptions=False, prog_name="convlora")
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    return result.stdout


def fails(line: str, *more: str) -> str:
    result = CliRunner().invoke(app, [*line.split(), *more], catch_exceptions=False, prog_name="convlora")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    return str(result.stderr.removeprefix("error: ").rstrip("\n"))


def merged(*args: str) -> dict[str, Tensor]:
    run("merge", "base.safetensors", *args, "-o", "merged.safetensors", "--force")
    return load_file("merged.safetensors")


def close(one: dict[str, Tensor], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(one[n], other[n], rtol=1e-4, atol=1e-5) for n in one)


def without_metadata(place: str, prefix: str) -> None:
    """As older versions of diffusers write it: the names of a network, and no word of the scale."""
    tensors = load_file(place)
    save_file({f"{prefix}{name}": tensor for name, tensor in tensors.items()}, place)


def test_a_file_without_a_scale_takes_it_from_alpha(folder: Path) -> None:
    whole = adapter("locon")
    formats.write(whole, "old.safetensors", "diffusers")
    without_metadata("old.safetensors", "unet.")
    expected = whole.apply_to(base().state_dict())
    for line in ("merge base.safetensors old.safetensors -o no.safetensors", "info old.safetensors"):
        assert "has no scale: neither an alpha" in fails(line)
        assert "give --alpha, the lora_alpha of its training" in fails(line)
    assert not Path("no.safetensors").exists()
    assert close(merged("old.safetensors", "--alpha", "3"), expected)
    report = json.loads(run("info", "old.safetensors", "--base", "base.safetensors", "--alpha", "3", "--json"))
    assert (report["format"], {layer["scale"] for layer in report["layers"].values()}) == ("diffusers", {1.5})
    run("convert old.safetensors --alpha 3 --base base.safetensors --to diffusers -o new.safetensors")
    assert close(merged("new.safetensors"), expected)
    assert "for files that do not state them" in fails("info new.safetensors --alpha 3")
    for line in ("verify old.safetensors --base base.safetensors", "resize old.safetensors -o 1.safetensors --rank 1"):
        run(line, "--alpha", "3", *(["--base", "base.safetensors"] if "resize" in line else []))
    run("combine old.safetensors old.safetensors -o 2.safetensors --base base.safetensors --alpha 3")
    assert json.loads(run("diff new.safetensors 1.safetensors --base base.safetensors --json"))["same_layers"]


def test_one_network_of_several_is_taken_by_its_part(folder: Path) -> None:
    whole = adapter("locon")
    formats.write(whole, "kohya.safetensors", "locon", prefix="lora_unet")
    tensors = load_file("kohya.safetensors")
    text = {f"lora_te_fc.{name}": t for name, t in {
        "lora_down.weight": torch.ones(2, 3), "lora_up.weight": torch.ones(4, 2), "alpha": torch.tensor(2)}.items()
    }  # fmt: skip
    save_file({**tensors, **text}, "kohya.safetensors")
    line = "merge base.safetensors kohya.safetensors -o no.safetensors"
    assert "the file is of several networks, 'lora_te' (1), 'lora_unet'" in fails(line)
    assert "--part reads one of them" in fails(line)
    assert "no name begins with prefix 'vae'; the file has 'lora_te', 'lora_unet'" in fails(line, "--part", "vae")
    assert not Path("no.safetensors").exists()
    assert close(merged("kohya.safetensors", "--part", "lora_unet"), whole.apply_to(base().state_dict()))
    run("convert kohya.safetensors --part lora_unet --base base.safetensors --to peft -o rain")
    assert close(merged("rain"), whole.apply_to(base().state_dict()))
    assert "1 layers" in run("info", "kohya.safetensors", "--part", "lora_te")


HELD = [(to, factors) for to, kinds in formats.HELD.items() for factors in kinds if factors != "convlora"]


@pytest.mark.parametrize(("to", "factors"), HELD)
def test_methods_stay_what_they_are_where_a_format_has_them(to: str, factors: str, folder: Path) -> None:
    whole = adapter(factors)
    whole.write("rain.safetensors")
    out = "other" if to == "peft" else "other.safetensors"
    run("convert", "rain.safetensors", "--to", to, "-o", out)
    run("convert", out, "--to", "convlora", "--base", "base.safetensors", "-o", "again.safetensors")
    again = Adapter.read("again.safetensors")
    assert again.config.factors == factors
    assert close(merged(out), whole.apply_to(base().state_dict()))
    assert close(merged("again.safetensors"), whole.apply_to(base().state_dict()))
    report = json.loads(run("info", out, "--base", "base.safetensors", "--json"))
    assert (report["format"], report["factors"]) == (to, factors)
    assert all(layer["norm"] > 0 for layer in report["layers"].values())


def test_what_a_format_does_not_hold_is_refactored_or_refused(folder: Path) -> None:
    adapter("loha").write("loha.safetensors")
    run("convert loha.safetensors --to diffusers -o other.safetensors")
    assert formats.read("other.safetensors").config.factors == "locon"
    assert close(merged("other.safetensors"), adapter("loha").apply_to(base().state_dict()))
    adapter("dora").write("dora.safetensors")
    said = fails("convert dora.safetensors --to loralib -o no.pt")
    assert "the update of 'dora' factors depends on the base's weights" in said
    said = fails("convert loha.safetensors --to loralib --factors locon -o no.pt")
    assert said == "convert: loralib files hold 'convlora' factors only; leave --factors out"
    assert not Path("no.pt").exists()
