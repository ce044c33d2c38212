"""The commands on large files: in little memory, and with every check that small ones get."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from oracle import randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import convlora
from convlora import Adapter
from convlora.cli.app import app
from convlora.support.tensorfile import TensorFile

PEAK = """
import sys
sys.path.insert(0, "benchmarks")
from common import peak_memory
from typer.testing import CliRunner
from convlora.cli.app import app
def merge(base, adapter, out):
    done = CliRunner().invoke(app, ["merge", base, adapter, "-o", out, "--force"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
small, large = sys.argv[1:4], sys.argv[4:7]
merge(*small)  # what the first call loads does not count
print(peak_memory(lambda: merge(*large)))
"""


def chain(layers: int, width: int, **options: Any) -> nn.Module:
    return nn.Sequential(*(nn.Linear(width, width, bias=False, **options) for _ in range(layers)))


def files(net: nn.Module, folder: Path) -> list[str]:
    """A checkpoint, an adapter for it, and a place for the result."""
    folder.mkdir()
    save_file(net.state_dict(), folder / "base.safetensors", metadata={"author": "x"})
    convlora.save(randomise(convlora.inject(net, "*", rank=2, factors="locon"), std=0.5), folder / "lora.safetensors")
    return [str(folder / name) for name in ("base.safetensors", "lora.safetensors", "out.safetensors")]


def run(*args: str) -> Any:
    return CliRunner().invoke(app, list(args), catch_exceptions=False)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_merge_takes_little_more_memory_than_the_largest_tensor(tmp_path: Path) -> None:
    small, large = files(chain(1, 8), tmp_path / "small"), files(chain(8, 2048), tmp_path / "large")
    largest, whole, adapter = 2**24, os.path.getsize(large[0]), os.path.getsize(large[1])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *small, *large],
        check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)},  # what is freed is given back
    )  # fmt: skip
    assert largest <= int(done.stdout) < 1.3 * largest + adapter + 2**22 < whole / 4  # some MiB are the heap's own
    with safe_open(large[2], "pt") as out, safe_open(large[0], "pt") as base:
        assert out.metadata() == {"author": "x"}
        merged = Adapter.read(large[1]).apply_to({name: base.get_tensor(name) for name in base.keys()})  # noqa: SIM118
        assert all(torch.equal(out.get_tensor(name), value) for name, value in merged.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_other_byte_stays(dtype: torch.dtype, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)).to(dtype)
    beside = {"mask": torch.tensor([True]), "tiny": torch.ones(5).to(torch.float8_e4m3fn)}
    save_file({**net.state_dict(), **beside}, tmp_path / "base.safetensors", metadata={"b": "1", "a": "ü"})
    convlora.save(randomise(convlora.inject(net, "2", rank=1), std=0.5), tmp_path / "lora.safetensors")
    out = str(tmp_path / "out.safetensors")
    assert (
        run("merge", str(tmp_path / "base.safetensors"), str(tmp_path / "lora.safetensors"), "-o", out).exit_code == 0
    )
    before, after = (tmp_path / "base.safetensors").read_bytes(), Path(out).read_bytes()
    place = TensorFile.open(tmp_path / "base.safetensors").stored["2.weight"]
    start = 8 + int.from_bytes(before[:8], "little")
    assert before[: start + place.start] == after[: start + place.start]
    assert before[start + place.stop :] == after[start + place.stop :]
    assert torch.equal(load_file(out)["2.weight"], convlora.merge(net)[2].weight)


def test_what_is_refused_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    net = chain(3, 8)
    with torch.no_grad():
        net[0].weight[0, 0] = net[2].weight[7, 7] = torch.inf
    base, lora, out = files(net, tmp_path / "a")
    Path(out).write_text("old")
    result = run("merge", base, lora, "-o", out, "--force")
    assert (result.exit_code, result.stderr) == (1, "error: merge: non-finite: 0.weight, 2.weight\n")
    assert Path(out).read_text() == "old"
    assert sorted(os.listdir(tmp_path / "a")) == ["base.safetensors", "lora.safetensors", "out.safetensors"]


def test_a_base_that_is_written_meanwhile_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, lora, out = files(chain(3, 8), tmp_path / "a")
    copy_bytes = TensorFile.copy_bytes

    def and_write(self: TensorFile, start: int, stop: int, to: BinaryIO) -> None:
        copy_bytes(self, start, stop, to)
        with contextlib.suppress(OSError):
            os.utime(base, ns=(1, 1))

    monkeypatch.setattr(TensorFile, "copy_bytes", and_write)
    result = run("merge", base, lora, "-o", out)
    assert result.exit_code == 1
    assert "was written while it was read; try again" in result.stderr
    assert not Path(out).exists()
    assert len(os.listdir(tmp_path / "a")) == 2


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, lora, out = files(chain(3, 8), tmp_path / "a")

    def full(self: TensorFile, start: int, stop: int, to: BinaryIO) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorFile, "copy_bytes", full)
    result = run("merge", base, lora, "-o", out)
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr
    assert "No space left on device" in result.stderr
    assert len(os.listdir(tmp_path / "a")) == 2


def test_a_head_of_another_shape_is_written_anew(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    save_file(net.state_dict(), tmp_path / "base.safetensors", metadata={"author": "x"})
    net[2] = nn.Linear(4, 7)
    convlora.inject(net, "0", rank=1, modules_to_save="2")
    convlora.save(randomise(net, std=0.5), tmp_path / "lora.safetensors")
    out = str(tmp_path / "out.safetensors")
    assert (
        run("merge", str(tmp_path / "base.safetensors"), str(tmp_path / "lora.safetensors"), "-o", out).exit_code == 0
    )
    expected = convlora.merged_state_dict(net)
    found = load_file(out)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert found["2.weight"].shape == (7, 4)
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "x"}
