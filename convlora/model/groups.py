"""Parameter groups for an optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from convlora.config import is_number
from convlora.errors import ConvLoRAError
from convlora.factors.base import growing_factors
from convlora.layer.lowrank import LowRank
from convlora.model.traversal import adapter_slots, adapters, require_adapters


def parameter_groups(
    model: nn.Module, lr: float, *, ratio: float = 16, copies_lr: float | None = None, name: str | None = None
) -> list[dict[str, Any]]:
    """What to give an optimizer for LoRA+: B, which starts at zero, learns `ratio` times as fast as A.

    Each trainable Parameter of the adapters is in one group, of one adapter: `"<adapter>.A"` and `"<adapter>.B"` hold
    factors, `"<adapter>.bias"` the bias updates, `"<adapter>.copies"` what `modules_to_save` trains in full. Groups
    that would be empty are left out. Which factors are B follows from the factorization: those that start at zero
    beside others that do not. (Hayou, Ghosh, Yu 2024, arXiv 2402.12354; `ratio` is their λ.)

    Args:
        lr: learning rate of A and of bias updates, and of copies where `copies_lr` says no other.
        ratio: the rate of B over that of A; 1 is plain LoRA.
        copies_lr: learning rate of copies of whole modules.
        name: of one adapter, else all.

    Raises:
        ConvLoRAError: no such adapter, or a rate or ratio that is not a positive number.

    Example:
        >>> import convlora, torch
        >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), targets="*", rank=2)
        >>> optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3, ratio=16))
        >>> [(group["name"], group["lr"]) for group in optimizer.param_groups]
        [('default.A', 0.001), ('default.B', 0.016)]
    """
    for label, value in (("lr", lr), ("ratio", ratio), ("copies_lr", lr if copies_lr is None else copies_lr)):
        if not is_number(value) or value <= 0:
            raise ConvLoRAError(f"parameter_groups: {label} (={value!r}) must be a positive number")
    rates = {"A": lr, "B": lr * ratio, "bias": lr, "copies": lr if copies_lr is None else copies_lr}
    root = require_adapters(model, "parameter_groups", [name] if name is not None else [])
    groups: list[dict[str, Any]] = []
    seen: set[nn.Parameter] = set()  # tied modules have tied copies
    for adapter in adapters(root) if name is None else [name]:
        found: dict[str, list[nn.Parameter]] = {kind: [] for kind in rates}
        for slot in adapter_slots(root):
            entry = slot.entry(adapter) if adapter in slot.names() else nn.Module()
            for tensor, p in entry.named_parameters(recurse=False):
                if p.requires_grad and p not in seen:
                    seen.add(p)
                    found[_kind(entry, tensor)].append(p)
        groups += [
            {"params": params, "lr": rates[kind], "name": f"{adapter}.{kind}"}
            for kind, params in found.items()
            if params
        ]
    return groups


def _kind(entry: nn.Module, tensor: str) -> str:
    if not isinstance(entry, LowRank):
        return "copies"
    if tensor == "lora_bias":
        return "bias"
    return "B" if tensor in growing_factors(entry.config.factors) else "A"
