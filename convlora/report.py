"""Looking at an injected model: `summary` counts, `audit` tries it out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from convlora.layer import peek, recording, slot_of
from convlora.putback import put_back
from convlora.switch import activate, disabled
from convlora.table import table
from convlora.walk import adapted_layers, refuse_sharded, slots, unwrap, with_adapters


@dataclass(frozen=True)
class LayerSummary:
    """One adapter on one layer. `share` is of the layer's own weight and bias."""

    name: str
    type: str
    shape: tuple[int, ...]
    adapter: str
    factors: str
    rank: int
    parameters: int
    share: float


@dataclass(frozen=True)
class Summary:
    """What `summary` found; prints as a table.

    Args:
        layers: one entry per layer and adapter.
        trainable: parameters that require gradients: those of the adapters, and what was unfrozen after `inject`.
        base: parameters of the model without adapters.
        total: all parameters of the model, adapters included.
    """

    layers: list[LayerSummary]
    trainable: int
    base: int
    total: int

    def __str__(self) -> str:
        columns = ["layer", "type", "shape", "adapter", "factors", "rank", "parameters", "share"]
        rows = [
            [e.name, e.type, "×".join(map(str, e.shape)), e.adapter, e.factors, str(e.rank), f"{e.parameters:,}",
             f"{e.share:.1%}"]
            for e in self.layers
        ]  # fmt: skip
        share = f" ({self.trainable / self.base:.2%} of the base)" if self.base else ""
        foot = f"{self.trainable:,} of {self.total:,} parameters train{share}"
        return f"{table(columns, rows, right=3)}\n{foot}"


def summary(model: nn.Module) -> Summary:
    """Per layer and adapter: type, weight shape, factorization, rank, parameters and their share of the layer's.

    Works on a plain model, too: then `layers` is empty.

    Example:
        >>> from convlora import inject
        >>> report = summary(inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=2))
        >>> report.trainable, report.base, report.total
        (198, 224, 422)
    """
    root = unwrap(model, "summary")
    entries = []
    factor_ids: set[int] = set()
    for path, layer in adapted_layers(root).items():
        own = sum(t.numel() for t in (peek(layer, "weight"), peek(layer, "bias")) if t is not None)
        for name in slot_of(layer).names():
            low_rank = slot_of(layer).low_rank(name)
            count = sum(p.numel() for p in low_rank.parameters())
            factor_ids |= {id(p) for p in low_rank.parameters()}
            base = getattr(type(layer), "_convlora_base").__name__  # noqa: B009, mypy knows no such attribute
            entries.append(
                LayerSummary(
                    path, base, low_rank.spec.shape, name, low_rank.config.factors, low_rank.rank, count, count / own
                )
            )
    base_count = sum(p.numel() for p in root.parameters() if id(p) not in factor_ids)
    total = sum(p.numel() for p in root.parameters())
    return Summary(entries, sum(p.numel() for p in root.parameters() if p.requires_grad), base_count, total)


@dataclass(frozen=True)
class LayerAudit:
    """How one adapted layer fares.

    Args:
        read_in_train: the model reads the layer's weight in train mode.
        read_in_eval: … in eval mode.
        overwritten: the model itself writes the base weight while it runs (re-parameterised nets).
    """

    name: str
    read_in_train: bool
    read_in_eval: bool
    overwritten: bool

    @property
    def problem(self) -> str | None:
        """What is wrong, in a few words; None if nothing."""
        if self.overwritten:
            return "base weight overwritten by the model: exclude it"
        if not (self.read_in_train or self.read_in_eval):
            return "never read: the adapter has no effect"
        if self.read_in_train != self.read_in_eval:
            return f"read only in {'train' if self.read_in_train else 'eval'} mode: the modes disagree"
        return None


@dataclass(frozen=True)
class Audit:
    """What `audit` found; prints as a table. `problems`: layer name -> what is wrong."""

    layers: list[LayerAudit]

    @property
    def problems(self) -> dict[str, str]:
        return {layer.name: layer.problem for layer in self.layers if layer.problem}

    @property
    def ok(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        if self.ok:
            return f"all {len(self.layers)} adapted layers are read in train and eval mode, none is overwritten"
        rows = [[name, problem] for name, problem in self.problems.items()]
        return f"{table(['layer', 'problem'], rows)}\n{len(rows)} of {len(self.layers)} adapted layers have a problem"


def audit(model: nn.Module, *inputs: Any) -> Audit:
    """Run `model(*inputs)` in train and in eval mode and see what becomes of each adapter. Leaves the model as it was.

    Finds layers whose weight is never read (the forward bypasses them), is read in one mode only, or is overwritten
    by the model itself, as `eval_conv` of SPAN's re-parameterised convolutions is at every eval forward.

    Raises:
        ConvLoRAError: the model has no adapters, or is sharded (FSDP). Errors of the model's forward pass through.

    Example:
        >>> from convlora import inject
        >>> model = inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=1)
        >>> audit(model, torch.zeros(1, 3, 8, 8)).ok
        True
    """
    root = with_adapters(model, "audit")
    refuse_sharded(root, "audit")
    layers = adapted_layers(root)
    read: dict[bool, set[int]] = {}
    overwritten: set[int] = set()
    every = {name: 1.0 for slot in slots(root) for name in slot.names()}
    with torch.random.fork_rng(enabled=True), torch.no_grad(), put_back(root), disabled(root):
        for training in (True, False):
            model.train(training)
            activate(root, [])  # adapters off: the layer hands out its own Parameter, so a write reaches it
            before = {id(layer): _mark(layer) for layer in layers.values()}
            model(*inputs)
            overwritten |= {id(layer) for layer in layers.values() if _mark(layer) != before[id(layer)]}
            activate(root, every)
            with recording() as read[training]:
                model(*inputs)
    return Audit(
        [
            LayerAudit(path, id(layer) in read[True], id(layer) in read[False], id(layer) in overwritten)
            for path, layer in layers.items()
        ]
    )


def _mark(layer: nn.Module) -> tuple[int, int, int]:
    weight = layer._parameters.get("weight")
    if weight is None:  # computed at every read; what it is computed from is no base weight
        return 0, 0, 0
    return id(weight), weight.data_ptr(), -1 if weight.is_inference() else weight._version
