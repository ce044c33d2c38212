"""Ten thousand lives in one process: nothing may pile up, and the last life takes as long as the first.

A cycle is inject, train step, merge, unmerge, a file or value written and read, hot swap, remove, load, and every so
often what is rarer: copies, a merged removal, a class of layers made for the occasion, distillation, refused calls. A
census of all living objects is taken after the first cycles and at the end.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import resource
import statistics
import tempfile
import time
import types
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Section
from torch import Tensor, nn

import convlora
from convlora.distill import Distiller

FACTORS = ("convlora", "locon")
KINDS: dict[str, type | tuple[type, ...]] = {
    "tensors": Tensor,
    "modules": nn.Module,
    "classes": type,
    "functions": types.FunctionType,
    "methods": types.MethodType,
    "closures": types.CellType,
    "weak references": (weakref.ref,),
}
WARM_UP = 20  # cycles before the first census; all that happens rarely has happened once by then


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.SiLU(), nn.ConvTranspose2d(4, 4, 3, groups=2), nn.Flatten(2), nn.Linear(64, 8)
    )


class Life:
    """A model whose adapters come and go."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.model = network()
        self.base = copy.deepcopy(self.model.state_dict())
        self.file = folder / "a.safetensors"
        self.x = torch.randn(1, 3, 8, 8)
        self.done: Counter[str] = Counter()

    def cycle(self, i: int) -> None:
        """One life of an adapter; the model is a plain one before and after."""
        model = self.model
        convlora.inject(model, ["0", "2", "4"], rank=1 + i % 2, factors=FACTORS[i % 2], bias=i % 3 == 0)
        self.train(model)
        for name, rare in RARE.items():
            if i % 10 == list(RARE).index(name):
                rare(self)
                self.done[name] += 1
        y = model(self.x).detach()
        assert torch.equal(convlora.merge(model)(self.x), y)
        assert torch.equal(convlora.unmerge(model)(self.x), y)
        kept = convlora.adapter(model)
        if i % 10 == 0:
            convlora.save(model, self.file)
        convlora.load(model, self.file if i % 10 == 0 else kept)
        convlora.remove(model)
        convlora.load(model, self.file if i % 10 == 0 else kept)
        assert torch.equal(model(self.x), y)
        convlora.remove(model)
        self.done["cycles"] += 1

    def train(self, model: nn.Module) -> None:
        model(self.x).square().mean().backward()
        with torch.no_grad():
            for p in convlora.parameters(model):
                p.sub_(p.grad, alpha=0.1)
                p.grad = None

    def check(self) -> None:
        """The base is bitwise what it was."""
        assert list(self.model.state_dict()) == list(self.base)
        assert all(torch.equal(value, self.base[key]) for key, value in self.model.state_dict().items())


# --- what is rarer -----------------------------------------------------------------------------------------------


def _copy(life: Life) -> None:
    life.train(copy.deepcopy(life.model))


def _bake(life: Life) -> None:
    model = convlora.remove(convlora.merge(copy.deepcopy(life.model), exact=True))
    model(life.x)


def _new_class(life: Life) -> None:
    class Own(nn.Conv2d):
        """Made in each cycle, so that its adapted class would pile up where it is kept."""

    model = convlora.inject(nn.Sequential(Own(3, 4, 3)), "0", rank=1)
    life.train(model)
    convlora.remove(model)
    convlora.inject(model, "0", rank=1)  # dies adapted


def _distill(life: Life) -> None:
    distiller = Distiller(life.model, ["2"])
    distiller(life.x).loss.backward()
    for p in convlora.parameters(life.model):
        p.grad = None


def _second(life: Life) -> None:
    convlora.inject(life.model, "0", rank=1, name="second")
    with convlora.disabled(life.model), convlora.merged(life.model):
        life.model(life.x)
    convlora.activate(life.model, {"default": 1.0, "second": 0.5})
    life.train(life.model)
    convlora.remove(life.model, "second")


def _fail(life: Life) -> None:
    calls: tuple[Callable[[], Any], ...] = (
        lambda: convlora.inject(life.model, "typo"),
        lambda: convlora.activate(life.model, "typo"),
        lambda: convlora.load(life.model, life.file.with_name("no file")),
        lambda: _stop_inside(life.model),
    )
    for call in calls:
        with contextlib.suppress(convlora.ConvLoRAError, KeyboardInterrupt):
            call()


