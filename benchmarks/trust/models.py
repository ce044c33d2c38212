"""The whole life of an adapter on networks that other people wrote: one row each, and what failed.

On every layer that can be adapted, but for those that `audit` finds overwritten by the network itself:

- identity: after `inject` the outputs are bitwise those of the base, in train and in eval mode;
- step: one training step moves the adapter alone, and gives a gradient to just the layers that `audit` says;
- file: saved and loaded into a fresh network, outputs are bitwise the same;
- merge: likewise merged, and merged and removed, which leaves the base's classes and keys;
- remove: state dict, Parameter identities, classes and `requires_grad` are bitwise the base's again;
- train: some steps in train mode, which move the adapter's own running statistics: every base key stays bitwise, but
  for what the network itself writes in train mode beside statistics, and `changed` names just that; disabled, the
  outputs are the base's, and the file gives those of the live network.
"""

from __future__ import annotations

import copy
import re
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import Section
from oracle import bits, bytes_of, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrize

import convlora
from benchmarks.trust.catalogue import LEFT_OUT, NetworkCase, network_cases
from convlora.inspect.flow import nested_leaves
from convlora.inspect.restored import restored
from convlora.layer.adapted import Adapted, slot_of, why_not

STAGES = ("identity", "step", "file", "merge", "remove", "train")
STEPS = 3  # in train mode


@dataclass
class Life:
    """What became of an adapter on one network: stage -> "ok", or what went wrong; `refused`: why there was none."""

    case: NetworkCase
    layers: int = 0
    refused: str = ""
    outcome: dict[str, str] = field(default_factory=dict)
    audited: dict[str, str] = field(default_factory=dict)
    statistics: int = 0  # modules whose running statistics moved in the adapter
    changed: list[str] = field(default_factory=list)  # outside the adapter after `train`, by the network itself
    seconds: float = 0.0

    @property
    def failures(self) -> dict[str, str]:
        return {stage: text for stage, text in self.outcome.items() if text != "ok"}

    @property
    def findings(self) -> str:
        """What `audit` says, in short."""
        counts = Counter(reason.partition(":")[0] for reason in self.audited.values())
        return self.refused or ", ".join(f"{n} {reason}" for reason, n in counts.items()) or "all act"


def measure(count: int, seed: int = 0) -> Section:
    """The lives on at most `count` networks, drawn by `seed` if there are more."""
    every = network_cases()
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count]
    section = Section("Models of others", "", ("network", "layers", *STAGES, "audit"))
    lives = []
    for index in sorted(drawn.tolist()):
        life = life_on(every[index])
        lives.append(life)
        name = f"{life.case.library}: {life.case.name}"
        cells = [life.outcome.get(stage, "–") for stage in STAGES]
        section.add(
            name, str(life.layers), *cells, life.findings,
            network=name, layers=life.layers, **life.outcome, audit=life.findings,
            refused=life.refused, failed=int(bool(life.failures)), statistics=life.statistics, changed=life.changed,
        )  # fmt: skip
        writes = f"; writes {len(life.changed)} tensors: {', '.join(life.changed[:3])}" if life.changed else ""
        print(f"{name}: {life.failures or 'ok'}; {life.findings}{writes}; {life.seconds:.1f} s", flush=True)
    numbers = Counter(life.case.library for life in lives)
    refused = sum(bool(life.refused) for life in lives)
    failed = sum(bool(life.failures) for life in lives)
    writing = ", ".join(f"{life.case.name} ({len(life.changed)})" for life in lives if life.changed)
    section.note = (
        f"{len(lives)} networks ({', '.join(f'{n} of {library}' for library, n in numbers.items())}), rank 1 on every"
        f" layer that can be adapted. Failed: {failed}; refused with a reason: {refused}."
        f" Statistics of the adapter's own moved in {sum(bool(life.statistics) for life in lives)}. Networks that write"
        f" other tensors in train mode, which `changed` names: {writing or 'none'}."
        " Audit: on how many layers an adapter does not act fully, and why. Left out: "
        + "; ".join(f"{name} ({reason})" for name, reason in LEFT_OUT.items())
        + "."
    )
    return section


