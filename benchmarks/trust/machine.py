"""Random sequences of everything that can be done to a model, against a dense oracle.

After each step the model is compared with `dense.Oracle`, which keeps `W + Σ strength·ΔW` in float64: effective weights
and outputs element by element, within the rounding that error analysis allows; gradients within what the dtype gives;
state dict, flags, adapters and what acts exactly. What the library promises bit for bit is compared bit for bit.
"""

from __future__ import annotations

import copy
import io
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from common import Section
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from oracle import bits, snapshot
from torch import Tensor, nn

import convlora
from benchmarks.trust.dense import INPUT_SHAPE, LAYERS, NORM, STATISTICS, Copies, Held, LayerFactors, Oracle, OracleNet
from convlora.layer import forms
from convlora.layer.slot import Slot

NAMES = ("rain", "snow", "night")
STOCK = OracleNet(normed=True)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Of a gradient, relative to the largest one of all factors; float64 bases have float32 factors.
CLOSE_GRADIENT = {torch.float32: 1e-4, torch.bfloat16: 0.25, torch.float16: 4e-2, torch.float64: 1e-5}
CLOSE_STATISTICS = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-6}

ANY_SIZE = {"LEAST_WORK": 0.0, "LARGEST_SHARE": float("inf")}
FORMS: dict[str, dict[str, float]] = {
    "by shape": {"HEAVY": forms.HEAVY},
    "thin": {**ANY_SIZE, "HEAVY": float("inf")},
    "branches": {**ANY_SIZE, "HEAVY": 0},
    "patches": {**ANY_SIZE, "FEW_PATCHES": 0},
}

names = st.sampled_from(NAMES)
seeds = st.integers(0, 2**16)
strengths = st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.3, 2.0])
learning_rates = st.sampled_from([0.1, 1e-3])
chosen = st.dictionaries(names, strengths, max_size=3)


@dataclass(frozen=True)
class Saved:
    """A file, and what it must hold."""

    path: Path
    parts: Held
    config: convlora.AdapterConfig
    base: dict[str, Tensor]


