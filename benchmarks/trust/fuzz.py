"""Hostile files: is each of them read correctly or refused, quickly, in little memory, and without a trace?

Thousands of files of every format (those of `corpus`, damaged by `mutate`) go through all that reads adapters. A case
fails if anything but an adapter or a `ConvLoRAError` of one line comes out; if an adapter has other values than the
file; if a refused call changed one bit, flag or class of a model; if anything was executed, or written; if a call took
more than a second of CPU time, or the process grew by more than `allowed` bytes meanwhile. These two bounds do not hold
for pickles: `torch.load` reads them, and its time and memory are what PyTorch takes.

The cases run in a process of its own, so that a crash or a hang is one failed case, too. A case depends on nothing but
the seed and its number: `python -m benchmarks.trust.fuzz SEED NUMBER` runs one again and shows what becomes of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import io
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import Section
from oracle import bytes_of, snapshot
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

import convlora
from benchmarks.trust import ROOT, corpus, environment, mutate
from benchmarks.trust.mutate import Files
from convlora import Adapter, AdapterConfig, ConvLoRAError, formats

SECONDS = 1.0  # of CPU time, that one call may take
HANGS = 60  # seconds of real time after which a case is given up
LONGEST = 20_000  # characters of a message
MIB = 2**20
FACTORS = ("lora_A", "lora_B")  # rank components along dimension 0 and 1


@dataclass
class Case:
    """One input: its format, the name of its file or folder, its files."""

    kind: str
    name: str
    files: Files

    def size(self) -> int:
        return sum(map(len, self.files.values()))

    def read_by_torch(self) -> bool:
        """Whether `torch.load` reads it, so that time and memory are its own; PEFT's pickle in a folder is refused."""
        return self.name.endswith((".pt", ".bin"))

    def json_size(self) -> int:
        """Bytes of JSON, as far as it is there: each can become an object of Python."""
        return sum(
            min(int.from_bytes(raw[:8], "little"), len(raw)) if name.endswith(".safetensors") else len(raw)
            for name, raw in self.files.items()
            if name.endswith((".json", ".safetensors"))
        )


@dataclass
class Outcome:
    """What became of a case: `read` or `refused`, and what was wrong with that."""

    index: int
    kind: str
    result: str = "refused"
    faults: list[str] = field(default_factory=list)
    calls: int = 0
    seconds: float = 0.0  # CPU time of its slowest call
    share: float = 0.0  # peak memory over file size, of large files


def allowed(case: Case) -> int:
    """Bytes by which reading may let the process grow: 4 times the file and 2 MiB of Python's own.

    And 24 times the JSON in it, up to 32 MiB: Python has 72 bytes for an empty list, which takes 3 in JSON.
    """
    return 4 * case.size() + 2 * MIB + min(24 * case.json_size(), 32 * MIB)


def case_of(seed: int, index: int, good: dict[str, list[tuple[str, Files]]], sentinel: Path) -> Case:
    """The case of a number: the formats take turns; large files come first."""
    large = list(corpus.large_files().values()) if index < LARGE else []
    if index < len(large):
        return Case(*large[index]())
    rng = random.Random(f"{seed} {index}")
    kind = formats.FORMATS[index % len(formats.FORMATS)]
    name, files = rng.choice(good[kind])
    return Case(kind, name, mutate.damaged(rng, files, sentinel))


LARGE = 64  # more than there are large files


