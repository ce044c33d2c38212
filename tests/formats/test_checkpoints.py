"""Bare checkpoints as files: what is not to change does not, and nothing in them runs."""

from __future__ import annotations

import json
import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from convlora import ConvLoRAError, ConvLoRAWarning
from convlora.formats.checkpoints import Checkpoint


def state(**more: Tensor) -> dict[str, Tensor]:
    return {"b.weight": torch.randn(4, 3, 3, 3), "b.bias": torch.randn(4), "a.weight": torch.randn(2, 4, 1, 1), **more}


def changed(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    return {**checkpoint.state, name: checkpoint.state[name] + 1}


def test_safetensors_keep_every_other_byte(tmp_path: Path) -> None:
    tensors = state(half=torch.randn(3).half(), mask=torch.tensor([True]), tiny=torch.ones(5).to(torch.float8_e4m3fn))
    save_file(tensors, tmp_path / "in.safetensors", metadata={"author": "Müller", "format": "pt"})
    checkpoint = Checkpoint.read(tmp_path / "in.safetensors")
    checkpoint.write(tmp_path / "out.safetensors", changed(checkpoint, "b.weight"))
    before, after = (tmp_path / "in.safetensors").read_bytes(), (tmp_path / "out.safetensors").read_bytes()
    start = 8 + int.from_bytes(before[:8], "little")
    first, last = json.loads(before[8:start])["b.weight"]["data_offsets"]
    assert before[: start + first] == after[: start + first]
    assert before[start + last :] == after[start + last :]
    assert torch.equal(load_file(tmp_path / "out.safetensors")["b.weight"], tensors["b.weight"] + 1)


def test_safetensors_come_in_the_order_of_their_header(tmp_path: Path) -> None:
    save_file(state(), tmp_path / "in.safetensors")
    raw = (tmp_path / "in.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    turned = json.dumps(dict(reversed(header.items()))).encode()
    (tmp_path / "in.safetensors").write_bytes(len(turned).to_bytes(8, "little") + turned + raw[start:])
    checkpoint = Checkpoint.read(tmp_path / "in.safetensors")
    assert list(checkpoint.state) == [name for name in reversed(header) if name != "__metadata__"]
    checkpoint.write(tmp_path / "out.safetensors", changed(checkpoint, "a.weight"))
    assert list(Checkpoint.read(tmp_path / "out.safetensors").state) == list(checkpoint.state)


NESTED = [
    ({}, ()),
    ({"state_dict": None, "epoch": 7}, ("state_dict",)),
    ({"params": {"b.weight": torch.zeros(1)}, "params_ema": None}, ("params_ema",)),
    ({"model": {"state_dict": None}}, ("model", "state_dict")),
    ({"some_name": None}, ("some_name",)),
]


def nested(frame: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    if not frame:
        return tensors
    return {k: tensors if v is None else nested(v, tensors) if k == "model" else v for k, v in frame.items()}


@pytest.mark.parametrize(("frame", "where"), NESTED, ids=lambda value: ".".join(value) or "flat")
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_pth_keeps_nesting_prefix_order_and_all_else(
    frame: dict[str, Any], where: tuple[str, ...], prefix: str, tmp_path: Path
) -> None:
    tensors = state(steps=torch.tensor(3))
    torch.save(nested(frame, {prefix + name: tensor for name, tensor in tensors.items()}), tmp_path / "in.pth")
    checkpoint = Checkpoint.read(tmp_path / "in.pth")
    assert (checkpoint.where, checkpoint.prefix, list(checkpoint.state)) == (where, prefix, list(tensors))
    checkpoint.write(tmp_path / "out.pth", changed(checkpoint, "b.bias"))
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    expected = nested(frame, {prefix + n: t + (n == "b.bias") for n, t in tensors.items()})
    assert list(flat(written)) == list(flat(expected))
    assert all(torch.equal(torch.as_tensor(flat(written)[n]), torch.as_tensor(v)) for n, v in flat(expected).items())


def flat(content: dict[str, Any], before: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in content.items():
        result.update(flat(value, f"{before}{name}/") if isinstance(value, dict) else {f"{before}{name}": value})
    return result


def test_reading_and_writing_leaves_the_checkpoint_as_it_was(tmp_path: Path) -> None:
    torch.save({"params": state()}, tmp_path / "in.pth")
    checkpoint = Checkpoint.read(tmp_path / "in.pth")
    before = {name: tensor.clone() for name, tensor in checkpoint.state.items()}
    checkpoint.write(tmp_path / "out.pth", changed(checkpoint, "a.weight"))
    assert all(torch.equal(checkpoint.state[name], before[name]) for name in before)


def test_pth_keeps_the_versions_of_modules(tmp_path: Path) -> None:
    torch.save(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict(), tmp_path / "in.pth")
    checkpoint = Checkpoint.read(tmp_path / "in.pth")
    checkpoint.write(tmp_path / "out.pth", changed(checkpoint, "0.weight"))
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert type(written) is OrderedDict
    assert written._metadata["1"] == {"version": 2}


def test_state_dicts_beside_the_one_that_is_read_are_named(tmp_path: Path) -> None:
    torch.save({"params": state(), "params_ema": state(), "epoch": 3}, tmp_path / "in.pth")
    assert Checkpoint.read(tmp_path / "in.pth").beside == ["params"]
    torch.save(state(), tmp_path / "in.pth")
    assert Checkpoint.read(tmp_path / "in.pth").beside == []


CHOICES: dict[str, tuple[Any, str, tuple[str, ...], str]] = {  # content, network -> where, prefix
    "by its key": ({"params": "A", "params_ema": "B"}, "params", ("params",), ""),
    "one that training code names otherwise": ({"g": "A", "g_ema": "B", "n": 3}, "g_ema", ("g_ema",), ""),
    "nested": ({"state": {"net": "A", "ema": "B"}}, "ema", ("state", "ema"), ""),
    "by all keys": ({"one": {"net": "A"}, "two": {"net": "B"}}, "two.net", ("two", "net"), ""),
    "by what names begin with": ({"state_dict": {"g": "A", "g_ema": "B"}}, "g_ema", ("state_dict",), "g_ema."),
    "flat": ({"g": "A", "g_ema": "B"}, "g_ema", (), "g_ema."),
    "beside a tensor": ({"step": torch.ones(1), "g": "A", "g_ema": "B"}, "g_ema", ("g_ema",), ""),
    "the only one": (
        {"epoch": 3, "weights": "B", "optimizer": {"state": {0: {"m": torch.ones(1)}}}},
        "",
        ("weights",),
        "",
    ),
}


def _filled(content: Any, states: dict[str, dict[str, Tensor]], flat: bool) -> Any:
    """A checkpoint with state dicts in the places of their letters; `flat`: as one, by prefixes."""
    if flat:
        return {f"{key}.{n}": t for key, letter in content.items() for n, t in states[letter].items()}
    return {k: states[v] if isinstance(v, str) else _filled(v, states, False) if isinstance(v, dict) else v
            for k, v in content.items()}  # fmt: skip


@pytest.mark.parametrize("case", CHOICES)
def test_a_network_is_chosen_by_its_name(case: str, tmp_path: Path) -> None:
    content, network, where, prefix = CHOICES[case]
    states = {"A": state(), "B": state()}
    if prefix:
        content = {k: _filled(v, states, True) for k, v in content.items()} if where else _filled(content, states, True)
    else:
        content = _filled(content, states, False)
    torch.save(content, tmp_path / "in.pth")
    found = Checkpoint.read(tmp_path / "in.pth", network or None)
    assert (found.where, found.prefix) == (where, prefix)
    assert list(found.state) == list(states["B" if network != "params" else "A"])
    wanted = states["B" if network != "params" else "A"]
    assert all(torch.equal(found.state[name], tensor) for name, tensor in wanted.items())
    found.write(tmp_path / "out.pth", changed(found, "b.weight"))
    again = Checkpoint.read(tmp_path / "out.pth", network or None)
    assert torch.equal(again.state["b.weight"], wanted["b.weight"] + 1)
    if not where:
        return
    assert Checkpoint.read(tmp_path / "out.pth", network or None).beside == found.beside


def test_several_networks_are_named_where_nobody_says_which(tmp_path: Path) -> None:
    torch.save({"g": state(), "g_ema": state(), "d": {"net": state()}}, tmp_path / "in.pth")
    with pytest.raises(ConvLoRAError, match=r"holds g, g_ema, d\.net; say which by network="):
        Checkpoint.read(tmp_path / "in.pth")
    with pytest.raises(ConvLoRAError, match=r"no network 'ema'; it has g, g_ema, d\.net"):
        Checkpoint.read(tmp_path / "in.pth", "ema")
    torch.save({"one": {"net": state()}, "two": {"net": state()}}, tmp_path / "in.pth")
    with pytest.raises(ConvLoRAError, match=r"holds one\.net, two\.net; say which by network="):
        Checkpoint.read(tmp_path / "in.pth", "net")
    torch.save(state(), tmp_path / "in.pth")
    with pytest.raises(ConvLoRAError, match="no network 'c'; it has b, a"):
        Checkpoint.read(tmp_path / "in.pth", "c")


def test_a_checkpoint_that_holds_itself_is_read_through_once(tmp_path: Path) -> None:
    content: dict[str, Any] = {"g": state(), "epoch": 3}
    content.update({f"again{number}": content for number in range(1000)})
    torch.save(content, tmp_path / "in.pth")
    assert Checkpoint.read(tmp_path / "in.pth").where == ("g",)


def test_pth_becomes_safetensors_and_says_what_is_lost(tmp_path: Path) -> None:
    tensors = state()
    tensors["c.weight"] = tensors["a.weight"]  # memory that safetensors does not share
    torch.save({"params": {**tensors, "kind": "ESRGAN"}, "epoch": 3}, tmp_path / "in.pth")
    checkpoint = Checkpoint.read(tmp_path / "in.pth")
    with pytest.warns(ConvLoRAWarning, match=r"left out of '.*in\.pth': kind, epoch"):
        checkpoint.write(tmp_path / "out.safetensors", changed(checkpoint, "b.weight"))
    written = load_file(tmp_path / "out.safetensors")
    assert set(written) == set(tensors)
    assert all(torch.equal(written[name], tensors[name] + (name == "b.weight")) for name in tensors)


def test_safetensors_become_pth_and_say_what_is_lost(tmp_path: Path) -> None:
    tensors = state()
    save_file(tensors, tmp_path / "in.safetensors", metadata={"author": "x"})
    checkpoint = Checkpoint.read(tmp_path / "in.safetensors")
    with pytest.warns(ConvLoRAWarning, match="cannot hold the metadata"):
        checkpoint.write(tmp_path / "out.pth", checkpoint.state)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("run",)


def test_reading_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for legacy in (True, False):
        torch.save({"a.weight": Evil()}, "in.pth", _use_new_zipfile_serialization=legacy)
        with pytest.raises(ConvLoRAError, match="could run code") as caught:
            Checkpoint.read("in.pth")
        assert "\n" not in str(caught.value)
    Path("raw.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ConvLoRAError, match="could run code"):
        Checkpoint.read("raw.pth")
    assert not Path("run").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_what_is_no_checkpoint_is_one_error(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    torch.save({3: torch.ones(3)}, tmp_path / "numbers.pth")
    torch.save({"epoch": 3, "params": {"lr": 0.1}}, tmp_path / "empty.pth")
    save_file(state(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-4])
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "none.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "nothing.pth").write_bytes(b"")
    (tmp_path / "net.onnx").write_bytes(b"")
    (tmp_path / "folder.pth").mkdir()
    torch.jit.save(torch.jit.trace(nn.Conv2d(1, 1, 1), torch.ones(1, 1, 1, 1)), tmp_path / "script.pt")
    names = ["missing.pth", *(p.name for p in tmp_path.iterdir() if p.name != "whole.safetensors")]
    assert len(names) == 12
    for name in names:
        with pytest.raises(ConvLoRAError, match=rf"^read: '.*{name}'") as caught:
            Checkpoint.read(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file(state(), tmp_path / "in.safetensors")
    (tmp_path / "out.safetensors").write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    checkpoint = Checkpoint.read(tmp_path / "in.safetensors")
    with pytest.raises(ConvLoRAError, match="cannot be written"):
        checkpoint.write(tmp_path / "out.safetensors", checkpoint.state)
    assert (tmp_path / "out.safetensors").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2