def life_on(case: NetworkCase, factors: str = "convlora") -> Life:
    """The life of an adapter on one network. Errors are caught and told."""
    life, start = Life(case), time.perf_counter()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")  # of other people's networks, and of adapters larger than tiny layers
        try:
            trial = _Trial(case, factors, life)
            try:
                trial.inject(trial.copy(trial.base))
            except convlora.ConvLoRAError as error:
                life.refused = str(error)
                return life
            trial.run(Path(folder))
        except Exception as error:
            stage = next(stage for stage in STAGES if stage not in life.outcome or stage == STAGES[-1])
            life.outcome[stage] = f"{type(error).__name__}: {str(error)[:300]}"
    life.seconds = time.perf_counter() - start
    return life


class _Trial:
    def __init__(self, case: NetworkCase, factors: str, life: Life) -> None:
        self.case, self.factors, self.life = case, factors, life
        self.base = case.build()
        self.exclude: tuple[str, ...] = ()

    def copy(self, model: nn.Module) -> nn.Module:
        try:
            return copy.deepcopy(model)
        except RuntimeError:  # a weight that is computed cannot be copied
            return self.case.build()

    def run(self, folder: Path) -> None:
        model, check = self.base, self.check
        expected, kinds, state = self.outputs(model), [type(m) for m in model.modules()], bits(model)
        identities = [(id(p), p.requires_grad) for p in model.parameters()]
        fresh, second, third = (self.copy(model) for _ in range(3))
        self.adapt(model)
        check("identity", lambda: _same(self.outputs(model), expected))
        check("step", lambda: self.step(model))

        randomise(model, std=0.1)
        acting = self.outputs(model)
        check("identity", lambda: not _same(acting, expected) or "random factors change nothing")
        convlora.save(model, folder / "adapter.safetensors")
        convlora.load(fresh, folder / "adapter.safetensors")
        check("file", lambda: _same(self.outputs(fresh), acting))
        convlora.merge(fresh)
        check("merge", lambda: _same(self.outputs(fresh), acting))
        check("merge", lambda: {k: v for k, v in bits(fresh).items() if ".convlora." not in k} == state)
        computed = any(parametrize.is_parametrized(module) for module in fresh.modules())
        convlora.remove(fresh)
        check("merge", lambda: _same(self.outputs(fresh), acting))
        if not computed:  # `remove` bakes a norm in
            check("merge", lambda: [type(m) for m in fresh.modules()] == kinds)
            check("merge", lambda: list(fresh.state_dict()) == list(state))

        convlora.unmerge(convlora.merge(model))
        convlora.remove(model)
        check("remove", lambda: bits(model) == state and [type(m) for m in model.modules()] == kinds)
        check("remove", lambda: [(id(p), p.requires_grad) for p in model.parameters()] == identities)

        self.inject(second)
        check("train", lambda: self.train(second, state))
        with convlora.disabled(second):
            check("train", lambda: bool(self.life.changed) or _same(self.outputs(second), expected))
        acting = self.outputs(second)
        convlora.save(second, folder / "trained.safetensors")
        third.load_state_dict({key: second.state_dict()[key] for key in self.life.changed}, strict=False)
        convlora.load(third, folder / "trained.safetensors")
        check("train", lambda: _same(self.outputs(third), acting))
        check("train", lambda: _same(self.outputs(convlora.merge(third)), acting))

    def train(self, model: nn.Module, before: dict[str, bytes]) -> bool | str:
        """Some steps in train mode, after which `changed` says which base keys are not what they were."""
        optimizer = torch.optim.Adam(convlora.parameters(model), lr=1e-3)
        for _ in range(STEPS):
            optimizer.zero_grad()
            self.loss(model).backward()
            optimizer.step()
        after = model.state_dict(keep_vars=True)
        moved = {id(after[key]): key for key, raw in before.items() if bytes_of(after[key]) != raw}
        self.life.changed = convlora.changed(model)
        self.life.statistics = len(convlora.adapter(model).modules)
        if {id(after[key]) for key in self.life.changed} != moved.keys():
            return f"moved: {[*moved.values()][:3]} of {len(moved)}; changed says {self.life.changed[:3]}"
        return True

    def adapt(self, model: nn.Module) -> None:
        """An adapter on every layer but those that the network overwrites."""
        self.report = self.audit(self.inject(model))
        overwritten = tuple(entry.name for entry in self.report.layers if entry.overwritten)
        if overwritten:
            self.exclude = tuple(f"re:{re.escape(name)}" for name in overwritten)
            self.report = self.audit(self.inject(convlora.remove(model)))
        self.life.audited = {**dict.fromkeys(overwritten, "overwritten"), **self.report.problems}
        self.life.layers = len(self.report.layers)

    def inject(self, model: nn.Module) -> nn.Module:
        targets = [lambda name, module: why_not(module) is None]
        return convlora.inject(model, targets, rank=1, factors=self.factors, exclude=self.exclude)

    def audit(self, model: nn.Module) -> Any:
        arguments, keywords = self.case.seeded_inputs()
        return convlora.audit(model, *arguments, **keywords)

    def check(self, stage: str, holds: Callable[[], bool | str]) -> None:
        """Note "ok", or the first thing that went wrong at a stage."""
        try:
            result = holds()
        except Exception as error:
            result = f"{type(error).__name__}: {str(error)[:300]}"
        if self.life.outcome.get(stage, "ok") == "ok":
            self.life.outcome[stage] = "ok" if result is True else result or "differs"

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """All tensors of the output in eval, then in train mode. Buffers and attributes come back as they were.

        On a frozen network: by `requires_grad` torch chooses, without gradients, too, how it multiplies some matrices.
        """
        flags = [(p, p.requires_grad) for p in model.parameters()]
        with torch.no_grad(), restored(model, parameter_values=False):
            model.requires_grad_(False)
            found = [y for training in (False, True) for y in self.forward(model.train(training))]
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        return found

    def forward(self, model: nn.Module) -> list[Tensor]:
        """Seeded, and on inputs of its own: some networks draw noise, some write to their input."""
        arguments, keywords = self.case.seeded_inputs()
        return [leaf for leaf in nested_leaves(model(*arguments, **keywords)) if isinstance(leaf, Tensor)]

    def loss(self, model: nn.Module) -> Tensor:
        """Of a forward in train mode."""
        outputs = [y for y in self.forward(model.train()) if y.requires_grad]
        loss = sum((y - torch.randn_like(y))[y.isfinite()].square().mean() for y in outputs)
        assert isinstance(loss, Tensor)
        return loss

    def step(self, model: nn.Module) -> bool | str:
        ours = {id(p) for p in convlora.parameters(model)}
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD(convlora.parameters(model), lr=0.1)
        with restored(model, parameter_values=False):
            self.loss(model).backward()
        optimizer.step()
        named = list(model.named_parameters())
        moved = {name for name, p in named if not torch.equal(p, before[name])}
        stray = [name for name, p in named if id(p) not in ours and (name in moved or p.grad is not None)]
        layers = {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}
        idle = {name for name, m in layers.items() if any(p.grad is None for p in slot_of(m).parameters())}
        told = {entry.name for entry in self.report.layers if not entry.trains}
        if stray:
            return f"the step reached the base: {', '.join(stray[:3])}"
        if not moved:
            return "the step moved nothing"
        if idle != told:
            return (
                f"no gradient, but not named by audit: {sorted(idle - told)[:3]} of {len(idle - told)};"
                f" named, but a gradient: {sorted(told - idle)[:3]} of {len(told - idle)}"
            )
        return True


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Bitwise, NaN included."""
    return len(left) == len(right) > 0 and all(
        a.shape == b.shape and a.dtype == b.dtype and bytes_of(a) == bytes_of(b)
        for a, b in zip(left, right, strict=True)
    )
