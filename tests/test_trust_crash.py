"""Crashes and company, at small counts, and the laws of `atomic` and `threads` one by one."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import adapted_net, randomise
from torch import Tensor, nn

import convlora
from convlora import ConvLoRAError
from convlora.layer import threads
from convlora.support import atomic

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.trust import crash

PLACES = [*crash.CASES, crash.SWITCHES]


def test_nothing_is_lost_by_kills_full_disks_and_company() -> None:
    section = crash.measure(6, seed=0)
    found = {row["case"]: row for row in section.data}
    assert list(found) == PLACES
    assert {case: row["failed"] for case, row in found.items()} == dict.fromkeys(PLACES, 0)
    assert all(row["times"] for row in found.values())
    assert found[crash.SWITCHES]["times"] > 6


# --- files -----------------------------------------------------------------------------------------------------------


def stray(path: Path, number: int = 0) -> Path:
    return path.with_name(f".{path.name}.{number:016x}.tmp")


def test_a_save_removes_what_a_killed_one_has_left_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "rain.safetensors"
    stray(file).write_bytes(b"half")
    stray(file, 1).mkdir()
    (stray(file, 1) / "inside").write_bytes(b"half")
    others = [
        stray(tmp_path / "snow.safetensors"),
        tmp_path / ".rain.safetensors.tmp",
        tmp_path / ".rain.safetensors.x.tmp",
    ]
    for other in others:
        other.write_bytes(b"mine")
    convlora.save(adapted_net(), file)
    assert sorted(tmp_path.iterdir()) == sorted([file, *others])


def test_what_another_writer_is_writing_stays(tmp_path: Path) -> None:
    file = tmp_path / "rain.safetensors"
    with atomic.staged(file, b"first") as put_first_in_place:
        convlora.save(adapted_net(), file)
        assert len(list(tmp_path.iterdir())) == 2
        put_first_in_place()
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    assert file.read_bytes() == b"first"


def test_a_link_under_the_name_of_a_temporary_file_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "rain.safetensors"
    stray(file).symlink_to(tmp_path / "mine")
    os.mkfifo(stray(file, 1))  # opening it must not wait
    convlora.save(adapted_net(), file)
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rain.safetensors"
    convlora.save(adapted_net(), file)
    old = file.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "write":
        real = open

        @contextlib.contextmanager
        def opened(path: Any, mode: str = "r", **options: Any) -> Iterator[Any]:
            with real(path, mode, **options) as stream:
                if "w" in mode:
                    stream.write(b"half")
                    fail()
                yield stream

        monkeypatch.setattr(atomic, "open", opened, raising=False)
    else:
        monkeypatch.setattr(os, where, fail)
    with pytest.raises(ConvLoRAError, match="No space left on device"):
        convlora.save(randomise(adapted_net()), file)
    monkeypatch.undo()
    assert file.read_bytes() == old
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_new_files_get_the_mode_of_new_files_and_nobody_elses_mask_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("all threads share it"))
        convlora.save(adapted_net(), tmp_path / "rain.safetensors")
        convlora.formats.write(convlora.adapter(adapted_net(targets="0")), tmp_path / "rain", "peft")
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert (tmp_path / "rain.safetensors").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "rain").stat().st_mode & 0o777 == 0o750


def test_a_link_to_itself_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "rain.safetensors").symlink_to("rain.safetensors")
    with pytest.raises(ConvLoRAError, match="a link to itself"):
        convlora.save(adapted_net(), tmp_path / "rain.safetensors")
    assert (tmp_path / "rain.safetensors").is_symlink()


# --- threads ---------------------------------------------------------------------------------------------------------


class Gate(nn.Module):
    """Passes its input on once it may."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.open = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        self.reached.set()
        assert self.open.wait(60)
        return x


class Running:
    """A net whose call stops half way, in a thread of its own, and the outputs without and with the adapter."""

    def __init__(self) -> None:
        self.gate = Gate()
        self.model = nn.Sequential(nn.Conv2d(3, 3, 1), self.gate, nn.Conv2d(3, 3, 1))
        randomise(convlora.inject(self.model, nn.Conv2d, rank=1))
        self.x = torch.randn(1, 3, 2, 2)
        self.gate.open.set()
        self.on = self.run()
        with convlora.disabled(self.model):
            self.off = self.run()
        self.gate.open.clear()
        self.gate.reached.clear()

    def run(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.x)  # type: ignore[no-any-return]