class Trial:
    """Puts cases through everything that reads adapters."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sentinel = folder / "executed"
        self.good = corpus.seed_files(corpus.network())
        self.watch = Watch()
        self.prepare()

    def prepare(self) -> None:
        """The models: a plain one, and for each format one with an adapter that its good files fit."""
        self.base = corpus.network()
        self.specs = formats.specs_of(self.base)
        self.hot = {kind: [self._hot(kind)] for kind in formats.FORMATS}
        for kind in ("convlora", "peft"):
            self.hot[kind].append(self._hot(kind, modules_to_save=corpus.SAVED, moved=True))
        every = [model for models in self.hot.values() for model in models]
        self.kept = {id(model): convlora.adapter(model) for model in every}
        self.before = {id(model): snapshot(model) for model in (self.base, *every)}

    def _hot(self, kind: str, **options: Any) -> nn.Module:
        factors = "locon" if kind in ("peft", "locon", "diffusers") else "convlora"
        targets = {"convlora": "*", "loralib": [*corpus.PLAIN, "body.1"]}.get(kind, corpus.PLAIN)
        return corpus.adapted(self.base, targets, rank=2, factors=factors, bias=kind == "convlora", **options)

    def run(self, index: int, case: Case) -> Outcome:
        """Put one case through all that reads it."""
        outcome = Outcome(index, case.kind)
        place = self._put(case)
        for name, call, model in self._calls(case, place):
            outcome.calls += 1
            try:
                self._one(name, call, model, case, outcome)
            except Exception as error:
                last = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{Path(last.filename).name}:{last.lineno}"
                outcome.faults.append(f"{name}: {type(error).__name__}: {str(error)[:200]!r} at {where}")
        for file in case.files:
            with contextlib.suppress(OSError):
                (place / file if place.is_dir() else place).unlink()
        return outcome

    def _put(self, case: Case) -> Path:
        place = self.folder / "case" / case.name
        if place.suffix:
            place.write_bytes(case.files[case.name]) if case.files else None
        else:
            place.mkdir(exist_ok=True)
            for name, raw in case.files.items():
                (place / name).write_bytes(raw)
        return place

    def _calls(self, case: Case, place: Path) -> Iterator[tuple[str, Callable[[], Any], nn.Module | None]]:
        """Name, call, and the model that it loads the adapter onto, if it does."""
        alpha: dict[str, Any] = {"alpha": corpus.ALPHA} if case.kind == "loralib" else {}
        options = {**alpha, "rank": 2} if alpha else {"layers": self.specs}  # kernels of LoHa and LoKr, paths of LoCon
        kind, base, (hot, *whole), read = case.kind, self.base, self.hot[case.kind], formats.read
        if case.kind == "convlora":
            yield "Adapter.read", lambda: Adapter.read(place), None
            yield "load", lambda: convlora.load(base, place), base
            yield "hot swap", lambda: convlora.load(hot, place, name="default"), hot
        else:
            yield "read, layers", lambda: read(place, kind, layers=self.specs, **alpha), None
            yield "load", lambda: convlora.load(base, read(place, **options)), base
            yield "hot swap", lambda: convlora.load(hot, read(place, kind, **options), name="default"), hot
        if whole:
            yield "hot swap of copies", lambda: convlora.load(whole[0], read(place, kind), name="default"), whole[0]
        yield "read", lambda: read(place), None
        other = formats.FORMATS[case.size() % len(formats.FORMATS)]
        yield f"read as {other}", lambda: read(place, other), None

    def _one(self, name: str, call: Callable[[], Any], model: nn.Module | None, case: Case, outcome: Outcome) -> None:
        large = case.size() > MIB // 4
        adapter = None
        message = ""
        with warnings.catch_warnings(), self.watch.watching(large) as seen:
            warnings.simplefilter("ignore", convlora.ConvLoRAWarning)
            try:
                result = call()
                adapter = convlora.adapter(result) if model is not None else result
            except ConvLoRAError as error:
                message = str(error)
        outcome.seconds = max(outcome.seconds, seen.seconds)
        if seen.seconds > SECONDS and not case.read_by_torch():
            outcome.faults.append(f"{name}: took {seen.seconds:.1f} s of CPU time")
        grown = seen.grown - (held(adapter) if model is not None else 0)
        if grown > allowed(case) and not case.read_by_torch():
            outcome.faults.append(f"{name}: grew by {grown / MIB:.1f} MiB over a file of {case.size() / MIB:.2f} MiB")
        if large and not case.read_by_torch():
            outcome.share = max(outcome.share, grown / case.size())
        if seen.events or self.sentinel.exists():
            outcome.faults.append(f"{name}: executed or wrote something: {seen.events}")
            with contextlib.suppress(OSError):
                self.sentinel.rmdir()
        if not message.isprintable() or len(message) > LONGEST:
            outcome.faults.append(f"{name}: a message of {len(message)} characters: {message[:100]!r}")
        if adapter is not None and model is self.base:
            convlora.remove(model)
        elif adapter is not None and model is not None:
            convlora.load(model, self.kept[id(model)])
        # A refused call leaves the models as they were; an adapter that was loaded goes without a trace.
        if any(snapshot(model) != self.before[id(model)] for model in (self.base, *self.hot[case.kind])):
            outcome.faults.append(f"{name}: a model is not what it was")
            self.prepare()
        if adapter is not None:
            outcome.result = "read"
            outcome.faults += [f"{name}: {wrong}" for wrong in differences(adapter, case)]


def held(adapter: Adapter | None) -> int:
    """Bytes of the float32 factors and the copies of an adapter: a model keeps them, `convlora.adapter` copied them."""
    if adapter is None:
        return 0
    factors = sum(2 * 4 * t.numel() for layer in adapter.layers.values() for t in layer.tensors.values())
    return factors + sum(2 * t.nbytes for copies in adapter.modules.values() for t in copies.values())


# Of what these files hold some is computed: Tucker cores, scaled biases, updates of one kind brought to another's.
FORMED = ("lora_mid", "lora_B.bias", "hada_", "lokr_", "diff")


# --- what a file says, read naively ----------------------------------------------------------------------------------


def differences(adapter: Adapter, case: Case) -> list[str]:
    """Where an adapter has other values, ranks or alphas than its file, read in the plainest way."""
    wrong = []
    values: set[bytes] = set()
    folded = False
    for name, raw in case.files.items():
        for key, (dtype, content) in _content(name, raw).items():
            values |= {content, _wider(dtype, content)}
            folded |= any(mark in key for mark in FORMED)
    for path, layer in adapter.layers.items():
        for name, tensor in layer.tensors.items():
            if not bool(tensor.isfinite().all()):
                wrong.append(f"{path}.{name} is not finite")
            known = bytes_of(tensor) in values or any(bytes_of(tensor) in raw for raw in case.files.values())
            known = known or (name in FACTORS and _is_padded(tensor, FACTORS.index(name), values))
            if not known and not (folded and name in ("lora_A", "lora_B", "lora_bias", "diff")):
                wrong.append(f"{path}.{name} is not what the file holds")
    for path, copies in adapter.modules.items():
        for name, tensor in copies.items():
            if not any(_holds(raw, f"{path}.{name}", tensor) for f, raw in case.files.items() if _is_packed(f)):
                wrong.append(f"{path}.{name} is not the copy that the file holds")
    if case.kind == "convlora":
        packed = mutate.SafetensorsParts.of(case.files[case.name])
        named = json.loads(dict(packed.metadata).get("modules", "{}"))
        lost = {p for p in {*named} - {*adapter.modules} if any(not _is_statistic(name) for name in named[p])}
        if lost or set(adapter.modules) - set(named):
            wrong.append(f"copies of {list(adapter.modules)} instead of {list(named)}")
        stated = json.loads(dict(packed.metadata)["layers"])
        if set(stated) != set(adapter.layers):
            wrong.append(f"layers {list(adapter.layers)} instead of {list(stated)}")
        wrong += [
            f"{path}: rank {layer.rank}, alpha {layer.alpha} instead of {stated[path][:2]}"
            for path, layer in adapter.layers.items()
            if path in stated and not _is_stated(adapter.config, layer.rank, layer.alpha, *stated[path][:2])
        ]
    return wrong


def _is_padded(tensor: Tensor, dim: int, values: set[bytes]) -> bool:
    """Whether a factor begins, along a dimension, with what a file holds; what a hot swap adds to B is zero."""
    for count in range(1, tensor.shape[dim]):
        first, added = tensor.narrow(dim, 0, count), tensor.narrow(dim, count, tensor.shape[dim] - count)
        if bytes_of(first) in values:
            return dim == 0 or not bool(added.any())
    return False


def _is_stated(config: AdapterConfig, rank: int, alpha: float, stated_rank: int, stated_alpha: float) -> bool:
    """Whether these are what a file states, or of the same scale at a higher rank."""
    if rank == stated_rank:
        return alpha == stated_alpha
    return rank > stated_rank and math.isclose(config.scale(rank, alpha), config.scale(stated_rank, stated_alpha))


def _is_packed(file: str) -> bool:
    return file.endswith(".safetensors")


def _is_statistic(name: str) -> bool:
    """What a model need not keep: where it equals the base's, an adapter of the model has no copy."""
    return name.startswith("running_") or name == "num_batches_tracked"


