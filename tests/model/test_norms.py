"""Layers that compute their weight, with a norm or a mask: merged values, baked in or kept by the norm."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import bits, randomise
from torch import nn
from torch.nn.utils import parametrizations, prune

import convlora


def old_weight_norm(layer: nn.Module, dim: int = 0) -> nn.Module:
    with warnings.catch_warnings(), torch.no_grad():  # else the weight is no leaf, and torch copies no such module
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, dim=dim)


def pruned(layer: nn.Module, *names: str) -> nn.Module:
    layer.requires_grad_(False)
    for name in names or ("weight",):
        prune.l1_unstructured(layer, name, 0.5)
    return layer


LAYERS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "conv2d": lambda: (nn.Conv2d(6, 8, 3), (2, 6, 9, 9)),
    "grouped": lambda: (nn.Conv2d(6, 8, 3, groups=2), (2, 6, 9, 9)),
    "conv1d": lambda: (nn.Conv1d(6, 33, 7), (2, 6, 12)),
    "transposed": lambda: (nn.ConvTranspose1d(6, 12, 4, stride=2), (2, 6, 9)),
    "conv3d": lambda: (nn.Conv3d(6, 4, (1, 3, 3)), (1, 6, 3, 5, 5)),
    "linear": lambda: (nn.Linear(300, 17), (2, 300)),
}


def output(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


# --- a weight norm that stays ------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, old_weight_norm], ids=["parametrized", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_weight_norm_that_is_kept_gives_the_merged_weight_bitwise(
    kind: str, dim: int, dtype: torch.dtype, norm: Any
) -> None:
    layer, shape = LAYERS[kind]()
    base = nn.Sequential(norm(layer.to(dtype), dim=dim)).eval()
    plain, x = copy.deepcopy(base), torch.randn(shape, dtype=dtype)
    keys, flags = list(base.state_dict()), [p.requires_grad for p in base.parameters()]
    model = convlora.merge(randomise(convlora.inject(base, "*", rank=2)))
    y = output(model, x)
    assert not torch.allclose(y, output(plain, x))
    convlora.remove(model, norms="keep")
    assert torch.equal(output(model, x), y)
    assert list(model.state_dict()) == keys
    assert [p.requires_grad for p in model.parameters()] == flags
    plain.load_state_dict(model.state_dict())
    assert torch.equal(output(plain, x), y)
    model.requires_grad_(True).train()(x).sum().backward()  # it trains on
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, nn.utils.spectral_norm], ids=["new", "legacy"])
def test_a_norm_that_cannot_give_the_merged_weight_is_refused_before_anything_changes(norm: Any) -> None:
    model = nn.Sequential(norm(nn.Conv2d(6, 8, 3)), nn.Conv2d(8, 8, 3)).eval()
    convlora.merge(randomise(convlora.inject(model, "*", rank=2)))
    before, kinds = bits(model), [type(m) for m in model]
    with pytest.raises(convlora.ConvLoRAError, match=r"'0\.weight' cannot give the merged values exactly.*'bake'"):
        convlora.remove(model, norms="keep")
    assert bits(model) == before
    assert [type(m) for m in model] == kinds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, old_weight_norm], ids=["parametrized", "legacy"])
def test_a_weight_norm_in_half_precision_gives_the_merged_weight_bitwise_or_is_refused(
    norm: Any, dtype: torch.dtype
) -> None:
    kept = []
    for seed in range(8):
        torch.manual_seed(seed)
        model = nn.Sequential(norm(nn.Conv2d(6, 8, 3).to(dtype))).eval()
        convlora.merge(randomise(convlora.inject(model, "*", rank=2)))
        before, weight = bits(model), model[0].weight.detach().clone()
        try:
            convlora.remove(model, norms="keep")
        except convlora.ConvLoRAError:
            assert bits(model) == before
            continue
        kept.append(seed)
        output(model, torch.randn(1, 6, 5, 5, dtype=dtype))
        assert torch.equal(model[0].weight, weight)
    assert len(kept) < 8 or dtype == torch.float16


def test_an_orthogonal_weight_stays_parametrized_or_is_refused() -> None:
    """The sum of an orthogonal matrix and an update is not orthogonal."""
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6))).eval()
    convlora.merge(randomise(convlora.inject(model, "*", rank=2)))
    with pytest.raises(convlora.ConvLoRAError, match="cannot give the merged values"):
        convlora.remove(model, norms="keep")


def test_a_parametrization_with_an_inverse_stays() -> None:
    class Doubled(nn.Module):
        def forward(self, half: torch.Tensor) -> torch.Tensor:
            return half * 2

        def right_inverse(self, whole: torch.Tensor) -> torch.Tensor:
            return whole / 2

    layer = nn.Conv2d(3, 4, 3)
    nn.utils.parametrize.register_parametrization(layer, "weight", Doubled())
    model, x = nn.Sequential(layer).eval(), torch.randn(1, 3, 5, 5)
    keys = list(model.state_dict())
    y = output(convlora.merge(randomise(convlora.inject(model, "*", rank=1))), x)
    convlora.remove(model, norms="keep")
    assert list(model.state_dict()) == keys
    assert torch.equal(output(model, x), y)


def test_layers_without_a_norm_do_not_mind() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(1, 3, 5, 5)
    y = output(convlora.merge(randomise(convlora.inject(model, "*", rank=1))), x)
    assert torch.equal(output(convlora.remove(model, norms="keep"), x), y)


def test_norms_says_what_it_may_be() -> None:
    model = convlora.inject(nn.Sequential(nn.Conv2d(3, 4, 3)), "*", rank=1)
    with pytest.raises(convlora.ConvLoRAError, match=r"norms \(='drop'\) must be 'bake' or 'keep'"):
        convlora.remove(model, norms="drop")


# --- masks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", ["bake", "keep"])
@pytest.mark.parametrize("names", [("weight",), ("weight", "bias")], ids=["weight", "weight and bias"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_zeros_of_a_mask_stay_zero(kind: str, names: tuple[str, ...], norms: str) -> None:
    layer, shape = LAYERS[kind]()
    model, x = nn.Sequential(pruned(layer, *names)).eval(), torch.randn(shape)
    zeros = {name: getattr(layer, name) == 0 for name in names}
    plain, before, keys = copy.deepcopy(model), bits(model), list(model.state_dict())
    convlora.inject(model, "*", rank=2, bias=True)
    assert torch.equal(output(model, x), output(plain, x))
    randomise(model)
    for name, zero in zeros.items():
        assert not getattr(model[0], name)[zero].any()
        assert (getattr(model[0], name) != getattr(plain[0], name))[~zero].any()
    model(x).sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in convlora.parameters(model))
    y = output(model, x)
    assert torch.equal(output(convlora.merge(model), x), y)
    assert torch.equal(output(convlora.unmerge(model), x), y)
    twin = convlora.remove(copy.deepcopy(model))
    assert bits(twin) == before
    assert torch.equal(output(twin, x), output(plain, x))
    convlora.remove(convlora.merge(model), norms=norms)
    assert torch.equal(output(model, x), y)
    assert all(not getattr(model[0], name)[zero].any() for name, zero in zeros.items())
    if norms == "keep":
        assert list(model.state_dict()) == keys
        for name in names:
            assert prune.is_pruned(model[0])
            prune.remove(model[0], name)
        assert torch.equal(output(model, x), y)
    else:
        assert set(model.state_dict()) == {"0.weight", "0.bias"}
        assert not prune.is_pruned(model[0])


def test_a_mask_that_grows_while_the_adapter_is_off_is_kept() -> None:
    model, x = nn.Sequential(pruned(nn.Conv2d(3, 8, 3))).eval(), torch.randn(1, 3, 6, 6)
    randomise(convlora.inject(model, "*", rank=1))
    convlora.activate(model, [])
    prune.random_unstructured(model[0], "weight", 0.5)
    convlora.activate(model, ["default"])
    output(model, x)
    assert not model[0].weight[model[0].weight_mask == 0].any()  # type: ignore[operator, index]
    y = output(model, x)
    assert torch.equal(output(convlora.remove(convlora.merge(model)), x), y)


def test_adapters_of_a_pruned_layer_travel(tmp_path: Any) -> None:
    base, x = nn.Sequential(pruned(nn.Conv2d(3, 8, 3))).eval(), torch.randn(1, 3, 6, 6)
    model = randomise(convlora.inject(copy.deepcopy(base), "*", rank=1))
    y = output(model, x)
    convlora.save(model, tmp_path / "a.safetensors")
    assert torch.equal(output(convlora.load(base, tmp_path / "a.safetensors"), x), y)
    copied = copy.deepcopy(base)
    assert torch.equal(output(copied, x), y)
    torch.save(base, tmp_path / "whole.pt")
    assert torch.equal(output(torch.load(tmp_path / "whole.pt", weights_only=False), x), y)
