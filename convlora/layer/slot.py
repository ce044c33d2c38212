"""`Slot`: the adapters of one layer, which of them act, and the fused weight while merged."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from convlora.config import AdapterConfig
from convlora.errors import ConvLoRAError
from convlora.factors.fuse import difference, fuse_weight, fuse_weight_exactly, mixture
from convlora.layer.again import computing, keeps_for_backward, note_formed
from convlora.layer.context import SampleRows, chosen, refuse_choice_in_graph
from convlora.layer.copies import TensorCopies
from convlora.layer.loading import AdapterTensors
from convlora.layer.lowrank import LowRank

State = tuple[dict[str, float], bool, bool, "dict[str, float] | None"]
Acting = list[tuple[LowRank, "float | None"]]  # adapters by strength; None: as a tensor, in a compiled graph

MOST_KEPT = 32  # fused tensors of a slot; each choice of adapters and strengths that a caller makes has its own

_row: ContextVar[tuple[Slot, str | None] | None] = ContextVar("convlora_row", default=None)  # whose rows are at hand


class Slot(nn.Module):
    """The adapters of one layer, which of them act, and the fused weight while merged.

    Invariant: a fused tensor is used only while every tensor it was formed from is the same object at the same
    version; otherwise it is formed again. It lives beside the base weight, which merging never touches.
    """

    choices = 0  # of callers, by `using` and `per_sample`
    has_copies = False

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.merged = False
        self._exact = False
        self._before_merge: dict[str, float] | None = None
        self._fused: dict[str, _Fused | None] = {}
        self._last_read: dict[str, Tensor] = {}  # the base tensors of which others have read the effective ones

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_fused": {}, "_last_read": {}}
        state.pop("choices", None)  # are those of callers, who do not know the copy
        return state

    def entry(self, name: str) -> AdapterTensors:
        return self._modules[name]  # type: ignore[return-value]

    def low_rank(self, name: str) -> LowRank:
        """The factors of an adapter that is known to have some here."""
        return self._modules[name]  # type: ignore[return-value]

    def names(self) -> list[str]:
        return list(self._modules)

    def entries(self) -> list[AdapterTensors]:
        return list(self._modules.values())  # type: ignore[arg-type]

    def low_ranks(self) -> dict[str, LowRank]:
        """Adapter name -> factors, of those that update this layer."""
        return {name: entry for name, entry in self._modules.items() if isinstance(entry, LowRank)}

    def copies(self) -> dict[str, TensorCopies]:
        """Adapter name -> copies, of those that have some of this module's tensors."""
        return {name: entry for name, entry in self._modules.items() if isinstance(entry, TensorCopies)}

    def activate(self, strengths: Mapping[str, float]) -> None:
        """Let the named adapters act, those that this layer has."""
        self.active = tuple(name for name in self._modules if strengths.get(name))
        for name in self.active:
            if self.entry(name).strength != strengths[name]:  # a write could come between a forward and its backward
                self.entry(name).set_strength(strengths[name])
        self._before_merge = None
        if self.merged or not self.active:
            self._fused.clear()  # else what was kept is replaced by the next forward: to free it here takes time

    def strengths(self) -> dict[str, float]:
        return {name: self.entry(name).strength for name in self.active}

    def merge(self, strengths: Mapping[str, float] | None, exact: bool) -> None:
        """Use one fused weight, of the active adapters or of others until `unmerge`; `exact`: formed in float64."""
        before = self.strengths() if self._before_merge is None else self._before_merge
        self._fused.clear()
        if strengths is not None:
            self.activate(strengths)
            self._before_merge = before
        self.merged, self._exact = True, exact

    def unmerge(self) -> None:
        self.merged = self._exact = False
        if self._before_merge is not None:
            self.activate(self._before_merge)
        self._fused.clear()

    def state(self) -> State:
        return self.strengths(), self.merged, self._exact, self._before_merge

    def restore(self, state: State) -> None:
        strengths, self.merged, self._exact, before = state
        self._fused.clear()
        self.activate(strengths)
        self._before_merge = before

    # --- what acts

    def effective(self, base: Any, kind: str, training: bool = False) -> Any:
        """The base tensor of a name with the adapters that act for the caller; `base` itself if none acts on it.

        `training`: as its module reads it in train mode, with rank dropout and statistics that move.
        """
        if self.has_copies and (copies := self._acting_copies(kind)):
            return self._with_copies(base, kind, training, copies)
        if torch.compiler.is_compiling():
            refuse_choice_in_graph(self)
            return self._in_graph(base, kind)
        if self.choices and (choice := chosen(self)) is not None:
            if choice.rows is not None and training and any(kind in entry._buffers for entry in self.copies().values()):
                raise ConvLoRAError("per_sample: running statistics would move in train mode; model.eval() first")
            if choice.rows is not None and not self.low_ranks():
                return base  # a module that adapters only copy: `per_sample` refuses copies that have moved
            strengths = self.acting() if choice.rows is None else self._of_row()  # summed in the order of `activate`
            acting = self._acting(strengths, kind)
            return self._live(base, f"{kind} {strengths}", acting, kind, training) if acting else base
        if self.merged:
            return self._merged(base, kind)
        if not self.active:
            return base
        entries: Any = [self._modules[name] for name in self.active]
        live = [(entry, entry.strength) for entry in entries if entry.updates(kind)]
        return self._live(base, kind, live, kind, training) if live else base

    def acting(self) -> dict[str, float]:
        """Adapter name -> strength, of those that act for the caller."""
        if self.choices and (choice := chosen(self)) is not None:
            wanted = {} if choice.rows is not None else choice.strengths
            return {name: wanted[name] for name in self._modules if wanted.get(name)}
        return self.strengths()

    def _acting_names(self) -> Iterable[str]:
        if torch.compiler.is_compiling():  # a graph reads no strength, which would make it anew for each
            refuse_choice_in_graph(self)
            return self.active
        return self.acting() if self.choices else self.active

    def freezes_statistics(self) -> bool:
        """Whether an acting adapter says that the module's running statistics stay the base's."""
        entries = [self._modules[name] for name in self._acting_names()]
        return any(isinstance(entry, TensorCopies) and entry.freezes for entry in entries)

    def _acting(self, strengths: Mapping[str, float], kind: str) -> Acting:
        named = [(self._modules.get(name), strength) for name, strength in strengths.items() if strength]
        return [(entry, s) for entry, s in named if isinstance(entry, LowRank) and entry.updates(kind)]

    def only_acting(self) -> tuple[LowRank, float] | None:
        """The one adapter that acts for the caller, live, and its strength; None if it is not one."""
        if self.choices and (choice := chosen(self)) is not None:
            acting = [] if self._acting_copies("weight") else self._acting(choice.strengths, "weight")
            return acting[0] if len(acting) == 1 else None  # type: ignore[return-value]
        low_rank = self._modules[self.active[0]] if len(self.active) == 1 else None
        if self.merged or not isinstance(low_rank, LowRank):
            return None
        self._fused.clear()  # kept while nothing trained
        return low_rank, low_rank.strength

    def sample_rows(self) -> SampleRows | None:
        """Which rows of the input have which adapter, if the caller has said so."""
        choice = chosen(self)
        return None if choice is None else choice.rows

    def by_rows(self, rows: SampleRows, call: Callable[[Tensor], Tensor], x: Tensor, least_dims: int) -> Tensor:
        """A layer's forward, `call`, in which each sample's rows have the adapter of `per_sample`."""

        def with_adapter(name: str | None, part: Tensor) -> Tensor:
            token = _row.set((self, name))
            try:
                return call(part)
            finally:
                _row.reset(token)

        return rows.through(with_adapter, x, least_dims)

    def _of_row(self) -> dict[str, float]:
        row = _row.get()
        if row is None or row[0] is not self:
            raise ConvLoRAError("per_sample: a weight is read by something else than its layer; run the samples apart")
        return {} if row[1] is None else {row[1]: 1.0}

    # --- copies

    def _acting_copies(self, kind: str) -> list[TensorCopies]:
        entries = [self._modules[name] for name in self._acting_names()]
        return [entry for entry in entries if isinstance(entry, TensorCopies) and entry.holds(kind)]

    def _with_copies(self, base: Any, kind: str, training: bool, copies: list[TensorCopies]) -> Any:
        """The tensor of a module of which acting adapters have copies: one copy itself, or a mixture."""
        last = copies[-1].tensor(kind)
        if training and kind in copies[-1]._buffers:
            return self._moving(copies).tensor(kind)
        if not last.is_floating_point():
            return last
        if torch.compiler.is_dynamo_compiling():
            mixed = self._mixed_in_graph(base, kind, copies)
            return mixed.detach() if self.merged else mixed
        merged = self.merged and not (self.choices and chosen(self) is not None)  # a caller's choice acts live
        strengths = self.acting()
        updates = self._acting(strengths, kind)
        if len(copies) == 1 and not updates and strengths[copies[0].config.name] == 1.0:
            return last.detach() if merged and last.requires_grad else last
        if base is None or any(entry.tensor(kind).shape != base.shape for entry in copies):
            raise ConvLoRAError(f"'{kind}' has another shape than the base's: its copy acts at strength 1 and alone")
        shares = [(entry, strengths[entry.config.name]) for entry in copies]
        if not merged:
            return self._formed(base, kind, updates, shares, training)
        with torch.no_grad():
            return self._compose(base, kind, updates, shares, dropout=False, exact=self._exact)

    def _mixed_in_graph(self, base: Any, kind: str, copies: list[TensorCopies]) -> Tensor:
        entries = [self._modules[name] for name in self.active]
        updates = [entry for entry in entries if isinstance(entry, LowRank) and entry.updates(kind)]
        last = copies[-1].tensor(kind)
        if len(copies) == 1 and not updates:
            if base is None or base.shape != last.shape:
                return last
            return torch.lerp(base, last, copies[0].gain.to(base.dtype))  # the copy itself at strength 1
        mixed = [difference(base, entry.tensor(kind), 1.0) * entry.gain for entry in copies]
        acting: Acting = [(low_rank, None) for low_rank in updates]
        return fuse_weight(base, [*_updates(base, kind, acting, not self.merged, ()), *mixed])

    def _moving(self, copies: list[TensorCopies]) -> TensorCopies:
        """In train mode a module writes its buffers: those of the one adapter that trains.

        Raises:
            ConvLoRAError: several act, and not one of them trains.
        """
        moving = copies if len(copies) == 1 else [entry for entry in copies if entry.trains()]
        if len(moving) != 1:
            raise ConvLoRAError(
                f"train mode: {[entry.config.name for entry in copies]} act together and {len(moving)} of them train,"
                " so statistics cannot move; activate one, or freeze the parameters of all but one"
            )
        return moving[0]

    def own_buffer(self, kind: str) -> TensorCopies | None:
        """Whose copy a module writes when it assigns a buffer; None: the base's."""
        copies = self._acting_copies(kind)
        return self._moving(copies) if copies else None

    # --- the effective tensor

    def _in_graph(self, base: Tensor, kind: str) -> Tensor:
        """In a compiled or exported graph, which cannot see a tensor change: it forms the weight itself."""
        low_ranks = (self.entry(name) for name in self.active)
        acting: Acting = [(entry, None) for entry in low_ranks if isinstance(entry, LowRank) and entry.updates(kind)]
        if not acting:
            return base
        if not self.merged:
            if keeps_for_backward() and not any(low_rank.drops() for low_rank, _ in acting):
                # Loaded by whoever compiles: PyTorch 2.6 loads a library of algebra with it.
                again = torch.utils.checkpoint.checkpoint
                return again(self._compose, base, kind, acting, use_reentrant=False, preserve_rng_state=False)
            return self._compose(base, kind, acting)
        formed = None if torch.compiler.is_dynamo_compiling() else self._fused.get(kind)
        if formed is not None and formed.is_fresh():  # an exported graph is a snapshot
            return formed.value
        with torch.no_grad():
            return self._compose(base, kind, acting, dropout=False)

    def _merged(self, base: Tensor, kind: str) -> Tensor:
        # First, since a merged net reads hundreds of weights in each forward. None: no adapter acts on this kind.
        formed = self._fused.get(kind, _NOT_FORMED)
        if formed is None:
            return base
        if formed is not _NOT_FORMED and formed.stands_on(base):
            return formed.value
        acting = self._acting(self.strengths(), kind)
        if not acting:
            self._fused[kind] = None
            return base
        tensors = [base, *(t for low_rank, _ in acting for t in low_rank.factors().values())]
        # A weight that the layer computes may differ at every read, functional transforms bring tensors that must not
        # outlive them, inference tensors keep no version, and the fake ones of an export (PyTorch 2.6) no address.
        if not all(isinstance(tensor, nn.Parameter) and _is_lasting(tensor) for tensor in tensors):
            with torch.inference_mode(False), torch.no_grad():
                return self._compose(base, kind, acting, dropout=False, exact=self._exact)
        return self._form(base, kind, acting, kind, merged=True).value

    def _live(self, base: Tensor, key: str, acting: Acting, kind: str, training: bool) -> Tensor:
        """The effective tensor of adapters that may be training; kept from one call to the next while nothing can.

        On a CPU only: factors are compared by value, since averages of weights are often written through `p.data`,
        which leaves no trace; elsewhere the comparison would wait for the device.
        """
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return self._compose(base, kind, acting, dropout=training)
        if torch.is_grad_enabled():
            self._fused.clear()
            return self._formed(base, kind, acting, (), training)
        if training and any(low_rank.drops() for low_rank, _ in acting):
            return self._compose(base, kind, acting)
        formed = self._fused.get(key)
        if formed is not None and formed.stands_on(base) and formed.is_of(acting) and formed.has_values():
            return formed.value
        keeps_version = isinstance(base, nn.Parameter) and _is_lasting(base)
        if (
            base.device.type != "cpu"
            or not keeps_version
            or not all(_is_repeatable(low_rank) for low_rank, _ in acting)
        ):
            return self._compose(base, kind, acting, dropout=False)
        return self._form(base, key, acting, kind, merged=False).value

    def _form(self, base: Tensor, key: str, acting: Acting, kind: str, merged: bool) -> _Fused:
        # Entering inference_mode(False) switches gradients on: no_grad comes after it.
        with torch.inference_mode(False), torch.no_grad():
            fused = self._compose(base, kind, acting, dropout=False, exact=merged and self._exact)
        formed = _Fused(fused, base, acting, keep_values=not merged)
        if type(fused) is Tensor:  # not one of a mode that only pretends to compute
            if len(self._fused) >= MOST_KEPT:
                self._fused.clear()
            self._fused[key] = formed
        return formed

    def _keeps(self, value: Tensor) -> bool:
        """Whether a tensor is one that later calls compute with."""
        return any(formed is not None and formed.value is value for formed in self._fused.values())

    def swap(self, name: str, factors: Mapping[str, Tensor], config: AdapterConfig, alpha: float) -> None:
        """Make an adapter that of another file with the same shapes, in place."""
        low_rank = self.low_rank(name)
        low_rank.copy_(factors)
        low_rank.configure(config, alpha)
        self._fused.clear()

    def _formed(
        self, base: Tensor, kind: str, acting: Acting, copies: Sequence[tuple[TensorCopies, float]], training: bool
    ) -> Tensor:
        """The effective tensor in a differentiable call, of which backward forms it again; see again.py."""
        if self not in computing.slots or not all(_is_repeatable(low_rank) for low_rank, _ in acting):
            return self._compose(base, kind, acting, copies, dropout=training)
        masks = [low_rank._mask() if training and low_rank.drops() else None for low_rank, _ in acting]
        form = functools.partial(self._compose, base, kind, acting, copies, dropout=False, masks=masks)
        value = form()
        tensors = [base, *(t for low_rank, _ in acting for t in low_rank.factors().values())]
        note_formed(self, value, form, [*tensors, *(entry.tensor(kind) for entry, _ in copies)])
        return value

    def _compose(
        self,
        base: Tensor,
        kind: str,
        acting: Acting,
        copies: Sequence[tuple[TensorCopies, float]] = (),
        *,
        dropout: bool = True,
        exact: bool = False,
        masks: Sequence[Tensor | None] = (),
    ) -> Tensor:
        start, mixed = mixture(base, [(entry.tensor(kind), share) for entry, share in copies], exact)
        if exact:
            return fuse_weight_exactly(start, [*(low_rank.in_float64(kind, base) for low_rank, _ in acting), *mixed])
        device = base.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return fuse_weight(start, [*_updates(base, kind, acting, dropout, masks), *mixed])
        return fuse_weight(start, [*_updates(base, kind, acting, dropout, masks), *mixed])

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._fused.clear()
        self._last_read.clear()
        super()._load_from_state_dict(*arguments)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Slot:
        self._fused.clear()
        self._last_read.clear()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _updates(base: Tensor, kind: str, acting: Acting, dropout: bool, masks: Sequence[Tensor | None]) -> list[Tensor]:
    """What each adapter adds to the base. Called as modules, so that hooks (FSDP2 unshards in one) run."""
    drops: Sequence[Tensor | bool | None] = masks or [dropout] * len(acting)
    return [
        low_rank(kind, drop, strength, base if low_rank.needs_weight else None)
        for (low_rank, strength), drop in zip(acting, drops, strict=True)
    ]