def _holds(raw: bytes, key: str, tensor: Tensor) -> bool:
    """Whether a safetensors file has these values, in any precision, under a name that ends so."""
    own = load_safetensors(raw)
    found = [t for name, t in own.items() if name == key or name.endswith(f".{key}")]
    return any(t.shape == tensor.shape and bytes_of(t.to(tensor.dtype)) == bytes_of(tensor) for t in found)


def _content(name: str, raw: bytes) -> dict[str, tuple[str, bytes]]:
    """Name -> dtype and bytes of each tensor."""
    if name.endswith(".json"):
        return {}
    if name.endswith(".safetensors"):
        packed = mutate.SafetensorsParts.of(raw)
        ends = {key: (entry["dtype"], entry["data_offsets"]) for key, entry in packed.entries}
        return {key: (dtype, packed.data[first:last]) for key, (dtype, (first, last)) in ends.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)  # whatever device the file names
    return {key: (str(t.dtype), bytes_of(t)) for key, t in loaded.items()}


def _wider(dtype: str, content: bytes) -> bytes:
    """As float32, which is what a model holds."""
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64, "F8_E5M2": torch.float8_e5m2}
    kinds |= {str(kind): kind for kind in kinds.values()}
    if dtype not in kinds or not content:
        return content
    return bytes_of(torch.frombuffer(bytearray(content), dtype=kinds[dtype]).to(torch.float32))


