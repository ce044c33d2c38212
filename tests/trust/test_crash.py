"""Crashes and company, at small counts, and the laws of `atomic` one by one."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracle import adapted_net, randomise

import convlora
from benchmarks.trust import crash
from convlora import ConvLoRAError
from convlora.support import atomic

PLACES = [*crash.CASES, crash.CALLERS]


def test_nothing_is_lost_by_kills_full_disks_and_company() -> None:
    section = crash.measure(6, seed=0)
    found = {row["case"]: row for row in section.data}
    assert list(found) == PLACES
    assert {case: row["failed"] for case, row in found.items()} == dict.fromkeys(PLACES, 0)
    assert all(row["times"] for row in found.values())
    assert found[crash.CALLERS]["times"] > 6


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
