"""Hostile files, at a small count; and those that once did harm."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import convlora
from benchmarks.trust import corpus, fuzz, mutate
from convlora import Adapter, ConvLoRAError, formats
from convlora.adapter import file as adapter_file
from convlora.support.safetensors import read_regular_file

LARGE = corpus.large_files()
GOOD = corpus.seed_files(corpus.network())


def test_hostile_files_are_read_correctly_or_refused() -> None:
    section = fuzz.measure(200, seed=0, start=fuzz.LARGE)  # the large ones come below
    assert [row["faults"] for row in section.data] == [[]] * len(formats.FORMATS)
    assert [row["format"] for row in section.data] == list(formats.FORMATS)
    assert all(row["read"] and row["refused"] for row in section.data)
    assert sum(row["files"] for row in section.data) == 200


def test_a_case_depends_on_its_seed_and_number_alone(tmp_path: Path) -> None:
    cases = [fuzz.case_of(1, index, GOOD, tmp_path) for index in range(100, 140)]
    assert cases == [fuzz.case_of(1, index, GOOD, tmp_path) for index in range(100, 140)]
    assert len({str(case) for case in cases}) > 35
    assert cases != [fuzz.case_of(2, index, GOOD, tmp_path) for index in range(100, 140)]


# --- the trial itself can fail ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Trial:
    folder = tmp_path_factory.mktemp("trial")
    (folder / "case").mkdir()
    return fuzz.Trial(folder)


def good(trial: fuzz.Trial) -> fuzz.Case:
    return fuzz.Case("convlora", *trial.good["convlora"][0])


def test_a_good_file_has_no_faults(trial: fuzz.Trial) -> None:
    outcome = trial.run(0, good(trial))
    assert (outcome.result, outcome.faults, outcome.calls) == ("read", [], 6)


def _slow(path: Any) -> Any:
    end = time.process_time() + 1.1
    while time.process_time() < end:
        pass
    raise ConvLoRAError("late")


def _greedy(path: Any) -> Any:
    torch.ones(30 * fuzz.MIB)
    raise ConvLoRAError("full")


def _wrong(path: Any) -> Any:
    adapter = formats.read(path)
    next(iter(adapter.layers["stem"].tensors.values())).add_(1)
    return adapter


def _executes(path: Any) -> Any:
    os.system("true")
    raise ConvLoRAError("done")


def _writes(path: Any) -> Any:
    Path(f"{path}.new").write_bytes(b"")
    raise ConvLoRAError("done")


def _talks(path: Any) -> Any:
    error = ConvLoRAError("")
    error.args = ("two\nlines",)
    raise error


FAULTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another exception": (lambda path: {}[path], "KeyError"),
    "slow": (_slow, "s of CPU time"),
    "memory": (_greedy, "grew by"),
    "other values": (_wrong, "is not what the file holds"),
    "executes": (_executes, "executed or wrote something"),
    "writes": (_writes, "executed or wrote something"),
    "two lines": (_talks, "a message of"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_reader_with_a_fault_is_found(case: str, trial: fuzz.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    read, message = FAULTS[case]
    monkeypatch.setattr(Adapter, "read", read)
    assert message in str(trial.run(0, good(trial)).faults)


def test_a_model_that_changes_is_found(trial: fuzz.Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(model: nn.Module, *_: Any, **__: Any) -> nn.Module:
        next(model.parameters()).data.view(-1)[0] += 1e-6
        raise ConvLoRAError("too late")

    monkeypatch.setattr(convlora, "load", load)
    assert "a model is not what it was" in str(trial.run(0, good(trial)).faults)


def test_a_crash_is_one_failed_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuzz, "WORKER", [sys.executable, "-c", CRASHES])
    found = fuzz.outcomes(3, 0)
    assert [outcome.faults for outcome in found] == [[], ["the process ended with -9"], []]


CRASHES = """
import json, os, sys
start, count, folder = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
with open(folder + "/outcomes", "a") as file:
    for index in range(start, count):
        print(json.dumps({"starts": index}), file=file, flush=True)
        if index == 1:
            os.kill(os.getpid(), 9)
        print(json.dumps({"index": index, "kind": "convlora"}), file=file, flush=True)
