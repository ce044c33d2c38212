"""Looking at an injected model: `summary` counts, `audit` tries it out."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from convlora.errors import ConvLoRAError
from convlora.inspect.flow import DataFlow, leaves_with_gradient, nested_leaves
from convlora.inspect.restored import remembered, restored
from convlora.layer.adapted import class_name, peek_base_tensor, slot_of, watching_reads
from convlora.layer.copies import own_tensors
from convlora.layer.lowrank import LowRank
from convlora.layer.projection import base_parameter
from convlora.model.switch import disabled
from convlora.model.traversal import adapted_modules, adapter_slots, refuse_sharded, require_adapters, unwrap_model
from convlora.support.table import text_table


@dataclass(frozen=True)
class LayerSummary:
    """One adapter on one layer, or on a module that it has a copy of (`factors` is `"copy"`, `rank` 0).

    `share` is of the layer's own weight and bias, or of the module's Parameters; `strength` is 0 where it does not act.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    adapter: str
    factors: str
    rank: int
    parameters: int
    share: float
    strength: float = 1.0


@dataclass(frozen=True)
class Summary:
    """What `summary` found; prints as a table.

    Args:
        layers: one entry per layer and adapter.
        statistics: adapter -> number of modules whose running statistics it has a copy of.
        trainable: parameters that require gradients: those of the adapters, and what was unfrozen after `inject`.
        base: parameters of the model without adapters.
        total: all parameters of the model, adapters included.
    """

    layers: list[LayerSummary]
    trainable: int
    base: int
    total: int
    statistics: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        columns = ["layer", "type", "shape", "adapter", "factors", "rank", "parameters", "share"]
        rows = [
            [e.name, e.type, "×".join(map(str, e.shape)), e.adapter, e.factors, str(e.rank), f"{e.parameters:,}",
             f"{e.share:.1%}"]
            for e in self.layers
        ]  # fmt: skip
        if any(entry.strength != 1 for entry in self.layers):
            columns.append("strength")
            rows = [[*row, f"{entry.strength:g}"] for row, entry in zip(rows, self.layers, strict=True)]
        share = f" ({self.trainable / self.base:.2%} of the base)" if self.base else ""
        foot = f"{self.trainable:,} of {self.total:,} parameters train{share}"
        kept = [
            f"; {name!r} has running statistics of {count} module{'s' * (count != 1)}"
            for name, count in self.statistics.items()
        ]
        return f"{text_table(columns, rows, right=len(columns) - 5)}\n{foot}{''.join(kept)}"


def summary(model: nn.Module) -> Summary:
    """Per layer and adapter: type, weight shape, factorization, rank, parameters, their share of the layer's, strength.

    Works on a plain model, too: then `layers` is empty.

    Example:
        >>> from convlora import inject
        >>> report = summary(inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=2))
        >>> report.trainable, report.base, report.total
        (198, 224, 422)
    """
    root = unwrap_model(model, "summary")
    entries = []
    statistics: Counter[str] = Counter()
    brought: set[int] = set()
    for path, module in adapted_modules(root).items():
        kind = class_name(module)
        own, strengths = own_tensors(module), slot_of(module).acting()
        for name in slot_of(module).names():
            entry, strength = slot_of(module).entry(name), strengths.get(name, 0.0)
            count = sum(p.numel() for p in entry.parameters())
            brought |= {id(p) for p in entry.parameters()}
            if isinstance(entry, LowRank):
                size = sum(t.numel() for n in ("weight", "bias") if (t := peek_base_tensor(module, n)) is not None)
                row = LayerSummary(
                    path, kind, entry.spec.shape, name, entry.config.factors, entry.rank, count, count / size, strength
                )
                entries.append(row)
            elif count:
                size = sum(t.numel() for t in own.values() if isinstance(t, nn.Parameter))
                shape = tuple(next(entry.parameters()).shape)
                entries.append(LayerSummary(path, kind, shape, name, "copy", 0, count, count / max(size, 1), strength))
            elif entry.tensor_names():
                statistics[name] += 1
    base_count = sum(p.numel() for p in root.parameters() if id(p) not in brought)
    total = sum(p.numel() for p in root.parameters())
    trainable = sum(p.numel() for p in root.parameters() if p.requires_grad)
    return Summary(entries, trainable, base_count, total, dict(statistics))


_BY_INPUT = (
    "as found with the inputs given: a network that chooses layers by its input may read others for other inputs"
)