class Lifecycle(RuleBasedStateMachine):
    """The life of a small network with several adapters, in half of the lives with a BatchNorm."""

    done: ClassVar[Counter[str]] = Counter()  # operation -> how often it was carried out; other counts in brackets
    worst: ClassVar[float] = 0.0

    # --- beginning and end

    @initialize(at=seeds, dtype=st.sampled_from(DTYPES[:2]), normed=st.booleans())
    def begin(self, at: int, dtype: torch.dtype, normed: bool) -> None:
        self.random = torch.Generator().manual_seed(at)
        torch.manual_seed(at)
        self.folder = Path(tempfile.mkdtemp())
        self.files: list[Saved] = []
        self.model = OracleNet(normed).to(dtype).eval()
        self.oracle = Oracle(dtype)
        self.oracle.take_base(self.model.state_dict())
        self.oracle.frozen = {"head.bias"}
        self.x = torch.randn(INPUT_SHAPE, generator=self.random)
        self.done["(lives)"] += 1
        self.done["(lives with a norm)"] += normed
        # So that there is a file to load from the first step on.
        self.inject("rain", {"stem", "mid", "up"}, 2, None, "locon", True, "linear", True, {"head"}, "adapter")
        self.save("rain")
        self.remove("rain", every=True)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder)

    # --- the model, as the rules see it

    def __call__(self, model: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            return (self.model if model is None else model)(self.x.to(self.oracle.dtype))

    def plain(self) -> nn.Module:
        """A stock network with the base weights."""
        model = self.fresh()
        model.load_state_dict({k: v for k, v in self.oracle.state().items() if ".convlora." not in k})
        return model

    def fresh(self) -> nn.Module:
        return OracleNet(self.oracle.normed).to(self.oracle.dtype).eval()

    def factors(self, name: str) -> Iterator[tuple[str, str, Tensor]]:
        """(layer or module, tensor name, Parameter) of an adapter of the model."""
        for layer in self.oracle.adapters[name]:
            low_rank = self.model.get_submodule(f"{layer}.convlora.{name}")
            for tensor, parameter in low_rank.named_parameters():
                yield layer, tensor, parameter

    def take(self, name: str) -> None:
        """Let the oracle have the factors that the model has now, and its statistics."""
        for layer, tensor, parameter in self.factors(name):
            self.oracle.adapters[name][layer].tensors[tensor] = parameter.detach().clone()
        own = self.oracle.adapters[name].get(NORM)
        for kind in STATISTICS if own is not None and own.tensors else ():
            self.oracle.adapters[name][NORM].tensors[kind] = self.statistic(name, kind).clone()

    def statistic(self, name: str, kind: str) -> Tensor:
        return self.model.get_submodule(f"{NORM}.convlora.{name}").get_buffer(kind)

    def is_tame(self) -> bool:
        """Whether no effective weight is so large that a gradient hangs on the last bits of an activation."""
        weights = (self.oracle.effective(*name.split("."))[0] for name in self.oracle.parameters())
        return self.oracle.least_variance() > 0.2 and all(float(weight.abs().max()) < 2 for weight in weights)

    def there(self, given: dict[str, float]) -> dict[str, float]:
        """What there is of these, and gives a variance."""
        found = {name: s for name, s in given.items() if name in self.oracle.adapters}
        oracle = copy.copy(self.oracle)
        oracle.activate(found)
        return found if oracle.least_variance() > 0.05 else {}

    def base_of(self, parts: Held) -> dict[str, Tensor]:
        """The weights that an adapter's factors were made for."""
        adapted = [layer for layer, own in parts.items() if isinstance(own, LayerFactors)]
        return {layer: self.oracle.base[layer]["weight"].clone() for layer in adapted}

    def warning_of_base(self, file: Saved) -> str | None:
        """What loading a file says of the base: nothing of the same one, or of rounding; "" of what may be either."""
        ours = self.base_of(file.parts)
        if all(t.dtype == file.base[layer].dtype and t.equal(file.base[layer]) for layer, t in ours.items()):
            return None
        far = max(float((t.double() - file.base[n].double()).norm() / t.double().norm()) for n, t in ours.items())
        return " base " if far > 0.05 else ""

    def acting(self) -> list[Any]:
        """Values, and what acts."""
        return [bits(self.model), [slot.state() for slot in self.model.modules() if isinstance(slot, Slot)]]

    @contextmanager
    def refused(self) -> Iterator[None]:
        """The block raises ConvLoRAError and changes nothing."""
        before = snapshot(self.model)
        try:
            yield
        except convlora.ConvLoRAError as error:
            message = str(error)
        else:
            raise AssertionError("not refused")
        assert "\n" not in message
        assert snapshot(self.model) == before

    # --- adapters come and go

    @precondition(lambda self: not self.oracle.merged)
    @rule(
        name=names, layers=st.sets(st.sampled_from(LAYERS), min_size=1), rank=st.integers(1, 3),
        alpha=st.sampled_from([None, 1, 3.7, -2]), factors=st.sampled_from(["convlora", "locon"]), bias=st.booleans(),
        scaling=st.sampled_from(["linear", "sqrt"]), trained=st.booleans(),
        saved=st.sets(st.sampled_from(["head", NORM])), statistics=st.sampled_from(["adapter", "frozen"]),
    )  # fmt: skip
    def inject(
        self, name: str, layers: set[str], rank: int, alpha: float | None, factors: str, bias: bool, scaling: str,
        trained: bool, saved: set[str], statistics: str,
    ) -> None:  # fmt: skip
        saved = saved & {*self.oracle.base}
        layers, targets = layers - saved, layers
        options: dict[str, Any] = dict(
            targets=sorted(targets), rank=rank, alpha=alpha, factors=factors, name=name, rank_scaling=scaling,
            bias=bias and layers != {"mid"}, modules_to_save=sorted(saved), norm_statistics=statistics,
        )  # fmt: skip
        if name in self.oracle.adapters or not layers:
            with self.refused():
                convlora.inject(self.model, **options)
            return
        before, identities = self(), parameter_ids(self.model)
        with quietly("more parameters than the layer"):
            assert convlora.inject(self.model, **options) is self.model
        touched = {*layers, *saved, NORM} & {*self.oracle.base}
        if not any(self.oracle.copies(module, kind) for module in touched for kind in self.oracle.base[module]):
            same(self(), before)  # else a copy that acted alone is mixed from now on, and close is all that holds
        assert parameter_ids(self.model).items() >= identities.items()
        scale = convlora.adapters(self.model)[name].scale(rank, rank if alpha is None else alpha)
        parts: Held = {layer: LayerFactors({}, scale) for layer in LAYERS if layer in layers}
        self.oracle.adapters[name] = parts
        self.take(name)
        for part in parts.values():
            assert not part.tensors["lora_B"].any()
            assert part.tensors["lora_A"].dtype == torch.float32
        parts |= {module: Copies({k: t.clone() for k, t in self.oracle.base[module].items()}) for module in saved}
        self.add_statistics(parts, statistics)
        self.oracle.active[name] = 1.0
        self.oracle.frozen = set(self.oracle.parameters())
        if trained:
            self.write_to_factors(name, 0.5)
        self.done["inject"] += 1

    def add_statistics(self, parts: Held, whose: str) -> None:
        if self.oracle.normed and NORM not in parts:
            own = {k: t.clone() for k, t in self.oracle.base[NORM].items() if k in STATISTICS}
            parts[NORM] = Copies({}, freezes=True) if whose == "frozen" else Copies(own)

    @precondition(lambda self: self.oracle.adapters)
    @rule(name=names, every=st.booleans())
    def remove(self, name: str, every: bool) -> None:
        oracle = self.oracle
        going = list(oracle.adapters) if every else [name]
        left = {layer: [n for n in oracle.on(layer) if n not in going] for layer in oracle.base}
        touched = [layer for layer in oracle.base if set(oracle.on(layer)) & set(going)]
        unknown = not every and name not in oracle.adapters
        if unknown or (oracle.merged and any(left[layer] for layer in touched)):
            with self.refused():
                convlora.remove(self.model, None if every else name)
            return
        before, identities = self(), parameter_ids(self.model)
        values = {
            layer: {
                kind: getattr(self.model.get_submodule(layer), kind).detach().clone() for kind in oracle.base[layer]
            }
            for layer in oracle.base
        }
        assert convlora.remove(self.model, None if every else name) is self.model
        released = [layer for layer in touched if not left[layer]]
        for layer in released:
            assert type(self.model.get_submodule(layer)) is type(STOCK.get_submodule(layer))
            assert list(vars(self.model.get_submodule(layer))) == [*vars(STOCK.get_submodule(layer))]
            if oracle.merged:
                oracle.base[layer] = values[layer]
        if oracle.merged:
            same(self(), before)
        for n in going:
            oracle.adapters.pop(n, None)
            oracle.active.pop(n, None)
            (oracle.before_merge or {}).pop(n, None)
        stayed = parameter_ids(self.model)
        assert all(stayed[key] == identity for key, identity in identities.items() if ".convlora." not in key)
        for key in oracle.parameters():
            if (not oracle.adapters or key.split(".")[0] in released) and key != "head.bias":
                oracle.frozen.discard(key)
        if not oracle.adapters:
            oracle.merged, oracle.exact, oracle.before_merge = False, False, None
            same(self(), self(self.plain()))
        self.done["remove"] += 1

    # --- what acts

    @precondition(lambda self: self.oracle.adapters)
    @rule(given=chosen)
    def activate(self, given: dict[str, float]) -> None:
        if given != self.there(given):
            with self.refused():
                convlora.activate(self.model, given)
        convlora.activate(self.model, self.there(given))
        self.oracle.activate(self.there(given))
        self.done["activate"] += 1

    @precondition(lambda self: self.oracle.adapters)
    @rule(given=st.none() | chosen, exact=st.booleans())
    def merge(self, given: dict[str, float] | None, exact: bool) -> None:
        given = None if given is None else self.there(given)
        if given is None:
            before = self()
        else:
            state = copy.deepcopy(self.model)
            before = self(convlora.activate(state, given))
        exact_before = self.oracle.exact
        convlora.merge(self.model, given, exact=exact)
        if not exact and not exact_before:
            same(self(), before)
        self.oracle.merge(given, exact)
        self.done["merge exactly" if exact else "merge"] += 1

    @precondition(lambda self: self.oracle.adapters)
    @rule()
    def unmerge(self) -> None:
        before = self()
        kept = self.oracle.before_merge is None and not self.oracle.exact
        convlora.unmerge(self.model)
        self.oracle.unmerge()
        if kept:
            same(self(), before)
        self.done["unmerge"] += 1

    @precondition(lambda self: self.oracle.adapters)
    @rule(given=chosen, fails=st.booleans())
    def disabled(self, given: dict[str, float], fails: bool) -> None:
        before = self()
        with stopped(fails), convlora.disabled(self.model):
            same(self(), self(self.plain()))
            convlora.merge(self.model, self.there(given))
            convlora.activate(self.model, self.there(given))
            if fails:
                raise _Stop
        same(self(), before)
        self.done["disabled"] += 1

    @precondition(lambda self: self.oracle.adapters)
    @rule(given=chosen, fails=st.booleans())
    def merged(self, given: dict[str, float], fails: bool) -> None:
        before = self()
        with stopped(fails), convlora.merged(self.model):
            if not self.oracle.exact:
                same(self(), before)
            convlora.unmerge(self.model)
            convlora.activate(self.model, self.there(given))
            if fails:
                raise _Stop
        same(self(), before)
        self.done["merged"] += 1

    # --- values change

    def write_to_factors(self, name: str, std: float) -> None:
        with torch.no_grad():
            for layer, tensor, parameter in self.factors(name):
                noise = torch.randn(parameter.shape, generator=self.random).to(parameter.dtype) * std
                parameter.add_(noise)
                self.oracle.adapters[name][layer].tensors[tensor].add_(noise)

    @precondition(lambda self: self.oracle.adapters)
    @rule(name=names)
    def write(self, name: str) -> None:
        if name in self.oracle.adapters:
            self.write_to_factors(name, 0.1)
            self.done["write to factors"] += 1

    @precondition(lambda self: self.oracle.active and not self.oracle.merged and self.is_tame())
    @rule(lr=learning_rates, mode=st.booleans())
    def train_step(self, lr: float, mode: bool) -> None:
        self.step("by shape", lr, mode)

    @precondition(lambda self: self.oracle.active and not self.oracle.merged and self.is_tame())
    @rule(lr=learning_rates, mode=st.booleans())
    def train_step_thin(self, lr: float, mode: bool) -> None:
        self.step("thin", lr, mode)

    @precondition(lambda self: self.oracle.active and not self.oracle.merged and self.is_tame())
    @rule(lr=learning_rates, mode=st.booleans())
    def train_step_in_branches(self, lr: float, mode: bool) -> None:
        self.step("branches", lr, mode)

    def step(self, form: str, lr: float, mode: bool) -> None:
        target = torch.randn(self().shape, generator=self.random)
        movers = self.oracle.moving() if mode else []
        if len(movers) > 1:
            with self.refused():
                self.train_mode_forward()
            return
        batch = self.oracle.statistics(self.x)
        if movers and float(batch["running_var"].min()) < 0.01:
            return
        expected = self.oracle.gradients(self.x, target, bool(movers))
        with preferring(form):
            y = self.model.train(mode)(self.x.to(self.oracle.dtype))
            if movers:
                pass
            elif form == "branches":
                self.close(y.detach(), self.oracle)
            else:
                same(y.detach(), self(self.model.eval()))
            (y.float() if y.dtype.itemsize < 4 else y).sub(target).pow(2).mean().backward()
        self.model.eval()
        self.statistics_have_moved(movers, batch)
        with torch.no_grad():
            for parameter in convlora.parameters(self.model):
                if parameter.grad is not None:
                    parameter.add_(parameter.grad, alpha=-lr)
        largest = max((float(g.abs().max()) for g in expected.values()), default=0.0)
        for name in self.oracle.adapters:
            for layer, tensor, parameter in self.factors(name):
                was = self.oracle.adapters[name][layer].tensors[tensor]
                gradient = expected.get((name, layer, tensor))
                if gradient is None:
                    assert parameter.grad is None
                    same(parameter.detach(), was)
                else:
                    error = float((parameter.grad.double() - gradient).abs().max())
                    allowed = CLOSE_GRADIENT[self.oracle.dtype] * largest + 1e-6
                    assert error <= allowed, f"gradient of {name} {layer} {tensor} off by {error:g}, over {allowed:g}"
                    same(parameter.detach(), torch.add(was, parameter.grad, alpha=-lr))
            self.take(name)
        for parameter in self.model.parameters():
            assert parameter.requires_grad or parameter.grad is None
            parameter.grad = None
        self.done["train step" if form == "by shape" else f"train step, {form}"] += 1

    def train_mode_forward(self) -> None:
        try:
            self(self.model.train())
        finally:
            self.model.eval()

    def statistics_have_moved(self, movers: list[str], batch: dict[str, Tensor]) -> None:
        for name in movers:
            own = self.oracle.adapters[name][NORM].tensors
            assert self.statistic(name, "num_batches_tracked") == own["num_batches_tracked"] + 1
            for kind, value in batch.items():
                expected = 0.9 * own[kind].double() + 0.1 * value
                error = float((self.statistic(name, kind).double() - expected).abs().max())
                assert error <= CLOSE_STATISTICS[self.oracle.dtype] * float(1 + expected.abs().max()), f"{kind} {error}"
            self.done["statistics moved"] += 1

    @precondition(lambda self: self.oracle.adapters)
    @rule(at=seeds, assign=st.booleans())
    def load_base(self, at: int, assign: bool) -> None:
        torch.manual_seed(at)
        state = self.fresh().state_dict()
        old = self.oracle.base
        self.model.load_state_dict(copy.deepcopy(state), strict=True, assign=assign)
        self.oracle.take_base(state)
        self.follow_base(old)
        self.done["load a base checkpoint"] += 1

    def follow_base(self, old: dict[str, dict[str, Tensor]]) -> None:
        """Copies of which nothing was trained may start anew from another base; all others stay what they were."""
        held = self.model.state_dict()
        for name, parts in self.oracle.adapters.items():
            for module, own in parts.items():
                if isinstance(own, Copies) and all(equal(t, old[module][kind]) for kind, t in own.tensors.items()):
                    found = {kind: held[f"{module}.convlora.{name}.{kind}"] for kind in own.tensors}
                    new = self.oracle.base[module]
                    if all(equal(t, new[kind]) for kind, t in found.items()):
                        own.tensors.update({kind: t.clone() for kind, t in found.items()})

    @precondition(lambda self: self.oracle.adapters)
    @rule(dtype=st.sampled_from(DTYPES))
    def to(self, dtype: torch.dtype) -> None:
        assert self.model.to(dtype) is self.model
        self.oracle.to(dtype)
        self.done["to(dtype)"] += 1

    def padded(self, path: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Factors with what a hot swap adds to them: rows of A of its own choice, and as many zero columns of B."""
        a, b = tensors["lora_A"], tensors["lora_B"]
        more = self.model.state_dict()[f"{path}.lora_A"][len(a) :].clone()
        zeros = b.new_zeros(len(b), len(more), *b.shape[2:])
        return {"lora_A": torch.cat([a, more]), "lora_B": torch.cat([b, zeros], 1)}

    # --- copies

    @precondition(lambda self: self.oracle.adapters)
    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def copy(self, how: str) -> None:
        before = self()
        if how == "deepcopy":
            other = copy.deepcopy(self.model)
        else:
            memory = io.BytesIO()
            torch.save(self.model, memory)
            memory.seek(0)
            other = torch.load(memory, weights_only=False)
        same(self(other), before)
        with torch.no_grad():  # nothing shared
            for parameter in self.model.parameters():
                parameter.fill_(7)
        same(self(other), before)
        self.model = other
        self.done[how] += 1

    @precondition(lambda self: self.oracle.adapters)
    @rule()
    def state_dict_round_trip(self) -> None:
        fresh = self.fresh()
        for config in self.configs():
            with quietly("more parameters than the layer"):
                convlora.inject(fresh, config=config)
        wide = any(t.dtype == torch.float64 and ".convlora." in k for k, t in self.oracle.state().items())
        fresh.load_state_dict(self.model.state_dict(), strict=True, assign=wide)  # else float64 factors lose digits
        if self.oracle.adapters:
            convlora.activate(fresh, self.oracle.active)
            if self.oracle.merged:
                convlora.merge(fresh, exact=self.oracle.exact)
        same(self(fresh), self())
        self.done["state_dict round trip"] += 1

    def configs(self) -> list[convlora.AdapterConfig]:
        of = convlora.adapters(self.model)
        return [of[name] for name in self.oracle.adapters]

    # --- files

    @precondition(lambda self: self.oracle.adapters)
    @rule(name=names)
    def save(self, name: str) -> None:
        path = self.folder / f"{len(self.files)}.safetensors"
        if name not in self.oracle.adapters:
            with self.refused():
                convlora.save(self.model, path, name)
            assert not path.exists()
            return
        assert convlora.save(self.model, path, name) is self.model
        written = path.read_bytes()
        convlora.save(self.model, path, name)
        assert path.read_bytes() == written
        parts: Held = {}
        for layer, own in self.oracle.adapters[name].items():
            if isinstance(own, LayerFactors):
                parts[layer] = LayerFactors({n: t.float().clone() for n, t in own.tensors.items()}, own.scale)
            elif not own.is_optional or any(not t.equal(self.oracle.base[layer][n]) for n, t in own.tensors.items()):
                parts[layer] = Copies({n: narrower(t).clone() for n, t in own.tensors.items()})
        self.files.append(Saved(path, parts, convlora.adapters(self.model)[name], self.base_of(parts)))
        if self.oracle.dtype != torch.float64:  # whose factors a file rounds to float32
            before = self()
            same(self(convlora.load(self.model, path)), before)  # in place
            alone = convlora.unmerge(copy.deepcopy(self.model))
            convlora.activate(alone, name)
            same(self(convlora.load(self.plain(), path)), self(alone))
        self.done["save"] += 1

    @precondition(lambda self: self.files)
    @rule(which=st.integers(0, 20), name=names)
    def load(self, which: int, name: str) -> None:
        file = self.files[which % len(self.files)]
        present = self.oracle.adapters.get(name)
        fits = present is None or (
            convlora.adapters(self.model)[name].factors == file.config.factors
            and all(n in present and can_become(present[n], part) for n, part in file.parts.items())
            and all(isinstance(present[n], Copies) and present[n].is_optional for n in present.keys() - file.parts)
        )
        if not fits or (present is None and self.oracle.merged):
            with self.refused():
                convlora.load(self.model, file.path, name=name)
            return
        with expected_warning(self.warning_of_base(file)):
            convlora.load(self.model, file.path, name=name)
        old = present or {}
        parts: Held = {}
        for layer, own in file.parts.items():
            kinds = old[layer].tensors if layer in old else own.tensors
            if isinstance(own, Copies):
                kinds = self.oracle.base[layer]
            tensors = {n: t.to(kinds[n], copy=True) for n, t in own.tensors.items()}
            before = old.get(layer)
            if isinstance(own, LayerFactors) and isinstance(before, LayerFactors) and own.inner < before.inner:
                tensors |= self.padded(f"{layer}.convlora.{name}", tensors)
            parts[layer] = LayerFactors(tensors, own.scale) if isinstance(own, LayerFactors) else Copies(tensors)
        if NORM in old and NORM not in parts and isinstance(norm := old[NORM], Copies):
            parts[NORM] = Copies({n: self.oracle.base[NORM][n].clone() for n in norm.tensors}, norm.freezes)
        self.add_statistics(parts, file.config.norm_statistics)
        self.oracle.adapters[name] = parts
        if present is None:
            self.oracle.active[name] = 1.0
            self.oracle.frozen = set(self.oracle.parameters())
        self.done["load" if present is None else "load in place"] += 1

    @precondition(lambda self: self.oracle.adapters)
    @rule(name=names, strength=strengths, exact=st.booleans())
    def apply_to(self, name: str, strength: float, exact: bool) -> None:
        if name not in self.oracle.adapters:
            return
        applied = convlora.adapter(self.model, name).apply_to(self.plain().state_dict(), strength, exact=exact)
        alone = copy.deepcopy(self.model)
        convlora.remove(convlora.merge(alone, {name: strength}, exact=exact))
        assert list(applied) == list(alone.state_dict())
        for key, value in alone.state_dict().items():
            same(applied[key], value)
        self.done["apply_to"] += 1

    @precondition(lambda self: self.oracle.adapters)
    @rule(given=st.none() | chosen)
    def merged_state_dict(self, given: dict[str, float] | None) -> None:
        given = None if given is None else self.there(given)
        before = self.acting()
        found = convlora.merged_state_dict(self.model, given)
        assert self.acting() == before
        alone = copy.deepcopy(self.model)
        if given is not None or not self.oracle.merged:
            convlora.merge(alone, given)
        convlora.remove(alone)
        assert list(found) == list(alone.state_dict())
        for key, value in alone.state_dict().items():
            same(found[key], value, key)
        self.done["merged_state_dict"] += 1

    # --- what leaves no trace

    @precondition(lambda self: self.oracle.adapters)
    @rule(given=chosen)
    def using(self, given: dict[str, float]) -> None:
        state, given = self.acting(), self.there(given)
        with convlora.using(self.model, given):
            found = self()
        assert self.acting() == state
        same(found, self(convlora.activate(convlora.unmerge(copy.deepcopy(self.model)), given)))
        self.done["using"] += 1

    @precondition(lambda self: self.oracle.adapters)
    @rule()
    def look(self) -> None:
        before, state = self(), snapshot(self.model)
        seen = convlora.summary(self.model)
        # Adapters may have left a layer while others are there yet: its Parameters are trainable again.
        thawed = [self.model.get_parameter(key) for key in self.oracle.parameters() if key not in self.oracle.frozen]
        assert seen.trainable == sum(p.numel() for p in (*convlora.parameters(self.model), *thawed))
        convlora.audit(self.model, self.x.to(self.oracle.dtype))
        assert snapshot(self.model) == state
        same(self(), before)
        self.done["summary, audit"] += 1

    @precondition(lambda self: self.oracle.adapters)
    @rule(call=st.sampled_from(["activate", "merge", "remove", "load", "strength", "target", "save"]))
    def misuse(self, call: str) -> None:
        broken = self.folder / "broken.safetensors"
        broken.write_bytes((self.files[0].path.read_bytes() if self.files else b"\0" * 99)[:-1])
        calls: dict[str, Callable[[], Any]] = {
            "activate": lambda: convlora.activate(self.model, ["typo"]),
            "merge": lambda: convlora.merge(self.model, ["typo"]),
            "remove": lambda: convlora.remove(self.model, "typo"),
            "load": lambda: convlora.load(self.model, broken),
            "strength": lambda: convlora.activate(self.model, dict.fromkeys(self.oracle.adapters, float("nan"))),
            "target": lambda: convlora.inject(self.model, ["stem", "typo"], name="new"),
            "save": lambda: convlora.save(self.model, self.folder / "no" / "folder", "typo"),
        }
        with self.refused():
            calls[call]()
        self.done["misuse"] += 1

    # --- compiled

    @precondition(lambda self: self.oracle.adapters)
    @rule(given=chosen, merge=st.booleans())
    def compile(self, given: dict[str, float], merge: bool) -> None:
        if self.random.initial_seed() % 8:  # each takes a second or more: in an eighth of the lives
            return
        torch._dynamo.reset()
        self.live_compiled(self.there(given), merge)
        torch._dynamo.reset()
        self.done["compile"] += 1

    def live_compiled(self, given: dict[str, float], merge: bool) -> None:
        """A compiled copy follows whatever is done to it."""
        model, oracle = copy.deepcopy(self.model), copy.deepcopy(self.oracle)
        oracle.exact = False  # a graph forms the weight as an unmerged layer does
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        self.close(self(compiled), oracle)
        convlora.activate(compiled, given)
        oracle.activate(given)
        self.close(self(compiled), oracle)
        if merge:
            convlora.merge(compiled)
        else:
            convlora.unmerge(compiled)
        with torch.no_grad():
            for name in oracle.adapters:
                for layer, part in oracle.adapters[name].items():
                    low_rank = model.get_submodule(f"{layer}.convlora.{name}")
                    for tensor, parameter in low_rank.named_parameters():
                        parameter.mul_(0.5)
                        part.tensors[tensor] = parameter.detach().clone()
        self.close(self(compiled), oracle)

    # --- after every step

    def close(self, y: Tensor, oracle: Oracle) -> None:
        expected, bound = oracle.output(self.x.to(oracle.dtype))
        excess = float(((y.double() - expected).abs() - bound).max())
        assert excess <= 0, f"output is off by {excess:g} more than rounding allows"
        Lifecycle.worst = max(self.worst, float(((y.double() - expected).abs() / bound).max()))

    @invariant()
    def the_model_is_what_the_oracle_says(self) -> None:
        oracle, model = self.oracle, self.model
        if oracle.least_variance() <= 0.05:  # else NaN would hide everything
            convlora.activate(model, [])
            oracle.activate({})
        assert set(convlora.adapters(model)) == set(oracle.adapters)
        state, expected = model.state_dict(), oracle.state()
        assert set(state) == set(expected), sorted(set(state) ^ set(expected))
        for key, value in expected.items():
            same(state[key], value, key)
        for layer, kind in oracle.tensors():
            name = f"{layer}.{kind}"
            module = model.get_submodule(layer)
            value = getattr(module, kind)
            base = module._buffers[kind] if kind in STATISTICS else module._parameters[kind]
            assert base is not None
            assert base.requires_grad == (name in oracle.parameters() and name not in oracle.frozen), name
            exact, bound = oracle.effective(layer, kind)
            acts = bool(oracle.acting(layer, kind) or oracle.copies(layer, kind))
            if not acts:
                assert value is base
            assert value.dtype == base.dtype
            worst = float(((value.detach().double() - exact).abs() - bound).max())
            assert worst <= 0, f"{name} is off by {worst:g} more than rounding allows"
            if acts:
                assert value.requires_grad == (kind not in STATISTICS and not oracle.merged), name
            self.done["(weights)"] += 1
        for layer in oracle.base:
            kind, stock = type(model.get_submodule(layer)), type(STOCK.get_submodule(layer))
            assert issubclass(kind, stock)
            assert (kind is stock) == (not oracle.on(layer))
        trainable = {id(p) for name in oracle.adapters for _, _, p in self.factors(name)}
        if oracle.adapters:
            assert {id(p) for p in convlora.parameters(model)} == trainable
        self.close(self(), oracle)
        self.done["(steps)"] += 1


def preferring(form: str) -> AbstractContextManager[Any]:
    """A form of the training forward that the sizes of this net would not choose, wherever it is possible."""
    return mock.patch.multiple(forms, **FORMS[form])


class _Stop(Exception):
    """Raised inside a context manager."""


@contextmanager
def stopped(fails: bool) -> Iterator[None]:
    try:
        yield
    except _Stop:
        assert fails


def same(left: Tensor, right: Tensor, what: str = "values") -> None:
    """Bit for bit, but that a zero's sign is free: 0 added to -0 gives 0."""
    assert left.dtype == right.dtype, f"{what}: {left.dtype} and {right.dtype}"
    if not torch.equal(left, right):
        raise AssertionError(f"{what} differ by {float((left - right).detach().double().abs().max()):g}")


def equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.double(), other.double())


def narrower(tensor: Tensor) -> Tensor:
    """As a file has it."""
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def can_become(part: LayerFactors | Copies, other: LayerFactors | Copies) -> bool:
    """Whether a hot swap takes what another adapter has of a layer: the same shapes, or factors of a lower rank."""
    if isinstance(part, LayerFactors) and isinstance(other, LayerFactors):
        return part.tensors.keys() == other.tensors.keys() and other.inner <= part.inner
    return type(part) is type(other) and shapes({"": part}) == shapes({"": other})


def shapes(parts: Held) -> dict[str, dict[str, Any]]:
    return {layer: {n: tuple(t.shape) for n, t in part.tensors.items()} for layer, part in parts.items()}


def parameter_ids(model: nn.Module) -> dict[str, int]:
    return {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


@contextmanager
def quietly(message: str) -> Iterator[None]:
    """The block may warn of this, and of nothing else."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    assert all(message in str(w.message) for w in caught), [str(w.message) for w in caught]


@contextmanager
def expected_warning(message: str | None) -> Iterator[None]:
    """The block warns of just this; of "" it may warn in other words, or not at all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    said = [str(w.message) for w in caught]
    assert len(said) == (message is not None) or message == "", said
    assert all(message in text for text in said if message is not None), said


def run(steps: int, at: int = 0, length: int = 50, shrink: bool = True) -> Counter[str]:
    """Run lives of up to `length` rules until there were `steps` steps; raises at the first difference.

    `shrink`: look for the shortest life with that difference first, which takes a while.
    """
    Lifecycle.done, Lifecycle.worst = Counter(), 0.0
    while (missing := steps - Lifecycle.done["(steps)"]) > 0:
        options = settings(
            max_examples=max(1, missing // length), stateful_step_count=length, deadline=None, database=None,
            suppress_health_check=list(HealthCheck), print_blob=False, report_multiple_bugs=False,
            phases=[Phase.generate, *[Phase.shrink] * shrink],
        )  # fmt: skip
        with warnings.catch_warnings():  # lives load other bases, and adapters leave layers, which then train
            warnings.filterwarnings("ignore", ".*outside the adapter have changed", convlora.ConvLoRAWarning)
            run_state_machine_as_test(seed(at)(Lifecycle), settings=options)
        at += 1
    return Lifecycle.done


def measure(count: int, seed: int = 0) -> Section:
    """`count` steps of random lives, or up to the first difference, told as the shortest life that shows it."""
    start = time.perf_counter()
    difference = None
    try:
        run(count, seed)
    except Exception as error:  # whatever the library raised where nothing should be raised is one, too
        difference = "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])
    done = Lifecycle.done
    section = Section(
        "State machine against a dense oracle",
        f"{done['(steps)']} steps in {done['(lives)']} lives, {done['(lives with a norm)']} with a BatchNorm,"
        f" of a network with up to {len(NAMES)} adapters in {len(DTYPES)} dtypes;"
        f" {done['(weights)']} tensors compared with float64, each within its rounding; outputs"
        f" at most {Lifecycle.worst:.2f} of what error analysis allows. {time.perf_counter() - start:.0f} s. "
        + (f"DIFFERENCE: {difference}" if difference else "No difference."),
        ("operation", "times"),
    )
    for operation, times in sorted(done.items()):
        if not operation.startswith("("):
            section.rows.append((operation, str(times)))
        section.data.append({"operation": operation, "times": times})
    if difference:
        section.data.append({"difference": difference, "failed": 1})
    return section