# --- memory, time, and what is executed ------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a call took: CPU seconds, bytes by which the process grew at its peak, and audit events."""

    seconds: float = 0.0
    grown: int = 0
    events: list[str] = field(default_factory=list)


class Watch:
    """Measures calls: CPU time, peak memory of the process, and events that no reading may cause.

    Memory is what the kernel says: resident pages at their highest, which it resets on request, and address space,
    whose highest it keeps. With malloc as the only allocator, large blocks mapped and the rest given back
    (`PLAIN_MALLOC`), nothing that was freed hides what is taken.
    """

    EVENTS = ("pickle.find_class", "os.system", "os.exec", "os.fork", "subprocess.Popen", "os.mkdir", "os.rename",
              "os.remove", "os.rmdir", "shutil.", "socket.", "compile", "ctypes.dlopen")  # fmt: skip

    def __init__(self) -> None:
        self.seen: Seen | None = None
        self.libc = ctypes.CDLL(None)
        self.status = open("/proc/self/status", "rb", buffering=0)  # noqa: SIM115
        self.resets = open("/proc/self/clear_refs", "wb", buffering=0)  # noqa: SIM115
        sys.addaudithook(self._event)

    def _event(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.seen is None:
            return
        if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            self.seen.events.append(f"open {arguments}"[:200])
        elif event.startswith(self.EVENTS) and event != "compile":
            self.seen.events.append(f"{event} {arguments}"[:200])

    @contextlib.contextmanager
    def watching(self, thorough: bool) -> Iterator[Seen]:
        seen = Seen()
        if thorough:
            self.libc.malloc_trim(0)
        self.resets.write(b"5")
        before = self._memory()
        self.seen, start = seen, time.process_time()
        try:
            yield seen
        finally:
            seen.seconds = time.process_time() - start
            self.seen = None
            after = self._memory()
            mapped = after["VmPeak"] - before["VmSize"] if after["VmPeak"] > before["VmPeak"] else 0
            seen.grown = max(after["VmHWM"] - before["VmRSS"], mapped)

    def _memory(self) -> dict[str, int]:
        self.status.seek(0)
        lines = (line.split() for line in self.status.read(4096).splitlines() if line.startswith(b"Vm"))
        return {line[0][:-1].decode(): 1024 * int(line[1]) for line in lines}


# --- processes -------------------------------------------------------------------------------------------------------


def worker(seed: int, start: int, stop: int, folder: Path) -> None:
    """Run cases and write a line about each; the number of a case is written before it starts."""
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (64 * 1024 * MIB, resource.RLIM_INFINITY))
    (folder / "case").mkdir(exist_ok=True)
    trial = Trial(folder)
    trial.run(-1, Case("convlora", *trial.good["convlora"][0]))  # what a first call takes is not counted
    with open(folder / "outcomes", "a") as file:
        for index in range(start, stop):
            print(json.dumps({"starts": index}), file=file, flush=True)
            outcome = trial.run(index, case_of(seed, index, trial.good, trial.sentinel))
            print(json.dumps(dataclasses.asdict(outcome)), file=file, flush=True)