@dataclass(frozen=True)
class LayerAudit:
    """How one adapted layer fares.

    Args:
        read_in_train: the model reads the layer's weight in train mode, for any of the inputs.
        read_in_eval: … in eval mode.
        acts_in_train: what the model returns in train mode depends on the weight.
        acts_in_eval: … in eval mode.
        overwritten: the model itself writes the base weight while it runs (re-parameterised nets).
        trains: a loss of what the model returns in train mode gives the adapter a gradient; None if that cannot be
            told (inference tensors, reentrant checkpointing).
        vanishes_in: the modes in which the model replaces or deletes the layer, when it is switched to or run.
    """

    name: str
    read_in_train: bool
    read_in_eval: bool
    acts_in_train: bool
    acts_in_eval: bool
    overwritten: bool
    trains: bool | None
    vanishes_in: tuple[str, ...] = ()

    @property
    def problem(self) -> str | None:
        """What is wrong, in a few words; None if nothing."""
        if self.vanishes_in:
            return f"the model replaces or deletes it in {' and '.join(self.vanishes_in)} mode: exclude it"
        if self.overwritten:
            return "base weight overwritten by the model: exclude it"
        if not (self.read_in_train or self.read_in_eval):
            return "never read: the adapter has no effect"
        if not (self.acts_in_train or self.acts_in_eval):
            return "read, but no output depends on it: the adapter has no effect"
        if self.read_in_train != self.read_in_eval:
            return f"read only in {'train' if self.read_in_train else 'eval'} mode: the modes disagree"
        if self.acts_in_train != self.acts_in_eval:
            return f"acts only in {'train' if self.acts_in_train else 'eval'} mode: the modes disagree"
        if self.trains is False:
            return "no gradient reaches it: the adapter cannot be trained"
        return None


@dataclass(frozen=True)
class Audit:
    """What `audit` found with the inputs given; prints as a table. `problems`: layer name -> what is wrong."""

    layers: list[LayerAudit]

    @property
    def problems(self) -> dict[str, str]:
        return {layer.name: layer.problem for layer in self.layers if layer.problem}

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        if self.ok:
            return f"all {len(self.layers)} adapted layers act in train and eval mode, none is overwritten; {_BY_INPUT}"
        rows = [[name, problem] for name, problem in self.problems.items()]
        foot = f"{len(rows)} of {len(self.layers)} adapted layers have a problem, {_BY_INPUT}"
        return f"{text_table(['layer', 'problem'], rows)}\n{foot}"


Call = Callable[[Any], Any]


def audit(
    model: nn.Module,
    *inputs: Any,
    batches: Iterable[Any] = (),
    call: Call | Sequence[Call] = (),
    **named: Any,
) -> Audit:
    """Run `model(*inputs, **named)` in train and in eval mode and see what becomes of each adapter.

    Finds layers whose weight is never read (the forward bypasses them); is read, but no output depends on it (for its
    dtype alone, or the result is dropped); acts in one mode only; gets no gradient; is overwritten by the model itself,
    as `eval_conv` of SPAN's re-parameterised convolutions is at every eval forward; or is replaced or deleted by it.
    Leaves the model as it was. Takes the memory of a training step's forward.

    What is found depends on the inputs: a mixture of experts reads other layers for other images. Of several runs a
    layer is idle only if it is idle in all.

    Args:
        inputs, named: of one forward.
        batches: of further forwards: a tuple holds the arguments, a dict those by name, anything else is the only one.
        call: in the place of a forward, or several: given the bare model, it returns what is computed, as
            `lambda m: m.decode(z)` for a network whose work is not in its `forward`.

    Raises:
        ConvLoRAError: the model has no adapters, is sharded (FSDP), or a call is none. Errors of the model's forward
            pass through.

    Example:
        >>> from convlora import inject
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> audit(model, torch.zeros(1, 3, 8, 8)).ok
        True
        >>> audit(model, call=[lambda m: m[0](torch.zeros(1, 3, 8, 8)), lambda m: m[0].weight.sum()]).ok
        True
    """
    root = require_adapters(model, "audit")
    refuse_sharded(root, "audit")
    calls = _calls(inputs, named, batches, call)
    layers = adapted_modules(root)
    slots = adapter_slots(root)  # those that are there now: a forward may take some out
    every = {name: 1.0 for slot in slots for name in slot.names()}
    # Copies of several adapters do not mix in train mode: then each adapter has its turn.
    turns = [{name: 1.0} for name in every] if any(slot.has_copies for slot in slots) else [every]
    found: dict[bool, _Run] = {}
    with (
        torch.random.fork_rng(enabled=True),
        torch.no_grad(),
        torch.compiler.set_stance("force_eager"),
        restored(root),
        disabled(root),
    ):
        for slot in slots:
            slot.merged = False
        put_back = remembered(root, parameter_values=False)
        for training in (True, False):
            runs = [_try_out(root, each, training, layers, turns, (inputs, named, calls), put_back) for each in calls]
            found[training] = functools.reduce(_Run.and_also, runs)
    return Audit(_judge(layers, found[True], found[False]))


def _calls(inputs: tuple[Any, ...], named: dict[str, Any], batches: Iterable[Any], call: Any) -> list[Call]:
    given = [call] if callable(call) else call
    if not isinstance(given, Sequence) or not all(map(callable, given)):
        raise ConvLoRAError(f"audit: call (={call!r}) must be a callable that takes the model, or a list of such")
    if isinstance(batches, Tensor | str | Mapping) or not isinstance(batches, Iterable):
        raise ConvLoRAError("audit: batches must be a list of inputs; give one input as it is")
    forwards: list[Call] = [functools.partial(_forward, batch) for batch in batches]
    if inputs or named or not (forwards or given):
        forwards.insert(0, lambda root: root(*inputs, **named))
    return [*forwards, *given]


