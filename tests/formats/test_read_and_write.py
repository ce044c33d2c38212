"""Formats in general: detecting them, hostile and damaged files, and what all of them promise."""

from __future__ import annotations

import copy
import json
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from oracle import snapshot
from safetensors.torch import save_file
from torch import Tensor, nn

import convlora
from convlora import Adapter, ConvLoRAError, formats
from convlora.factors.base import WeightSpec

pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")

FILES = {  # format -> name of the file, or folder, to write
    "convlora": "rain.safetensors", "peft": "rain", "locon": "rain.safetensors", "loralib": "rain.safetensors",
    "diffusers": "rain.safetensors",
}  # fmt: skip


def written(folder: Path, kind: str, name: str | None = None, **options: Any) -> tuple[Path, nn.Module]:
    """An adapter in one of the formats, and its base."""
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1)))
    path = folder / (name or FILES[kind])
    formats.write(nets.adapter(base, factors="convlora", rank=1), path, kind, **options)
    return path, base


def refused(path: Any, message: str = "", **options: Any) -> None:
    """Reading raises one ConvLoRAError, of one line."""
    with pytest.raises(ConvLoRAError, match=re.escape(message) or None) as caught:
        formats.read(path, **options)
    assert "\n" not in str(caught.value)


# --- dispatch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_a_written_adapter_is_detected_and_comes_back(kind: str, tmp_path: Path) -> None:
    path, base = written(tmp_path, kind)
    assert formats.detect(path) == kind
    assert formats.detect(str(path)) == kind
    loaded = formats.read(path, layers=formats.specs_of(base), name="snow")
    assert loaded.config.name == "snow"
    assert {p: layer.spec for p, layer in loaded.layers.items()} == formats.specs_of(base)
    assert convlora.adapters(convlora.load(base, loaded))["snow"] == loaded.config


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_every_format_converts_into_every_other(kind: str, tmp_path: Path) -> None:
    path, base = written(tmp_path, kind)
    adapter = formats.read(path, layers=formats.specs_of(base))
    for other in formats.FORMATS:
        target = tmp_path / other / FILES[other]
        target.parent.mkdir()
        formats.write(adapter, target, other, **({"alpha": 2} if other == "loralib" else {}))
        again = formats.read(target, other, layers=formats.specs_of(base))
        for layer in adapter.layers:
            assert torch.allclose(again.delta(layer), adapter.delta(layer), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_writing_is_deterministic_and_overwrites_only_if_it_may(kind: str, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    adapter = nets.adapter(base, factors="convlora", rank=1)

    def content() -> list[tuple[str, bytes]]:
        return sorted((p.name, p.read_bytes()) for p in tmp_path.rglob("*") if p.is_file())

    states = []
    for _ in range(2):
        formats.write(adapter, tmp_path / FILES[kind], kind, **({"alpha": 1} if kind == "loralib" else {}))
        states.append(content())
    assert states[0] == states[1]
    with pytest.raises(ConvLoRAError, match="exists; overwrite=True replaces it"):
        formats.write(nets.adapter(base), tmp_path / FILES[kind], kind, overwrite=False)
    assert content() == states[0]


@pytest.mark.parametrize("kind", formats.FORMATS)
def test_an_adapter_of_another_base_is_refused(kind: str, tmp_path: Path) -> None:
    path, _ = written(tmp_path, kind)
    refused(path, layers={"0": WeightSpec((4, 3, 3, 3)), "one": WeightSpec((4, 4, 1, 1))})
    refused(path, layers={"0": WeightSpec((4, 3, 5, 5)), "1.0": WeightSpec((4, 4, 1, 1))})
    refused(path, "layers= must be", layers={"0": (4, 3, 3, 3)})


def test_options_of_other_formats_are_refused(tmp_path: Path) -> None:
    path, base = written(tmp_path, "locon")
    refused(path, "rank= and alpha= are for files that do not state them", alpha=1)
    refused(path, "rank= and alpha= are for files that do not state them", rank=1)
    refused(path, "prefix (=3) must be a string, for locon or diffusers files", prefix=3)
    refused(path, "format (='kohya') must be one of convlora, peft, locon, loralib, diffusers", format="kohya")
    refused(3, "path (=3) must be a string or a path")
    adapter = nets.adapter(base)
    for options, message in [
        ({"prefix": "lora"}, "prefix (='lora') must be a string, for peft, locon or diffusers files"),
        ({"format": "locon", "prefix": 3}, "prefix (=3) must be a string"),
        ({"format": "locon", "alpha": 3}, "alpha= is for loralib files"),
        ({"format": "zip"}, "format (='zip') must be one of"),
    ]:
        with pytest.raises(ConvLoRAError, match=re.escape(message)):
            formats.write(adapter, tmp_path / "other", **options)
    with pytest.raises(ConvLoRAError, match="expected an Adapter, got Sequential"):
        formats.write(base, tmp_path / "other")  # type: ignore[arg-type]
    with pytest.raises(ConvLoRAError, match=r"has suffix '\.zip'; name it one of \.safetensors, \.pt"):
        formats.write(adapter, tmp_path / "other.zip", "locon")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", [k for k in formats.FORMATS if k != "convlora"])
def test_adapter_read_and_load_point_to_the_other_formats(kind: str, tmp_path: Path) -> None:
    path, base = written(tmp_path, kind)
    before = snapshot(base)
    for call in (Adapter.read, lambda p: convlora.load(base, p)):
        with pytest.raises(
            ConvLoRAError, match=r"convlora\.formats\.read reads those of PEFT, LyCORIS, diffusers and loralib"
        ):
            call(path)
    assert snapshot(base) == before


def test_what_is_no_adapter_is_refused_by_name(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "no file")
    refused(tmp_path, "so it is no PEFT adapter")
    save_file(nn.Conv2d(3, 4, 3).state_dict(), tmp_path / "base.safetensors")
    refused(
        tmp_path / "base.safetensors", "is no adapter of a known format (convlora, peft, locon, loralib, diffusers)"
    )
    save_file({"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2)}, tmp_path / "peft.safetensors")
    refused(tmp_path / "peft.safetensors", "'a.lora_B.weight' has no scale: neither an alpha")
    refused("a\0b", "no file")
    refused("a" * 5000, "no file")


def test_importing_the_formats_loads_no_other_library() -> None:
    import subprocess

    code = "import sys, convlora.formats; print([n for n in ('peft', 'lycoris', 'loralib') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- specs -------------------------------------------------------------------------------------------------------


def test_specs_of_a_model_and_of_its_checkpoint() -> None:
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 6, 2), nn.Linear(3, 5))
    assert formats.specs_of(base) == {
        "0": WeightSpec((8, 2, 3, 3), groups=2),
        "2": WeightSpec((8, 6, 2, 2), transposed=True),
        "3": WeightSpec((5, 3)),
    }
    adapted = convlora.inject(copy.deepcopy(base), targets="*", rank=1)
    assert formats.specs_of(nn.DataParallel(adapted)) == formats.specs_of(base)
    guessed = {"0": WeightSpec((8, 2, 3, 3))}  # a checkpoint does not tell groups
    assert formats.specs_from_checkpoint(base.state_dict()) == {**formats.specs_of(base), **guessed}
    odd = {
        "a.weight": torch.ones(0, 3),
        "b.weight": torch.ones(2, 2).int(),
        3: torch.ones(2, 2),
        "weight": torch.ones(2, 2),
    }
    assert formats.specs_from_checkpoint(odd) == {"": WeightSpec((2, 2))}  # type: ignore[arg-type]
    with pytest.raises(ConvLoRAError, match="expected an nn"):
        formats.specs_of({})  # type: ignore[arg-type]
    with pytest.raises(ConvLoRAError, match="expected a state dict"):
        formats.specs_from_checkpoint(base)  # type: ignore[arg-type]


# --- hostile and damaged files -----------------------------------------------------------------------------------


class Bomb:
    """Leaves a file behind when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (Path("bomb"),)


def _spread() -> Tensor:
    return torch.ones(1).expand(10**6, 10**6)  # 4 bytes in the file, 4 TB as a tensor


PICKLES: dict[str, Any] = {
    "code": {"a.lora_A": Bomb()},
    "code at the top": Bomb(),
    "a module": nn.Conv2d(3, 4, 3),
    "nested": {"state_dict": {"a.lora_A": torch.ones(2, 3)}},
    "numbers": {"a.lora_A": 3},
    "numbers for names": {3: torch.ones(2, 3)},
    "a list": [torch.ones(2, 3)],
    "nothing": {},
    "a huge view": {"a.lora_A": _spread(), "a.lora_B": torch.ones(4, 2)},
    "sparse": {"a.lora_A": torch.eye(2).to_sparse(), "a.lora_B": torch.ones(4, 2)},
    "no values": {"a.lora_A": torch.ones(2, 3, device="meta"), "a.lora_B": torch.ones(4, 2)},
}


@pytest.mark.parametrize("kind", ["locon", "loralib", None])
@pytest.mark.parametrize("case", PICKLES)
def test_pickles_are_never_executed(
    case: str, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(PICKLES[case], "rain.pt")
    options = {"alpha": 1, "rank": 1} if kind != "locon" else {}
    refused("rain.pt", format=kind, **options)
    Path("bare.pt").write_bytes(pickle.dumps(Bomb()))
    refused("bare.pt", "cannot be read", format=kind, **options)
    assert not Path("bomb").exists()


def _read_or_refuse(path: Path, kind: str) -> bool:
    """Whether a damaged adapter is read; anything but an adapter or one error fails the test."""
    options: dict[str, Any] = {"alpha": 1, "rank": 1} if kind == "loralib" else {}
    complaint = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convlora.ConvLoRAWarning)
        try:
            formats.read(path, kind, **options)
        except ConvLoRAError as error:
            complaint = str(error)
    assert "\n" not in complaint
    return not complaint


@pytest.mark.parametrize(("kind", "name"), [*FILES.items(), ("locon", "a.pt"), ("loralib", "a.pt")])
def test_a_damaged_file_is_one_error_or_another_adapter(kind: str, name: str, tmp_path: Path) -> None:
    path, _ = written(tmp_path, kind, name)
    for file in [path] if path.is_file() else sorted(path.iterdir()):
        whole = file.read_bytes()
        step = max(1, len(whole) // 150)
        for at in range(0, len(whole), step):
            file.write_bytes(whole[:at])
            assert not _read_or_refuse(path, kind), f"cut at {at}"
            file.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << at % 8)]) + whole[at + 1 :])
            _read_or_refuse(path, kind)
        file.write_bytes(whole)
    assert _read_or_refuse(path, kind)


JUNK = [
    None,
    True,
    -1,
    0,
    10**400,
    1.5,
    float("nan"),
    "",
    "x",
    [],
    [1],
    {},
    {"x": 1},
    {"": []},
    [[[]]],
    "\ud800",
    "(" * 99,
]


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:20])
def test_junk_in_the_config_of_a_peft_adapter_is_one_error_or_harmless(junk: Any, tmp_path: Path) -> None:
    path, _ = written(tmp_path, "peft")
    config = json.loads((path / "adapter_config.json").read_text())
    for field in [*config, "exclude_modules"]:
        (path / "adapter_config.json").write_text(json.dumps({**config, field: junk}))
        _read_or_refuse(path, "peft")
    for text in (json.dumps(junk), "[" * 100_000, "{", b"\xff"):
        (path / "adapter_config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        assert not _read_or_refuse(path, "peft")


@pytest.mark.parametrize("kind", ["locon", "loralib"])
@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:20])
def test_junk_in_the_metadata_is_one_error_or_harmless(junk: Any, kind: str, tmp_path: Path) -> None:
    tensors = {
        "locon": {"lycoris_a.lora_down.weight": torch.ones(2, 3), "lycoris_a.lora_up.weight": torch.ones(4, 2)},
        "loralib": {"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(4, 2)},
    }[kind]
    right = [2, 2, [4, 3], 1, 0, []]
    for value in (junk, {"a": junk}, *({"a": [*right[:i], junk, *right[i + 1 :]]} for i in range(len(right)))):
        save_file(tensors, tmp_path / "rain.safetensors", {"convlora.layers": json.dumps(value)})
        _read_or_refuse(tmp_path / "rain.safetensors", kind)


@pytest.mark.parametrize("dtype", ["C64", "F4", "F8_E8M0", "BOOL", "U64", "F8_E5M2", "I2"])
def test_unusual_dtypes_are_one_error(dtype: str, tmp_path: Path) -> None:
    header = json.dumps({"a.lora_A": {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "rain.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    for kind in formats.FORMATS[2:]:
        assert not _read_or_refuse(tmp_path / "rain.safetensors", kind)
    header = json.dumps(
        {"__metadata__": {"format": "convlora"}, "a.lora_A": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}
    ).encode()
    (tmp_path / "rain.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    assert not _read_or_refuse(tmp_path / "rain.safetensors", "convlora")