def _stop_inside(model: nn.Module) -> None:
    with convlora.disabled(model):
        raise KeyboardInterrupt


def _checkpoint(life: Life) -> None:
    state = {key: value.clone() for key, value in life.model.state_dict().items()}
    life.model.load_state_dict(state)
    life.model.load_state_dict(life.base)


def _look(life: Life) -> None:
    str(convlora.summary(life.model))
    convlora.audit(life.model, life.x)


def _cast(life: Life) -> None:
    convlora.merge(copy.deepcopy(life.model).to(torch.bfloat16))(life.x.bfloat16())


def _apply(life: Life) -> None:
    convlora.adapter(life.model).apply_to(life.base, exact=True)


RARE: dict[str, Callable[[Life], None]] = {
    "copies": _copy, "merged removals": _bake, "new classes": _new_class, "distillations": _distill,
    "second adapters": _second, "refused calls": _fail, "checkpoints": _checkpoint, "audits": _look, "casts": _cast,
    "merges into checkpoints": _apply,
}  # fmt: skip


# --- what is counted ---------------------------------------------------------------------------------------------


def census() -> Counter[str]:
    """Living objects by kind; "hooks" are entries in the hook tables of modules and of `torch` itself."""
    gc.collect()
    counted: Counter[str] = Counter()
    for item in gc.get_objects():
        counted["objects"] += 1
        for name, kind in KINDS.items():
            if issubclass(type(item), kind):
                counted[name] += 1
        if issubclass(type(item), nn.Module):
            counted["hooks"] += sum(len(v) for k, v in vars(item).items() if k.endswith("_hooks"))
    ours = vars(nn.modules.module).items()  # the hooks of all modules
    counted["hooks"] += sum(len(v) for k, v in ours if k.startswith("_global_") and k.endswith("_hooks"))
    return counted


def soak(cycles: int) -> tuple[Counter[str], Counter[str], list[float], tuple[int, int], Counter[str]]:
    """Census before and after, CPU seconds of each cycle, peak memory in KiB before and after, what was done."""
    with tempfile.TemporaryDirectory() as folder:
        life = Life(Path(folder))
        for i in range(WARM_UP):
            life.cycle(i)
        # Memory settles later than objects: the allocator keeps what it was given.
        settled = max(1, cycles // 5)
        seconds: list[float] = []
        before = census()
        memory = 0
        for i in range(cycles):
            start = time.process_time()
            life.cycle(i)
            seconds.append(time.process_time() - start)
            if i + 1 == settled:
                memory = _peak()
        after = census()
        life.check()
        return before, after, seconds, (memory, _peak()), life.done


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(count: int, seed: int = 0) -> Section:
    """`count` cycles; `seed` is that of every benchmark and has nothing to choose here."""
    start = time.perf_counter()
    before, after, seconds, (memory, peak), _ = soak(count)
    section = Section(
        "Soak",
        f"{count} cycles after {WARM_UP} to warm up, one in ten of each of: {', '.join(RARE)}. Objects as the garbage"
        " collector sees them. CPU time: median of the last tenth of the cycles over that of the first."
        f" {time.perf_counter() - start:.0f} s.",
        ("", "before", "after", "goal", "outcome"),
    )

    def add(what: str, first: str, last: str, goal: str, holds: bool) -> None:
        outcome = "holds" if holds else "FAILED"
        section.add(what, first, last, goal, outcome, what=what, before=first, after=last, failed=int(not holds))

    for kind in ("tensors", "modules", "hooks", *(k for k in KINDS if k not in ("tensors", "modules"))):
        add(f"living {kind}", str(before[kind]), str(after[kind]), "equal", before[kind] == after[kind])
    grown = after["objects"] - before["objects"]  # by a few of this file's own
    add("living objects of all kinds", str(before["objects"]), str(after["objects"]), "+ 20", grown <= 20)
    add("peak memory (MiB)", f"{memory / 1024:.1f}", f"{peak / 1024:.1f}", "+ 2 %", peak <= memory * 1.02)
    tenth = max(1, count // 10)
    first, last = (statistics.median(part) * 1e3 for part in (seconds[:tenth], seconds[-tenth:]))
    add("CPU time of a cycle (ms)", f"{first:.2f}", f"{last:.2f}", "+ 10 %", last <= first * 1.1 or count < 1000)
    return section