"""


# --- what once did harm ----------------------------------------------------------------------------------------------


def put(folder: Path, name: str, files: mutate.Files) -> Path:
    place = folder / name
    if not place.suffix:
        place.mkdir()
    for file, raw in files.items():
        (place if place.suffix else place / file).write_bytes(raw)
    return place


def refused(place: Path, message: str, kind: str | None = None) -> None:
    options: dict[str, Any] = {"alpha": 1, "rank": 1} if kind == "loralib" else {}
    with warnings.catch_warnings(), pytest.raises(ConvLoRAError, match=message) as caught:
        warnings.simplefilter("ignore", convlora.ConvLoRAWarning)
        formats.read(place, kind, **options)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) <= 20_000


PARTS = "its JSON has more parts than an adapter of its size can have"
TENSORS = "it has more tensors than an adapter of its size can have"
REFUSED = {  # took gigabytes or minutes, or more than four times the file, or said so on a megabyte of message
    "40,000 tensors of one number": TENSORS,
    "40,000 tensors, no layers": TENSORS,
    "a million lists": PARTS,
    "a million lists in the config": PARTS,
    "a million targets": PARTS,
    "a million dimensions": PARTS,
    "a million aliases": PARTS,
    "20,000 layers without tensors": "unexpected: stem.lora_A",
    "a name of a megabyte": "unexpected: x+",
    "Tucker factors of a huge kernel": "a factor of more than 64 times their size",
    "an alpha of a million numbers": r"a tensor \(1000000,\) instead of one finite number",
    "LoCon: a million lists": PARTS,
    "LoKr of a huge w1": "a lokr_w1 of more than 64 times the size of its factors",
    "LoHa of a huge update beside another kind": "has to be formed, of more than 64 times the size of its factors",
    "LoHa of a huge Tucker core": "a factor of more than 64 times their size",
    "diffusers: a million lists": PARTS,
    "diffusers: 1,500 expressions for 1,500 layers": "in too many ways to be searched safely",
    "loralib: a million layers": PARTS,
    "PEFT: 1,500 expressions for 1,500 layers": "in too many ways to be searched safely",
    "PEFT: a name of a megabyte": "unexpected: ",
    "PEFT: patterns for a long name": "in too many ways to be searched safely",
    "PEFT: a million lists": PARTS,
    "PEFT: a megabyte of one pattern": "a pattern of 1,000,000 characters",
}


@pytest.mark.parametrize("case", REFUSED)
def test_large_files_that_hold_little_are_refused(case: str, tmp_path: Path) -> None:
    kind, name, files = LARGE[case]()
    refused(put(tmp_path, name, files), REFUSED[case], kind)


def test_a_layer_name_of_a_megabyte_is_compared_with_no_layer_of_the_model(tmp_path: Path) -> None:
    place = put(tmp_path, *LARGE["a layer of a megabyte"]()[1:])
    start = time.process_time()
    with pytest.raises(ConvLoRAError, match=r"unexpected: (stem)+"):
        convlora.load(corpus.network(), place)
    assert time.process_time() - start < 30  # it took an hour


def test_layers_by_the_thousand_each_with_a_pattern_are_read(tmp_path: Path) -> None:
    place = put(tmp_path, *LARGE["PEFT: 1,500 patterns for 1,500 layers"]()[1:])
    assert len(formats.read(place).layers) == 1500


@pytest.mark.parametrize("pattern", mutate.PATTERNS)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_no_pattern_of_peft_takes_for_ever(field: str, pattern: str, tmp_path: Path) -> None:
    name, files = GOOD["peft"][0]
    config = {**json.loads(files["adapter_config.json"]), field: {pattern: 2}}
    place = put(tmp_path, name, {**files, "adapter_config.json": json.dumps(config).encode()})
    try:
        formats.read(place)
    except ConvLoRAError as error:
        assert "\n" not in str(error)  # noqa: PT017, both are right


@pytest.mark.parametrize("kind", ["loralib", "locon"])
@pytest.mark.parametrize("name", mutate.hostile_pickles(Path("sentinel")))
def test_no_pickle_is_carried_out(name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    program = mutate.hostile_pickles(Path("sentinel"))[name]
    parts = [("archive/data.pkl", program), ("archive/version", b"3\n"), ("archive/data/0", bytes(8))]
    for raw in (program, mutate.zip_file(parts)):
        Path("rain.pt").write_bytes(raw)
        refused(Path("rain.pt"), "read: 'rain.pt'", kind)
    assert os.listdir() == ["rain.pt"]


def test_a_compressed_file_is_not_inflated(tmp_path: Path) -> None:
    raw = corpus.torch_file({"a.lora_A": torch.zeros(2, 10), "a.lora_B": torch.zeros(10, 2)})
    records = [(name, data if name.endswith(".pkl") else bytes(20 << 20)) for name, data in mutate.zip_members(raw)]
    (tmp_path / "rain.pt").write_bytes(mutate.zip_file(records, compress=True))
    refused(tmp_path / "rain.pt", "claim more bytes than the file has", "loralib")


def test_keys_twice_are_refused_wherever_they_are(tmp_path: Path) -> None:
    name, files = GOOD["convlora"][0]
    packed = mutate.SafetensorsParts.of(files[name])
    twice = {
        "a tensor": lambda p: p.entries.append(p.entries[0]),
        "metadata": lambda p: p.metadata.append(p.metadata[0]),
        "config": lambda p: _edit(p, "config", lambda text: text.replace("{", '{"rank":9,', 1)),
        "layers": lambda p: _edit(p, "layers", lambda text: text.replace("{", '{"stem":[1,1,[4,3,3,3]],', 1)),
    }
    for case, damage in twice.items():
        changed = mutate.SafetensorsParts.of(packed.pack())
        damage(changed)
        if case in ("config", "layers"):
            mutate.repair_checksum(changed)
        (tmp_path / name).write_bytes(changed.pack())
        refused(tmp_path / name, "twice")


def _edit(packed: mutate.SafetensorsParts, key: str, change: Callable[[str], str]) -> None:
    packed.metadata = [(k, change(v) if k == key else v) for k, v in packed.metadata]


@pytest.mark.parametrize("name", ["a\nb", "\x1b[31mred", "\u202egnp", "x" * 30_000])
def test_what_a_file_says_cannot_take_over_a_message(name: str, tmp_path: Path) -> None:
    (tmp_path / "rain.safetensors").write_bytes(corpus.native_file({f"{name}.lora_A": torch.ones(1)}, "{}"))
    refused(tmp_path / "rain.safetensors", "unexpected")


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "zero.safetensors").symlink_to("/dev/zero")
    name, files = GOOD["peft"][0]
    folder = put(tmp_path, name, files)
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to("/dev/zero")
    for place in (tmp_path / "pipe.safetensors", tmp_path / "zero.safetensors"):
        with pytest.raises(ConvLoRAError, match="it is no file"):
            Adapter.read(place)
    refused(folder, "it is no file", "peft")


def test_a_file_is_read_once_though_another_process_replaces_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (files for _, files in GOOD["convlora"][:2])
    place = put(tmp_path, "rain.safetensors", first)
    expected = Adapter.read(place)

    def read_then_replaced(path: Any) -> bytes:
        raw = read_regular_file(path)
        place.write_bytes(second["rain.safetensors"])
        return raw

    monkeypatch.setattr(adapter_file, "read_regular_file", read_then_replaced)
    found = Adapter.read(place)
    for path, layer in expected.layers.items():
        assert all(torch.equal(found.layers[path].tensors[name], tensor) for name, tensor in layer.tensors.items())
