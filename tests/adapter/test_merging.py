"""Merging into checkpoints block by block: the same values as whole, whatever is merged into what."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from oracle import randomise
from safetensors.torch import save_file
from torch import Tensor, nn

import convlora
from convlora import Adapter, ConvLoRAError
from convlora.adapter import checkpoint
from convlora.adapter.checkpoint import apply_adapters, plan_merge
from convlora.support import tensorfile
from convlora.support.tensorfile import TensorFile


class Net(nn.Module):
    """Layers of every order of weights, a tied pair, a module at two paths, norms and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.up = nn.ConvTranspose2d(6, 4, 3, groups=2)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 5)
        self.again = self.conv

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.up(self.conv(x))).mean((2, 3)))


def adapter(seed: int, **options: object) -> Adapter:
    torch.manual_seed(0)
    net = Net()
    torch.manual_seed(seed)
    convlora.inject(net, ["conv", "up"], rank=2, ranks={"up": 1}, bias=True, **options)  # type: ignore[arg-type]
    randomise(net, std=0.5)
    net.train()(torch.randn(2, 4, 6, 6))  # statistics of its own
    return convlora.adapter(net)


def state(dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in Net().state_dict().items()}


PARTS = {
    "one": [(adapter(1), 1.0)],
    "at half strength": [(adapter(1), 0.5)],
    "of other factors": [(adapter(1, factors="locon", alpha=3.0), -1.3)],
    "two": [(adapter(1), 0.7), (adapter(2, factors="locon"), 1.0)],
    "copies": [(adapter(1, modules_to_save="head"), 1.0)],
    "copies at half strength": [(adapter(1, modules_to_save="head"), 0.5)],
    "copies of two": [(adapter(1, modules_to_save="head"), 1.0), (adapter(2, modules_to_save="head"), 0.5)],
}


@pytest.fixture(params=[2**16, 7, 1])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BLOCK", request.param)
    monkeypatch.setattr(tensorfile, "BLOCK", request.param)


@pytest.mark.usefixtures("_block")
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("exact", [False, True])
def test_blocks_are_bitwise_the_whole(parts: str, dtype: torch.dtype, exact: bool, tmp_path: Path) -> None:
    base = state(dtype)
    save_file({name: t.clone() for name, t in base.items()}, tmp_path / "base.safetensors")
    merged = apply_adapters(PARTS[parts], base, exact)
    assert any(not torch.equal(merged[name], base[name]) for name in base)
    for source in (base, TensorFile.open(tmp_path / "base.safetensors")):
        plan = plan_merge(PARTS[parts], source, exact)
        assert {n for n in base if merged[n] is not base[n]} == set(plan.entries) & set(base)
        for name, entry in plan.entries.items():
            blocks = list(entry.blocks())
            assert len(blocks) == math.ceil(merged[name].numel() / checkpoint.BLOCK)
            assert torch.equal(torch.cat(blocks).view(entry.shape), merged[name])
            assert torch.equal(entry.whole(), merged[name])
            assert {block.dtype for block in blocks} == {entry.dtype} == {merged[name].dtype}
        plan.refuse_problems()


@pytest.mark.usefixtures("_block")
def test_every_entry_that_is_not_finite_is_named() -> None:
    base = state(torch.float32)
    base["up.weight"][-1, -1, -1, -1] = torch.nan
    base["conv.bias"][0] = -torch.inf
    plan = plan_merge(PARTS["one"], base)
    for entry in plan.entries.values():
        list(entry.blocks())
    with pytest.raises(ConvLoRAError, match=r"^Adapter\.apply_to: non-finite: conv\.bias, up\.weight$"):
        plan.refuse_problems()
    with pytest.raises(ConvLoRAError, match=r"^Adapter\.apply_to: non-finite: conv\.bias, up\.weight$"):
        PARTS["one"][0][0].apply_to(base)


def test_planning_reads_no_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({name: t.clone() for name, t in state(torch.float32).items()}, tmp_path / "base.safetensors")
    file = TensorFile.open(tmp_path / "base.safetensors")
    monkeypatch.setattr(TensorFile, "_read", None)
    plan = plan_merge(PARTS["copies"], file)
    assert {"conv.weight", "again.weight", "up.bias", "head.weight", "norm.running_mean"} <= set(plan.entries)
    assert plan.entries["again.weight"] is plan.entries["conv.weight"]
