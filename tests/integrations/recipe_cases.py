"""The code of docs/trainers.md runs, each block on its own, and averages of adapted networks are what they should."""

from __future__ import annotations

import copy
import importlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import NET_INPUT, net
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import convlora
from convlora import ConvLoRAError
from convlora.integrations.averages import take_base

PAGE = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
OPTIONAL = ("accelerate", "lightning", "timm", "transformers", "ultralytics")
WRITTEN = {  # heading -> what its code leaves behind
    "LoRA+ in one line": [],
    "Lightning": ["rain.pth", "rain.safetensors"],
    "Hugging Face Trainer": ["run/adapter.safetensors", "run/checkpoint-4", "run/merged/model.safetensors"],
    "ultralytics": ["merged.safetensors", "runs/rain/weights/best.pt", "runs/rain/weights/best.safetensors"],
    "BasicSR and its kind": ["net_g_3.pth", "net_g_3.safetensors", "net_g_3_ema.safetensors"],
    "accelerate": ["state/adapter.safetensors"],
    "An own loop": ["merged.pth", "run.pt", "run.safetensors"],
    "Averages": ["average.safetensors"],
}


def blocks() -> list[Any]:
    """Every block of code, with the heading above it."""
    found, heading = [], ""
    for part in re.split(r"(```python\n.*?```)", PAGE, flags=re.DOTALL):
        if part.startswith("```python"):
            found.append(pytest.param(heading, part.removeprefix("```python\n").removesuffix("```"), id=heading))
        else:
            heading = (re.findall(r"^#+ (.+)$", part, re.MULTILINE) or [heading])[-1]
    return found


@pytest.mark.parametrize(("heading", "code"), blocks())
def test_the_code_of_the_page_runs(
    heading: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    for package in OPTIONAL:
        if re.search(rf"^(?:from|import) {package}\b", code, re.MULTILINE):
            try:
                importlib.import_module(package)
            except ImportError as missing:
                pytest.skip(str(missing))
    monkeypatch.chdir(tmp_path)
    if "data.yaml" in code:
        shutil.copy(request.getfixturevalue("detection"), tmp_path)
    exec(code, {"__name__": "recipe"})
    assert [path for path in WRITTEN[heading] if not (tmp_path / path).exists()] == []


def test_every_heading_of_the_page_with_code_says_what_is_left_behind() -> None:
    assert {block.id for block in blocks()} == set(WRITTEN)


# --- averages ----------------------------------------------------------------------------------------------------

Average = tuple[nn.Module, Callable[[nn.Module], None]]  # the averaged network, and how it takes a step


def swa(model: nn.Module) -> Average:
    average = AveragedModel(model)
    return average, average.update_parameters


def ema(model: nn.Module) -> Average:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.7), use_buffers=True)
    return average, average.update_parameters


def timm_v2(model: nn.Module) -> Average:
    average = pytest.importorskip("timm.utils").ModelEmaV2(model, decay=0.7)
    return average.module, average.update


def timm_v3(model: nn.Module) -> Average:
    average = pytest.importorskip("timm.utils").ModelEmaV3(model, decay=0.7)
    return average.module, average.update


def by_name(model: nn.Module) -> Average:
    average = copy.deepcopy(model)

    def update(model: nn.Module) -> None:
        current = dict(model.named_parameters())
        for name, p in average.named_parameters():
            p.data.mul_(0.7).add_(current[name].data, alpha=0.3)

    return average, update


@pytest.mark.parametrize("make", [swa, ema, timm_v2, timm_v3, by_name])
@pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")
def test_an_average_of_an_adapted_network_holds_the_adapter_and_its_base(
    make: Callable[[nn.Module], Average], tmp_path: Path
) -> None:
    base = net()
    model = convlora.inject(copy.deepcopy(base), ["0", "3", "4"], rank=1, modules_to_save="6")
    average, update = make(model)
    optimizer = torch.optim.Adam(convlora.parameters(model), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(NET_INPUT)).square().mean().backward()
        optimizer.step()
        update(model)
    take_base(average, model)
    assert convlora.changed(average) == []
    state = convlora.merged_state_dict(average)
    convlora.save(average, tmp_path / "average.safetensors")
    x = torch.randn(NET_INPUT)
    with torch.no_grad():
        expected = average.eval()(x)
        loaded = convlora.load(copy.deepcopy(base).eval(), tmp_path / "average.safetensors")
        assert torch.equal(loaded(x), expected)
        assert not torch.equal(expected, model.eval()(x))
        assert not torch.equal(expected, base.eval()(x))
        base.load_state_dict(state, strict=True)
        assert torch.equal(base(x), expected)


def test_an_average_of_a_plain_network_is_told() -> None:
    plain = net()
    with pytest.raises(ConvLoRAError, match="has no adapters"):
        convlora.save(AveragedModel(plain), "never.safetensors")
    with pytest.raises(ConvLoRAError, match="has no adapters"):
        take_base(plain, plain)
