"""`Adapter`: the factors of one adapter without a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convlora.adapter import algebra
from convlora.adapter.cast import cast_adapter
from convlora.adapter.checkpoint import apply_adapters, extract_adapter
from convlora.adapter.file import read_adapter, write_adapter
from convlora.adapter.naming import Names, rename_layers
from convlora.adapter.parts import AdapterParts, layer_delta, refuse_weight
from convlora.adapter.training import adapter_from_state_dict
from convlora.config import AdapterConfig, Strength
from convlora.errors import ConvLoRAError
from convlora.factors.base import WeightSpec


@dataclass(frozen=True, eq=False)
class Adapter(AdapterParts):
    """The factors of one adapter as a value: no model, no architecture needed.

    Args:
        config: what was adapted and how big.
        layers: layer path -> `LayerFactors`.
        fingerprint: of the base weights that were adapted, if known.
        errors: layer path -> what `resize`, `extract` or `refactor`, whichever made this adapter, left out of ΔW:
            `‖ΔW - kept‖ / ‖ΔW‖` in the Frobenius norm. Empty for all other adapters; files do not hold it.
        modules: module path -> {tensor name: values}: copies of whole modules (`modules_to_save`) and running
            statistics, which take the place of the base's.

    Raises:
        ConvLoRAError: tensors are missing, unexpected, of other shapes than config and spec say, or non-finite.
            All are listed.

    Example:
        >>> import torch, convlora
        >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
        >>> adapter = convlora.adapter(model)
        >>> list(adapter.layers), tuple(adapter.delta("0").shape)
        (['0'], (8, 3, 3, 3))
    """

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Adapter:
        """Read an adapter file; never unpickles.

        Raises:
            ConvLoRAError: no such file, or one that is truncated, altered, foreign, of a newer format version, or
                holds non-finite values.

        Example:
            >>> import tempfile, torch, convlora
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     _ = convlora.save(model, f"{folder}/rain.safetensors")
            ...     Adapter.read(f"{folder}/rain.safetensors").config.rank
            2
        """
        return read_adapter(cls, path)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write an adapter file, atomically: a crash leaves the old file or the new one.

        Raises:
            ConvLoRAError: the file cannot be written there.

        Example:
            >>> import tempfile, torch, convlora
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     convlora.adapter(model).to(torch.float16).write(f"{folder}/rain.safetensors")
        """
        write_adapter(self, path)

    def to(self, dtype: torch.dtype) -> Adapter:
        """The adapter with its tensors in another floating dtype; copies of modules get narrower, but not wider.

        float16 has nothing below 6e-8 and few digits below 6e-5. Where that changes ΔW of a layer, or a copy, by more
        than 1 % of its Frobenius norm, a `ConvLoRAWarning` says by how much, and of all ΔW. Rounding alone changes it
        by 0.1 % (float16) or 0.5 % (bfloat16) at most.

        Raises:
            ConvLoRAError: not a floating dtype, or values overflow in it.

        Example:
            >>> import torch, convlora
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
            >>> convlora.adapter(model).to(torch.bfloat16).layers["0"].tensors["lora_A"].dtype
            torch.bfloat16
        """
        return cast_adapter(self, dtype, "Adapter.to", stacklevel=2)

    def delta(self, layer: str, weight: Tensor | None = None) -> Tensor:
        """ΔW of a layer with its scale, float32 (float64 for float64 factors), shaped as the layer's weight.

        `weight`: the base's, for factorizations whose update depends on it (`"dora"`); others do not look at it.

        Raises:
            ConvLoRAError: the adapter has no such layer; the update depends on the base weight and that is not given,
                or in another shape.

        Example:
            >>> import torch, convlora
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
            >>> convlora.adapter(model).delta("0").abs().max().item()  # B starts at zero
            0.0
        """
        if layer not in self.layers:
            known = ", ".join(repr(path) for path in self.layers)
            raise ConvLoRAError(f"Adapter.delta: no layer {layer!r}; the adapter has {known}")
        spec = self.layers[layer].spec
        if weight is None:
            refuse_weight(self.config.factors, f"Adapter.delta({layer!r}) without weight=")
        elif tuple(weight.shape) != spec.shape:
            raise ConvLoRAError(f"Adapter.delta: weight {tuple(weight.shape)} instead of {spec.shape} of {layer!r}")
        return layer_delta(self.config, self.layers[layer], 1.0, base=weight)

    def apply_to(
        self, state_dict: Mapping[str, Any], strength: Strength = 1.0, *, exact: bool = False
    ) -> dict[str, Any]:
        """A checkpoint with the adapter merged in: key order, dtypes and all other entries stay.

        `strength`: one for all layers, or `{pattern: strength}`, as for `convlora.activate`.
        The values are bitwise those that `convlora.merge` computes, with the same `exact`. Copies of modules take the
        place of the checkpoint's entries, of other shapes, too; at another strength than 1 they are
        `base + strength·(copy − base)`. The given state dict is not changed.

        Raises:
            ConvLoRAError: weights are missing or of other shapes; all are listed. A pattern matches no layer.

        Example:
            >>> import torch, convlora
            >>> base = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3))
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
            >>> merged = convlora.adapter(model).apply_to(base.state_dict(), strength=0.5)
            >>> list(merged)
            ['0.weight', '0.bias']
        """
        return apply_adapters([(self, strength)], state_dict, exact)

    def rename(self, names: Names) -> Adapter:
        """The same adapter for a network that names its modules otherwise.

        `names`: `{path: path}`, in which a path stands for all below it, too, the longest one wins, and `""` is the
        start of every path; or a function that gives each path its new one. The config then names every layer. The
        fingerprint of the base covers names, so another one has none.

        Raises:
            ConvLoRAError: the adapter has nothing at a path of the mapping, two paths would be one, or a name is no
                dotted path.

        Example:
            >>> import torch, convlora
            >>> from torch import nn
            >>> model = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)), targets="*", rank=2)
            >>> whole = convlora.adapter(model).rename({"": "net"})
            >>> list(whole.layers), list(whole.rename({"net": "", "net.1": "tail"}).layers)
            (['net.0', 'net.1'], ['0', 'tail'])
            >>> list(whole.rename(lambda path: path.removeprefix("net.")).layers)
            ['0', '1']
        """
        return rename_layers(self, names)

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Any],
        config: AdapterConfig,
        *,
        specs: Mapping[str, WeightSpec] | None = None,
    ) -> Adapter:
        """The adapter in a training checkpoint that holds everything: the `state_dict()` of a model with adapters.

        Equal to `convlora.adapter(model, config.name)` of the model that was saved, without that model: factors,
        copies of `modules_to_save`, statistics that have moved, and the fingerprint of the base, whose entries lie
        beside (unknown where the base computes a weight, by a norm). Prefixes of wrappers (`module.`, `_orig_mod.`)
        are left out of the names. The state dict itself is asked for: of a nested checkpoint,
        `checkpoint["state_dict"]`.

        Args:
            state_dict: keys `<layer>.convlora.<adapter>.<tensor>`, and those of the base.
            config: the one that was given to `inject`: which adapter, its ranks, alphas and factorization.
            specs: layer path -> weight, by `convlora.formats.specs_of(model)`. A state dict that is as torch made it
                tells which layers are grouped or transposed; one that went through `.safetensors` or another dict does
                not. A layer then counts as an ungrouped convolution where the shapes allow it; a warning says where
                they allow a transposed one, too, whose ΔW is another.

        Raises:
            ConvLoRAError: the adapter is not in it (those that are are named); ranks do not fit the config; tensors
                are missing, of the base's weights too. All are listed.

        Example:
            >>> import torch, convlora
            >>> config = convlora.AdapterConfig(targets="*", rank=2, name="rain")
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), config=config)
            >>> checkpoint = {"epoch": 7, "state_dict": model.state_dict()}
            >>> adapter = Adapter.from_state_dict(checkpoint["state_dict"], config)
            >>> adapter.fingerprint == convlora.adapter(model).fingerprint
            True
        """
        return adapter_from_state_dict(cls, state_dict, config, specs)

    # --- algebra: each gives a new adapter; the mathematics is in algebra.py and checkpoint.py

    @staticmethod
    def combine(adapters: Sequence[Adapter], weights: Sequence[Strength]) -> Adapter:
        """The weighted sum of adapters: `ΔW = Σ weight · ΔWᵢ` in every layer that any of them has.

        Exact, but for one rounding of each factor; ranks add up, and the scale becomes 1. Layers, ranks, alphas and
        `rank_scaling` may differ; bias deltas are summed, too. Name and the rest of the config are the first one's.
        Copies of modules are averaged, so the weights of the adapters that have one must sum to 1. A weight may be
        `{pattern: weight}` by layer, as a strength for `convlora.activate`.

        Raises:
            ConvLoRAError: the factorizations differ, or one layer has weights of different shapes.

        Example:
            >>> import torch, convlora
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
            >>> rain = snow = convlora.adapter(model)
            >>> Adapter.combine([rain, snow], weights=[0.7, 0.3]).layers["0"].rank
            4
        """

        return algebra.combine(adapters, weights)

    def resize(self, *, rank: int | None = None, energy: float | None = None) -> Adapter:
        """The nearest adapter of lower rank in the Frobenius norm, layer by layer: a truncated SVD of each ΔW.

        `rank`: at most this in every layer; a layer that has no more stays as it is, bitwise. `energy`: the fewest
        components that keep this share of the squared singular values, in (0, 1]; 1 drops only what is superfluous.
        For `"locon"` the matrix is ΔW as `(out, in·k²)`, so that no other adapter of this rank is nearer; for
        `"convlora"` it is that of `B @ A`, `(out·k, in·k)`, cut after blocks of k singular values. The new adapter's
        `errors` say what was lost per layer. Eckart and Young 1936, Psychometrika 1, 211.

        Raises:
            ConvLoRAError: not exactly one of the two is given, or it is out of range.

        Example:
            >>> import torch, convlora
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=2)
            >>> small = convlora.adapter(model).resize(rank=1)
            >>> small.config.rank, small.errors  # B starts at zero: nothing is lost
            (1, {'0': 0.0})
        """

        return algebra.resize(self, rank, energy)

    def refactor(self, factors: str, *, rank: int | None = None, energy: float | None = None) -> Adapter:
        """The same update in another factorization, by default without loss but for rounding.

        Without `rank` and `energy` a layer gets the rank that its update needs: at most k²·r from `"convlora"` of
        rank r to `"locon"`. With either of them it gets the best factors of that size, as in `resize`; `errors` say
        what was lost. Factors that mean the same in both, as for Linear and 1×1 layers, stay bitwise.

        Raises:
            ConvLoRAError: the factorization is unknown or has no method `fit`; rank or energy is out of range.

        Example:
            >>> import torch, convlora
            >>> model = convlora.inject(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), targets="*", rank=1)
            >>> convlora.adapter(model).refactor("locon").config.factors
            'locon'
        """

        return algebra.refactor(self, factors, rank, energy)

    @staticmethod
    def extract(
        base_state_dict: Mapping[str, Any],
        tuned_state_dict: Mapping[str, Any],
        *,
        rank: int | None = None,
        energy: float | None = None,
        factors: str = "convlora",
        name: str = "default",
        specs: Mapping[str, WeightSpec] | None = None,
    ) -> Adapter:
        """The adapter that turns one checkpoint into another, as nearly as its rank allows; no architecture needed.

        Takes every floating `.weight` of two or more dimensions that differs, as `resize` does (`rank`, `energy`,
        `errors`), and the difference of its `.bias` exactly. A bare checkpoint tells neither groups nor transposed
        layers: a weight counts as one of groups=1 with its shape as stored, unless the length of its bias fits a
        transposed layer alone. `apply_to` is right in any case; to `load` the adapter onto a model with grouped or
        transposed layers, say which: `specs={"up": WeightSpec(shape, transposed=True)}`.
        What differs and cannot be expressed (weights of norms, buffers) is named in a `ConvLoRAWarning`.

        Raises:
            ConvLoRAError: nothing differs that an adapter can express, a difference is not finite, or a spec has
                another shape than its weight.

        Example:
            >>> import torch
            >>> base = {"conv.weight": torch.zeros(8, 3, 3, 3)}
            >>> tuned = {"conv.weight": torch.randn(8, 3, 3, 3)}
            >>> adapter = Adapter.extract(base, tuned, energy=0.9)
            >>> adapter.errors["conv"] ** 2 <= 0.1
            True
        """
        return extract_adapter(Adapter, base_state_dict, tuned_state_dict, rank, energy, factors, name, specs)