def _is_lasting(tensor: Tensor) -> bool:
    return not tensor.is_inference() and type(tensor).__name__ != "FakeTensor"


class _Fused:
    """A fused weight or bias, and what it was formed from: Parameters, each at an address and a version."""

    __slots__ = ("acting", "base", "factors", "value", "values")

    def __init__(self, value: Tensor, base: Tensor, acting: Acting, keep_values: bool) -> None:
        self.value = value
        self.base = base, base.data_ptr(), base._version
        self.factors = [
            (low_rank._parameters, name, tensor, tensor.data_ptr(), tensor._version)
            for low_rank, _ in acting
            for name, tensor in low_rank.factors().items()
        ]
        self.acting = acting
        self.values = [tensor.detach().clone() for _, _, tensor, _, _ in self.factors] if keep_values else []

    def is_of(self, acting: Acting) -> bool:
        """Whether it was formed from these, at these strengths."""
        return self.acting == acting

    def has_values(self) -> bool:
        """Whether every factor holds the values of then."""
        return all(torch.equal(factor[2], value) for factor, value in zip(self.factors, self.values, strict=False))

    def stands_on(self, base: Tensor) -> bool:
        """Whether the Parameters are those of then and `is_fresh`; plain code, since every read of a weight asks."""
        if base is not self.base[0]:
            return False
        for parameters, name, tensor, _, _ in self.factors:
            if parameters.get(name) is not tensor:
                return False
        return self.is_fresh()

    def is_fresh(self) -> bool:
        """Whether no Parameter was written to, or given other memory (`p.data = …`), since."""
        base, address, version = self.base
        if base._version != version or base.data_ptr() != address:
            return False
        for _, _, tensor, address, version in self.factors:
            if tensor._version != version or tensor.data_ptr() != address:
                return False
        return True


def _is_repeatable(low_rank: LowRank) -> bool:
    """Whether calling the module twice without dropout gives the same, and does nothing else: no hooks."""
    hooked = low_rank._forward_pre_hooks or low_rank._forward_hooks
    parameters = all(isinstance(p, nn.Parameter) and not p.is_inference() for p in low_rank.factors().values())
    return type(low_rank) is LowRank and parameters and not hooked


_NOT_FORMED = _Fused.__new__(_Fused)  # a mark, without values