PLAIN_MALLOC = {"PYTHONMALLOC": "malloc", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
                "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
WORKER = [sys.executable, "-m", "benchmarks.trust.fuzz"]


def outcomes(count: int, seed: int, start: int = 0) -> list[Outcome]:
    """Run cases in another process, which is started again after a crash or a hang."""
    with tempfile.TemporaryDirectory(prefix="convlora-fuzz-") as name:
        folder = Path(name)
        stop, found = start + count, []
        while start < stop:
            command = [*WORKER, str(seed), str(start), str(stop), name]
            (folder / "outcomes").write_text("")
            code = _supervised(command, folder / "outcomes")
            lines = [json.loads(line) for line in (folder / "outcomes").read_text().splitlines()]
            found += [Outcome(**line) for line in lines if "starts" not in line]
            begun = [line["starts"] for line in lines if "starts" in line]
            if code == 0:
                break
            if not begun:
                raise RuntimeError(f"the process of the cases ended with {code} before the first")
            if not found or found[-1].index != begun[-1]:
                found.append(Outcome(begun[-1], "?", "failed", [f"the process ended with {code}"]))
            start = begun[-1] + 1
    return found


def _supervised(command: list[str], progress: Path) -> int:
    process = subprocess.Popen(command, cwd=ROOT, env=environment(**PLAIN_MALLOC))
    seen, idle = 0, 0  # half seconds without progress in which this process ran, too
    while True:
        try:
            return process.wait(0.5)
        except subprocess.TimeoutExpired:
            size = progress.stat().st_size
            idle = 0 if size != seen else idle + 1
            seen = size
            if idle > 2 * (HANGS if seen else 300):
                process.kill()
                process.wait()
                return -1


def measure(count: int, seed: int = 0, start: int = 0) -> Section:
    """`count` hostile files, from the number `start` on."""
    found = outcomes(count, seed, start)
    calls = sum(outcome.calls for outcome in found)
    section = Section(
        "Hostile files",
        f"{len(found)} damaged files, {calls} calls that read them: each gives an adapter with the file's own values or"
        " one ConvLoRAError, without a change of any model or anything executed. Safetensors and JSON take at most"
        f" {SECONDS:g} s, and memory of at most 4 times the file and what its JSON takes as objects; here the most of"
        " files above 256 KiB, over the file. Time and memory of a pickle are what torch.load takes, not bounded here.",
        ("format", "files", "read", "refused", "failed", "slowest call (ms)", "memory / file"),
    )
    for kind in (*formats.FORMATS, "?"):
        own = [outcome for outcome in found if outcome.kind == kind]
        if not own:
            continue
        failed = [outcome for outcome in own if outcome.faults]
        read = sum(outcome.result == "read" for outcome in own)
        slowest, share = max(o.seconds for o in own), max(o.share for o in own)
        cells = (len(own), read, len(own) - read, len(failed), f"{1000 * slowest:.0f}", f"{share:.1f}")
        section.add(
            kind, *map(str, cells),
            format=kind, files=len(own), read=read, refused=len(own) - read, failed=len(failed),
            slowest_s=slowest, memory_over_file=share,
            faults=[{"case": f"{seed} {o.index}", "faults": o.faults} for o in failed],
        )  # fmt: skip
    return section


def again(seed: int, index: int) -> None:
    """One case, and what becomes of it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "case").mkdir()
        trial = Trial(folder)
        case = case_of(seed, index, trial.good, trial.sentinel)
        print(case.kind, {file: raw[:2000] for file, raw in case.files.items()})
        print(trial.run(index, case))


if __name__ == "__main__":
    numbers = [int(text) for text in sys.argv[1:4]]
    if len(numbers) == 2:
        again(*numbers)
    else:
        worker(*numbers, Path(sys.argv[4]))