def _forward(batch: Any, root: nn.Module) -> Any:
    if isinstance(batch, dict):
        return root(**batch)
    return root(*batch) if isinstance(batch, tuple) else root(batch)


def _try_out(
    root: nn.Module,
    call: Call,
    training: bool,
    layers: Mapping[str, nn.Module],
    turns: Sequence[Mapping[str, float]],
    given: Any,
    put_back: Callable[[], None],
) -> _Run:
    """What becomes of the layers in one call: without adapters, whether they are written, and then with them."""
    overwritten: set[int] = set()
    before = {id(layer): _mark(layer) for layer in layers.values()}
    with DataFlow(_tensors_in(root, given)) as flow:
        _switch(root, training, layers, {})  # off: the layer hands out its own Parameter, so a write reaches it
        call(root)
    for layer in layers.values():
        weight = base_parameter(layer, "weight")
        if _mark(layer) != before[id(layer)] or (weight is not None and flow.wrote_to(weight)):
            overwritten.add(id(layer))
    vanished = _missing(root, layers)
    result = _Run(set(), set(), set(), overwritten, vanished)
    for acting in turns:
        if vanished:  # the next run is to find the layers that audit was given
            put_back()
        _switch(root, training, layers, acting, but=overwritten)
        run = _run(root, call, [*_tensors_in(root, given), *flow.found], training)
        vanished = _missing(root, layers)
        result = result.and_also(replace(run, vanished=vanished))
    if vanished:
        put_back()
    return result


def _tensors_in(*values: Any) -> list[Tensor]:
    return [leaf for leaf in nested_leaves(values) if isinstance(leaf, Tensor)]


def _switch(
    root: nn.Module,
    training: bool,
    layers: Mapping[str, nn.Module],
    acting: Mapping[str, float],
    but: Collection[int] = (),
) -> None:
    """Set which adapters act, and the mode. The layers in `but`, which the model writes, pass on what others do."""
    for layer in layers.values():
        slot_of(layer).activate({} if id(layer) in but else acting)
    root.train(training)


def _missing(root: nn.Module, layers: Mapping[str, nn.Module]) -> set[int]:
    return {id(layer) for layer in layers.values()} - {id(module) for module in root.modules()}


@dataclass(frozen=True)
class _Run:
    """The ids of the layers whose weight was read, of those that act, and of the tensors that would get a gradient;
    of the layers that the model wrote to, and of those that it took out.
    """

    read: set[int]
    acts: set[int]
    trained: set[int] | None
    overwritten: set[int]
    vanished: set[int]

    def and_also(self, other: _Run) -> _Run:
        trained = None if self.trained is None or other.trained is None else self.trained | other.trained
        return _Run(
            self.read | other.read,
            self.acts | other.acts,
            trained,
            self.overwritten | other.overwritten,
            self.vanished | other.vanished,
        )


def _run(root: nn.Module, call: Call, known: Sequence[Tensor], training: bool) -> _Run:
    differentiable = not torch.is_inference_mode_enabled() and not any(t.is_inference() for t in known)
    read: set[int] = set()

    def on_read(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        if tensor is not None and (name == "weight" or slot_of(module).has_copies):
            read.add(id(module))
            flow.mark(tensor, id(module))

    with torch.set_grad_enabled(training and differentiable), watching_reads(on_read), DataFlow(known) as flow:
        output = call(root)
    trained = leaves_with_gradient(output) if training and differentiable else None
    return _Run(read, flow.marks_of(output), trained, set(), set())


def _judge(layers: Mapping[str, nn.Module], train: _Run, evaluation: _Run) -> list[LayerAudit]:
    audits = []
    for path, layer in layers.items():
        factored = bool(slot_of(layer).low_ranks())
        each = LayerAudit(
            path,
            read_in_train=id(layer) in train.read,
            read_in_eval=id(layer) in evaluation.read,
            # Statistics that are read in train mode are moved, and no output depends on them.
            acts_in_train=id(layer) in (train.acts if factored else train.read),
            acts_in_eval=id(layer) in (evaluation.acts if factored else evaluation.read),
            overwritten=id(layer) in train.overwritten | evaluation.overwritten,
            trains=_trains(layer, train.trained),
            vanishes_in=tuple(
                mode for mode, run in (("train", train), ("eval", evaluation)) if id(layer) in run.vanished
            ),
        )
        held = any(copies.tensors() for copies in slot_of(layer).copies().values())
        # Statistics are worth a line only if something is wrong.
        if any(True for _ in slot_of(layer).parameters()) or (held and each.problem):
            audits.append(each)
    return audits


def _trains(layer: nn.Module, trained: set[int] | None) -> bool | None:
    factors = [p for p in slot_of(layer).parameters() if p.requires_grad]
    return None if trained is None or not factors else any(id(p) in trained for p in factors)


def _mark(layer: nn.Module) -> tuple[int, int, int]:
    weight = base_parameter(layer, "weight")
    if weight is None:  # computed at every read; what it is computed from is no base weight
        return 0, 0, 0
    return id(weight), weight.data_ptr(), -1 if weight.is_inference() else weight._version
