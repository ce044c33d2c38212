"""The README's code runs, its links point at files, its commands are those that run, its table of peers is true."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_peers import LAYERS, PEFT_RAISES, PEFT_RIGHT, PEFT_WRONG, distance
from torch import Tensor, nn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_code_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    written = [".pth"] * code.count("torch.save(") + [".safetensors"] * code.count("convlora.save(")
    assert sorted(path.suffix for path in tmp_path.iterdir()) == written


def test_links_point_at_files() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_there_is_one_test_command_and_it_is_what_ci_runs() -> None:
    assert README.count("<!-- tests -->") == 1
    assert "<!-- tests -->" in (ROOT / ".ci" / "run").read_text()


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 200


# --- the table of peers: the column of PEFT is held by test_peers.py ---------------------------------------------

CASES = {  # row of the table -> cases of test_peers.py
    "dilation": ["dilation 2"],
    "padding modes `reflect`, `circular`": ["padding_mode reflect", "padding_mode circular"],
    "groups, depthwise": ["groups 4", "depthwise"],
    "`Conv3d` of 1×1×3": ["Conv3d (1, 1, 3)"],
    "kernels of 1×5": ["kernel (1, 5)"],
    "`ConvTranspose2d`": ["ConvTranspose2d"],
    "a convolution with a forward of its own": ["own forward"],
}


def cells(row: str) -> list[str]:
    """What a row of the table says of convlora, PEFT, LyCORIS and loralib."""
    (line,) = [line for line in README.splitlines() if line.startswith(f"| {row} |")]
    return [cell.strip() for cell in line.strip("|").split("|")[1:]]


def lycoris_outcome(base: nn.Module, x: Tensor) -> str:
    lycoris = pytest.importorskip("lycoris")
    model = nn.Sequential(copy.deepcopy(base)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lycoris.create_lycoris(
            model, 1.0, linear_dim=2, linear_alpha=2, conv_dim=2, conv_alpha=2, algo="lora"
        )
    network.apply_to()
    with torch.no_grad():
        for p in network.parameters():
            p.normal_(std=0.3)
        live = model(x)
        if distance(live, base(x)) == 0:
            return "left out"
        network.restore()
        network.merge_to(1.0)
        return "wrong" if distance(model(x), live) > 0.05 else "yes"


def loralib_outcome(base: nn.Module, x: Tensor) -> str:
    loralib: Any = pytest.importorskip("loralib")
    kind: Any = getattr(loralib, type(base).__name__, None)
    if kind is None:
        return "no such layer"
    sizes: Any = base.kernel_size if len(set(base.kernel_size)) > 1 else base.kernel_size[0]  # type: ignore[arg-type]
    options = {name: getattr(base, name) for name in ("dilation", "groups", "padding", "padding_mode", "stride")}
    try:
        layer = kind(base.in_channels, base.out_channels, sizes, r=2, lora_alpha=2, **options)
    except AssertionError:
        return "error"
    layer.conv.load_state_dict(base.state_dict())
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.train()  # loralib's gives None
        live = layer(x)
        assert distance(live, base(x)) > 0.05
        layer.eval()
        return "wrong" if distance(layer(x), live) > 0.05 else "yes"


@pytest.mark.parametrize("row", CASES)
def test_lycoris_and_loralib_do_what_the_table_says(row: str) -> None:
    _, _, lycoris, loralib = cells(row)
    for case in CASES[row]:
        make, shape = LAYERS[case]
        base, x = make().eval(), torch.randn(shape)
        assert lycoris_outcome(base, x) == lycoris
        assert loralib_outcome(base, x) == loralib


def test_the_table_says_of_peft_what_its_tests_show() -> None:
    shown = {
        **dict.fromkeys(PEFT_RAISES, "error"),
        **dict.fromkeys(PEFT_WRONG, "wrong"),
        **dict.fromkeys(PEFT_RIGHT, "yes"),
    }
    for row, cases in CASES.items():
        assert cells(row)[:2] == ["yes", *{shown[case] for case in cases}], row