class Thread:
    """What a function gives, or raises, in another thread."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.result: Any = None
        self.thread = threading.Thread(target=self._run, args=(act,), daemon=True)
        self.thread.start()

    def _run(self, act: Callable[[], Any]) -> None:
        try:
            self.result = act()
        except Exception as error:
            self.result = error

    def ended(self) -> Any:
        self.thread.join(60)
        assert not self.thread.is_alive()
        return self.result


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.gate.open.set()


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_switch_waits_for_the_calls_that_have_begun(running: Running, wrapped: bool) -> None:
    net = nn.DataParallel(running.model, device_ids=[]) if wrapped else running.model
    call = Thread(running.run)
    assert running.gate.reached.wait(60)
    switch = Thread(lambda: convlora.activate(net, []))
    switch.thread.join(0.2)
    assert switch.thread.is_alive()
    running.gate.open.set()
    assert torch.equal(call.ended(), running.on)
    assert switch.ended() is net
    assert torch.equal(running.run(), running.off)


def test_a_stack_that_a_generator_cut_off_is_read_again(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread goes on while others read its stack: a generator that has yielded no longer knows its caller."""
    call = Thread(running.run)
    assert running.gate.reached.wait(60)
    yielded = (number for number in range(2))
    next(yielded)
    frames, cut_off = sys._current_frames, iter(range(8))

    def found() -> Any:
        stacks = frames()
        if next(cut_off, None) is not None:
            stacks[call.thread.ident] = yielded.gi_frame
        return stacks

    monkeypatch.setattr(sys, "_current_frames", found)
    switch = Thread(lambda: convlora.activate(running.model, []))
    switch.thread.join(0.2)
    assert switch.thread.is_alive()
    running.gate.open.set()
    assert torch.equal(call.ended(), running.on)
    assert switch.ended() is running.model


def test_a_call_that_begins_during_a_switch_waits_for_its_end(running: Running) -> None:
    first = Thread(running.run)
    assert running.gate.reached.wait(60)
    switch = Thread(lambda: convlora.activate(running.model, []))
    while threads.current is None or not threads.current.counted.is_set():
        assert switch.thread.is_alive()
    running.gate.reached.clear()
    second = Thread(running.run)
    assert not running.gate.reached.wait(0.2)  # held back before the gate, at the first layer
    running.gate.open.set()
    assert torch.equal(first.ended(), running.on)
    assert torch.equal(second.ended(), running.off)
    switch.ended()


@pytest.mark.parametrize("operation", ["activate", "merge", "unmerge", "load"])
def test_a_switch_that_would_wait_too_long_is_refused(
    operation: str, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = convlora.adapter(running.model)
    acts = {
        "activate": lambda: convlora.activate(running.model, []),
        "merge": lambda: convlora.merge(running.model),
        "unmerge": lambda: convlora.unmerge(running.model),
        "load": lambda: convlora.load(running.model, adapter),
    }
    monkeypatch.setattr(threads, "PATIENCE", 0.05)
    call = Thread(running.run)
    assert running.gate.reached.wait(60)
    with pytest.raises(ConvLoRAError, match=f"{operation}: another thread is running the model"):
        acts[operation]()
    assert threads.current is None
    running.gate.open.set()
    assert torch.equal(call.ended(), running.on)
    assert torch.equal(running.run(), running.on)


def test_a_switch_of_another_thread_is_waited_for(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "PATIENCE", 0.05)
    with threads.steady("test"):
        for act in (lambda: convlora.activate(running.model, []), lambda: convlora.adapter(running.model)):
            assert "another thread is switching adapters" in str(Thread(act).ended())
    assert isinstance(Thread(lambda: convlora.adapter(running.model)).ended(), convlora.Adapter)


def test_calls_of_other_models_and_the_own_call_do_not_wait(running: Running) -> None:
    other = adapted_net().eval()
    x = torch.randn(2, 3, 4, 4)
    plain = convlora.remove(adapted_net().eval())
    call = Thread(running.run)
    assert running.gate.reached.wait(60)
    convlora.activate(other, [])  # while the call of another model has begun
    handle = other.register_forward_hook(lambda *_: convlora.activate(other, ["default"]) and None)  # inside its own
    other(x)
    handle.remove()
    plain(x)
    running.gate.open.set()
    call.ended()


def test_a_child_process_does_not_wait_for_a_switch_of_its_parent(running: Running) -> None:
    with threads.steady("test"):
        threads.current = threads.Switch(running.model, "test")
        try:
            threads._after_fork()
            assert threads.current is None
            assert threads._lock.acquire(timeout=1)
        finally:
            threads.current = None
