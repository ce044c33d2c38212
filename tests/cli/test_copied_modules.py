"""The command on adapters that hold copies of whole modules: it computes what the library does."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import convlora
from convlora.cli.app import app


class Net(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.body(x)).mean((2, 3)))  # type: ignore[no-any-return]


def trained(base: nn.Module, seed: int) -> nn.Module:
    """With an adapter, a head of seven classes and moved statistics, in eval mode."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    model.fc = nn.Linear(8, 7)
    convlora.inject(model, "body", rank=1, modules_to_save="fc")
    optimizer = torch.optim.SGD(convlora.parameters(model), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(torch.randn(8, 3, 6, 6) + 1).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    base = Net()
    torch.save(base.state_dict(), "base.pth")
    save_file(base.state_dict(), "base.safetensors", metadata={"author": "x"})
    for seed, name in enumerate(("rain", "snow")):
        convlora.save(trained(base, seed), f"{name}.safetensors")
    return tmp_path


def run(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False, prog_name="convlora")
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_merge_puts_copies_in_their_places_bitwise(suffix: str, folder: Path) -> None:
    run("merge", f"base{suffix}", "rain.safetensors", "-o", f"merged{suffix}")
    merged = torch.load(folder / "merged.pth") if suffix == ".pth" else load_file(folder / "merged.safetensors")
    base, x = Net(), torch.randn(2, 3, 6, 6)
    base.load_state_dict(torch.load(folder / "base.pth"))
    live = convlora.load(copy.deepcopy(base), folder / "rain.safetensors").eval()
    plain = Net(classes=7)
    plain.load_state_dict(merged)
    assert torch.equal(plain.eval()(x), live(x))
    if suffix == ".safetensors":
        with safe_open(folder / "merged.safetensors", "pt") as file:
            assert file.metadata()["author"] == "x"


def test_info_and_verify_name_the_copies(folder: Path) -> None:
    facts: dict[str, Any] = json.loads(run("info", "rain.safetensors", "--json"))
    assert facts["modules"]["fc"] == {"weight": [7, 8], "bias": [7]}
    assert facts["modules"]["bn"] == {"running_mean": [8], "running_var": [8], "num_batches_tracked": []}
    assert "weight 7×8  bias 7" in run("info", "rain.safetensors")
    assert "copies of 2 modules" in run("verify", "rain.safetensors", "--base", "base.pth")


def test_diff_compares_the_copies(folder: Path) -> None:
    same = json.loads(run("diff", "rain.safetensors", "rain.safetensors", "--json"))["modules"]
    assert set(same.values()) == {0.0}
    other = json.loads(run("diff", "rain.safetensors", "snow.safetensors", "--json"))["modules"]
    assert other["fc.weight"] > 0


def test_combine_averages_the_copies(folder: Path) -> None:
    run("combine", "rain.safetensors", "snow.safetensors", "-w", "0.25", "-w", "0.75", "-o", "both.safetensors")
    one, other, both = (convlora.Adapter.read(f"{name}.safetensors").modules for name in ("rain", "snow", "both"))
    expected = 0.25 * one["fc"]["weight"].double() + 0.75 * other["fc"]["weight"].double()
    torch.testing.assert_close(both["fc"]["weight"].double(), expected, rtol=1e-6, atol=1e-7)
    result = CliRunner().invoke(
        app, ["combine", "rain.safetensors", "snow.safetensors", "-w", "1", "-w", "1", "-o", "no.safetensors"]
    )
    assert result.exit_code == 1
    assert "weights that sum to 2 instead of 1" in result.stderr
    assert not Path("no.safetensors").exists()


def test_resize_and_convert_keep_the_copies(folder: Path) -> None:
    run("resize", "rain.safetensors", "--energy", "1", "-o", "small.safetensors")
    run("convert", "rain.safetensors", "--to", "peft", "--base", "base.pth", "-o", "peft")
    run("convert", "peft", "--to", "convlora", "-o", "back.safetensors")
    expected = convlora.Adapter.read("rain.safetensors").modules
    for name in ("small", "back"):
        found = convlora.Adapter.read(f"{name}.safetensors").modules
        assert {path: list(tensors) for path, tensors in found.items()}.keys() == expected.keys()
        for path, tensors in expected.items():
            assert all(torch.equal(found[path][n], tensor) for n, tensor in tensors.items())
