"""Deployment: what torch.export, onnxruntime and torch.jit.trace run is the adapted network, in the base's graph."""

# ruff: noqa: E402  (the examples import from their own folder)

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import zoo
from oracle import NET_INPUT, net, randomise
from torch import Tensor, nn

pytest.importorskip("spandrel")
pytest.importorskip("accelerate")
pytest.importorskip("onnxruntime")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import deploy
from sr.models import collapse, new_span

import convlora

pytestmark = [
    pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning"),  # third-party networks call it the old way
]
Made = Callable[[], tuple[nn.Module, Tensor]]


def _collapsed_span() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return new_span(8), torch.rand(1, 3, 12, 12)


def _small(name: str) -> Made:
    def made() -> tuple[nn.Module, Tensor]:
        model, (x,) = zoo.build(name)
        return model, x

    return made


NETS: dict[str, Made] = {
    "toy": lambda: (net(), torch.rand(NET_INPUT)),
    "collapsed SPAN": _collapsed_span,
    "SPAN": _small("SPAN"),
    "SwinIR": _small("SwinIR"),
    "ESRGAN": _small("ESRGAN"),
}
WAYS = list(deploy.WAYS)


def made(name: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """(base, adapted, input); both in eval mode."""
    torch.manual_seed(0)
    base, x = NETS[name]()
    model = zoo.inject(copy.deepcopy(base), exclude=("eval_conv",) if name == "SPAN" else ())
    return base.eval(), randomise(model, std=0.1).eval(), x


def plain(model: nn.Module) -> nn.Module:
    return convlora.remove(convlora.merge(copy.deepcopy(model)))


def ready(name: str, model: nn.Module) -> nn.Module:
    """As it is deployed: SPAN's train form assigns its fused weights at every eval forward, and so is fused before."""
    return collapse(copy.deepcopy(model)) if name == "SPAN" else model


def exported(way: str, model: nn.Module, x: Tensor, folder: Path) -> deploy.Exported:
    export, suffix = deploy.WAYS[way]
    return export(model, x, folder / f"network{suffix}")


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("way", WAYS)
def test_merged_and_removed_is_the_live_network_in_the_graph_of_the_base(way: str, name: str, tmp_path: Path) -> None:
    base, model, x = made(name)
    before = exported(way, ready(name, base), x, tmp_path)
    after = exported(way, ready(name, plain(model)), x, tmp_path)
    with torch.no_grad():
        live, unadapted = model(x), base(x)
        close(after.run(x), live)
    assert not torch.allclose(live, unadapted, rtol=1e-2)
    assert after.operators == before.operators
    assert after.parameters == before.parameters


@pytest.mark.parametrize("way", WAYS)
def test_still_merged_exports_in_the_graph_of_the_base(way: str, tmp_path: Path) -> None:
    base, model, x = made("toy")
    before = exported(way, base, x, tmp_path)
    after = exported(way, convlora.merge(copy.deepcopy(model)), x, tmp_path)
    with torch.no_grad():
        close(after.run(x), model(x))
    assert after.operators == before.operators


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["toy", "collapsed SPAN"])
def test_live_with_several_adapters_exports(way: str, name: str, tmp_path: Path) -> None:
    _, model, x = made(name)
    randomise(zoo.inject(model, name="second", factors="locon"), "second", std=0.1)
    convlora.activate(model, {"default": 0.7, "second": -0.4})
    with torch.no_grad():
        close(exported(way, model, x, tmp_path).run(x), model(x))


def test_deploy_py_as_a_user_starts_it(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(ROOT / "examples/deploy.py"), "--steps", "1", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "merged is the live network in the base's graph, 3 times" in result.stdout
    names = {f"span_{network}.{suffix}" for network in ("base", "live", "merged") for suffix in ("pt2", "onnx", "pt")}
    assert {path.name for path in tmp_path.iterdir()} == names
