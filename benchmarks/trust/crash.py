"""Crashes and company: is anything lost when a process is killed, a disk is full, or others read, write or run?

- `save`, and a new PEFT folder, killed (SIGKILL) at random moments: the old or the new one is there, whole, and the
  next save leaves nothing but it.
- A disk that is full after a random number of bytes, a folder that may not be written, links of every sort: a clear
  error and the old file, or the new one.
- Processes and threads that write one file while others read it: every reading finds a whole one.
- Threads and asyncio tasks that run one model, each in blocks of `using`, while another thread switches its adapters:
  every output is, bit for bit, that of what its caller chose.

The first parts run in a process of its own that has one thread, since it forks.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Section
from torch import nn

import convlora
from benchmarks.trust import ROOT, corpus, environment
from convlora import Adapter, ConvLoRAError, formats

Result = dict[str, int]
CALLERS = "threads and tasks, each with its own adapters"


def measure(count: int, seed: int = 0) -> Section:
    """`count` kills, and as much of the rest as fits to it."""
    section = Section(
        "Crashes, full disks, other processes and threads",
        "`left behind`: temporary files and folders after the kill; the next writer found and removed all of them."
        " A case fails if a file is neither the old nor the new one, if anything stays behind, or if an output is not"
        " that of what its caller chose.",
        ("case", "times", "old", "new", "left behind", "refused", "failed"),
    )
    results = {**_in_a_process(count, seed), CALLERS: callers(100 * count, seed)}
    for name, result in results.items():
        section.add(name, *(str(result.get(kind, "")) for kind in section.columns[1:]), case=name, **result)
    return section


def _in_a_process(count: int, seed: int) -> dict[str, Result]:
    command = [sys.executable, "-m", "benchmarks.trust.crash", str(count), str(seed)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Result] = json.loads(done.stdout)
    return found


def all_of_files(count: int, seed: int) -> dict[str, Result]:
    """What needs no more than one thread of this process."""
    torch.set_num_threads(1)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="convlora-crash-") as name:
        place = Place(Path(name))
        return {case: act(place, rng, count) for case, act in CASES.items()}


class Place:
    """A folder with one adapter file of two that it can be."""

    def __init__(self, folder: Path) -> None:
        folder.chmod(0o755)
        self.folder = folder / "place"
        self.folder.mkdir()
        self.file = self.folder / "rain.safetensors"
        base = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3))
        self.models = [corpus.adapted(base, "*", rank=rank) for rank in (2, 16)]  # of different lengths
        self.adapters = [convlora.adapter(model) for model in self.models]
        self.locons = [convlora.adapter(corpus.adapted(base, "*", rank=rank, factors="locon")) for rank in (2, 16)]
        self.contents = []
        for model in self.models:
            convlora.save(model, self.file)
            self.contents.append(self.file.read_bytes())

    def other(self) -> int:
        """Which of the two the file is not; -1 if it is neither."""
        content = self.file.read_bytes()
        return 1 - self.contents.index(content) if content in self.contents else -1

    def clear(self, target: Path) -> bool:
        """Whether there is nothing but the target."""
        return [path.name for path in self.folder.iterdir()] == [target.name]


class Child:
    """A forked process that does something and ends with 0, or with 1 after an exception, which it prints."""

    def __init__(self, act: Callable[[], Any]) -> None:
        self.code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                act()
                code = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr)
            finally:
                os._exit(code)

    def ended(self, wait: bool = True) -> bool:
        """Whether it has ended; `code` says how."""
        if self.code is None:
            found, status = os.waitpid(self.pid, 0 if wait else os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if found else None
        return self.code is not None

    def kill(self) -> None:
        if not self.ended(wait=False):
            os.kill(self.pid, signal.SIGKILL)
            self.ended()


# --- killed ----------------------------------------------------------------------------------------------------------


def killed(place: Place, rng: random.Random, count: int, folder: bool) -> Result:
    """Children that save all the time, killed at random moments."""
    result = {"times": count, "old": 0, "new": 0, "left behind": 0, "failed": 0}
    place.file.unlink(missing_ok=True)
    target = place.folder / "rain" if folder else place.file
    duration = _duration(place, target)
    second = _written(place, target, 1)
    for _ in range(count):
        _remove(target)
        first = None if folder else _written(place, target, 0)
        reads, writes = os.pipe()

        def act(writes: int = writes) -> None:
            os.write(writes, b".")
            _written(place, target, 1)
            if not folder:  # again and again, so that a moment after the first save is one in a save, too
                while True:
                    _written(place, target, 0)
                    _written(place, target, 1)

        child = Child(act)
        os.read(reads, 1)
        time.sleep(rng.uniform(0, (1.2 if folder else 3) * duration))
        child.kill()
        os.close(reads)
        os.close(writes)
        found = _content(target)
        result["old"] += found == first
        result["new"] += found == second
        result["left behind"] += len(list(place.folder.glob(".*.tmp")))
        whole = found in (first, second) and _written(place, target, 1) == second
        result["failed"] += not (whole and place.clear(target))
    _remove(target)
    return result


def _duration(place: Place, target: Path) -> float:
    """Seconds that a save takes."""
    start = time.perf_counter()
    for _ in range(5):
        _written(place, target, 0)
        _remove(target)
    return (time.perf_counter() - start) / 5


def _written(place: Place, target: Path, which: int) -> dict[str, bytes] | None:
    """Write one of the two adapters, as a file or as a PEFT folder; what is there then."""
    if target.suffix:
        convlora.save(place.models[which], target)
    else:
        formats.write(place.locons[which], target, "peft")
    return _content(target)


def _content(target: Path) -> dict[str, bytes] | None:
    if not target.exists():
        return None
    files = target.iterdir() if target.is_dir() else [target]
    return {file.name if target.is_dir() else "": file.read_bytes() for file in files}


def _remove(target: Path) -> None:
    for file in target.iterdir() if target.is_dir() else []:
        file.unlink()
    if target.exists():
        target.rmdir() if target.is_dir() else target.unlink()


# --- places that cannot be written -----------------------------------------------------------------------------------


def _refused(place: Place, target: Path, before: Callable[[], Any]) -> bool:
    """Whether a save in another process, after something has been done to it, is one clear error."""

    def act() -> None:
        before()
        try:
            convlora.save(place.models[1], target)
        except ConvLoRAError as error:
            if str(error).startswith(f"write: '{target}' cannot be written ("):
                return
            raise
        raise RuntimeError("it was written")

    child = Child(act)
    return child.ended() and child.code == 0


def full(place: Place, rng: random.Random, count: int) -> Result:
    """Files can only be so large: what a full disk looks like from inside."""
    result = {"times": count, "old": 0, "refused": 0, "failed": 0}
    convlora.save(place.models[0], place.file)
    for _ in range(count):
        size = rng.randrange(len(place.contents[1]))
        refused = _refused(place, place.file, lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)))
        old = place.other() == 1
        result["old"] += old
        result["refused"] += refused
        result["failed"] += not (refused and old and place.clear(place.file))
    return result


def read_only(place: Place) -> Result:
    """A folder that belongs to somebody else."""
    convlora.save(place.models[0], place.file)
    place.folder.chmod(0o555)

    def nobody() -> None:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)

    refused = _refused(place, place.file, nobody)
    place.folder.chmod(0o755)
    failed = not (refused and place.other() == 1 and place.clear(place.file))
    return {"times": 1, "old": int(place.other() == 1), "refused": int(refused), "failed": int(failed)}


def links(place: Place) -> Result:
    """Links to the file, to one that is not there, to itself, to a folder and a device, and a folder that is a link."""
    result = {"times": 0, "new": 0, "refused": 0, "failed": 0}
    aside = place.folder / "aside"
    aside.mkdir()
    (aside / "folder").symlink_to(place.folder)
    for name, target, refused in (
        ("link", place.file, False), ("dangling", aside / "new.safetensors", False), ("self", aside / "self", True),
        ("device", Path("/dev/full"), True), ("to folder", place.folder, True),
        ("folder/rain.safetensors", None, False),
    ):  # fmt: skip
        link = aside / name
        if target is not None:
            link.symlink_to(target)
        convlora.save(place.models[0], place.file)
        try:
            convlora.save(place.models[1], link)
            fine = not refused and link.read_bytes() == place.contents[1] and (target is None or link.is_symlink())
        except ConvLoRAError:
            fine = refused and link.is_symlink() and place.other() == 1
        result["times"] += 1
        result["refused" if refused else "new"] += fine
        result["failed"] += not fine or bool(list(place.folder.rglob(".*.tmp")))
    for path in aside.iterdir():
        path.unlink()
    aside.rmdir()
    return result


# --- many at once ----------------------------------------------------------------------------------------------------


def _read(place: Place, result: Result) -> None:
    try:
        found = Adapter.read(place.file)
        sizes = [len(adapter.layers["0"].tensors["lora_A"]) for adapter in place.adapters]
        which = sizes.index(len(found.layers["0"].tensors["lora_A"]))
        same = all(
            torch.equal(found.layers[path].tensors[name], tensor)
            for path, layer in place.adapters[which].layers.items()
            for name, tensor in layer.tensors.items()
        )
        result["new" if which else "old"] += same
        result["failed"] += not same
    except ConvLoRAError:
        result["failed"] += 1
    result["times"] += 1


def writers(place: Place, count: int) -> Result:
    """Processes that save one of the two adapters each; this one reads all the while."""
    result = {"times": 0, "old": 0, "new": 0, "failed": 0}
    convlora.save(place.models[0], place.file)

    def act(which: int) -> None:
        for _ in range(5 * count):
            convlora.save(place.models[which], place.file)

    children = [Child(lambda which=which: act(which % 2)) for which in range(4)]
    while not all(child.ended(wait=False) for child in children):
        _read(place, result)
    result["failed"] += sum(child.code != 0 for child in children)
    result["failed"] += not (place.other() >= 0 and place.clear(place.file))
    return result


def writing_threads(place: Place, count: int) -> Result:
    """The same with threads, which share what a process has: the mode of new files must come out right, too."""
    result = {"times": 0, "old": 0, "new": 0, "failed": 0}
    before = os.umask(0o027)
    errors: list[BaseException] = []

    def act(which: int) -> None:
        try:
            for i in range(5 * count):
                convlora.save(place.models[which], place.file)
                place.adapters[which].write(place.folder / f"own {which} {i}.safetensors")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=act, args=(which % 2,)) for which in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        _read(place, result)
    modes = {path.stat().st_mode & 0o777 for path in place.folder.glob("own *")}
    mask = os.umask(before)
    for path in place.folder.glob("own *"):
        path.unlink()
    result["failed"] += len(errors) + (modes != {0o640}) + (mask != 0o027)
    result["failed"] += not (place.other() >= 0 and place.clear(place.file))
    return result


# --- several callers -------------------------------------------------------------------------------------------------


CHOICES: tuple[dict[str, float], ...] = ({}, {"a": 1.0}, {"b": 1.0}, {"a": 0.5, "b": -2.0})


def callers(count: int, seed: int = 0) -> Result:
    """Threads, and asyncio tasks in one more, compute each in blocks of `using`; this thread switches all the while.

    `times` counts their outputs; one fails if it is not, bit for bit, that of what its caller chose.
    """
    torch.manual_seed(seed)
    base = nn.Sequential(*(nn.Conv2d(8, 8, 3, padding=1) for _ in range(8))).eval()
    model = corpus.adapted(corpus.adapted(base, "*", rank=2, name="a"), "*", rank=2, name="b")
    x, expected = torch.randn(1, 8, 12, 12), []
    with torch.no_grad():
        expected = [convlora.activate(model, choice)(x) for choice in CHOICES]
    result = {"times": 0, "failed": 0}
    errors: list[BaseException] = []
    tally, over = threading.Lock(), threading.Event()

    def check(choice: int) -> None:
        wrong = not torch.equal(model(x), expected[choice])
        with tally:
            result["times"] += 1
            result["failed"] += wrong

    def serve(rng: random.Random) -> None:
        with torch.no_grad():
            while not over.is_set():
                outer, inner = (rng.randrange(len(CHOICES)) for _ in range(2))
                with convlora.using(model, CHOICES[outer]):
                    check(outer)
                    with convlora.using(model, CHOICES[inner]):
                        check(inner)
                    check(outer)

    async def serve_task(rng: random.Random) -> None:
        while not over.is_set():
            choice = rng.randrange(len(CHOICES))
            with convlora.using(model, CHOICES[choice]):
                check(choice)
                await asyncio.sleep(0)
                check(choice)

    async def serve_tasks(rng: random.Random) -> None:
        with torch.no_grad():  # around all of them: tasks take turns, and the mode is the thread's
            await asyncio.gather(*(serve_task(rng) for _ in range(8)))

    def guarded(call: Callable[[random.Random], Any], number: int) -> None:
        try:
            call(random.Random(seed + number))
        except BaseException as error:
            errors.append(error)

    calls: list[Callable[[random.Random], Any]] = [serve, serve, lambda rng: asyncio.run(serve_tasks(rng))]
    threads = [threading.Thread(target=guarded, args=(call, number)) for number, call in enumerate(calls)]
    interval, rng = sys.getswitchinterval(), random.Random(seed)
    sys.setswitchinterval(1e-5)  # threads take turns often
    try:
        for thread in threads:
            thread.start()
        while result["times"] < count and any(thread.is_alive() for thread in threads):
            convlora.activate(model, CHOICES[rng.randrange(len(CHOICES))])
            time.sleep(1e-3)
            if rng.randrange(4) == 0:
                convlora.merge(model)
                time.sleep(1e-3)
                convlora.unmerge(model)
    finally:
        over.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(interval)
    result["failed"] += len(errors)
    return result


CASES: dict[str, Callable[[Place, random.Random, int], Result]] = {
    "save, killed": lambda place, rng, count: killed(place, rng, count, folder=False),
    "a new PEFT folder, killed": lambda place, rng, count: killed(place, rng, max(1, count // 4), folder=True),
    "the disk is full": lambda place, rng, count: full(place, rng, max(3, count // 10)),
    "the folder may not be written": lambda place, rng, count: read_only(place),
    "links": lambda place, rng, count: links(place),
    "four processes write, one reads": lambda place, rng, count: writers(place, max(2, count // 20)),
    "four threads write, one reads": lambda place, rng, count: writing_threads(place, max(2, count // 20)),
}


if __name__ == "__main__":
    print(json.dumps(all_of_files(int(sys.argv[1]), int(sys.argv[2]))))
