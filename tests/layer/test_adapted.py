"""What holds on one layer, for every layer type and hazard."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from typing import Any

import pytest
import torch
from oracle import FACTORS, LAYERS, bits, build, change, randomise, snapshot, stock
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import convlora
from convlora.factors.base import update_of
from convlora.layer.adapted import slot_of, weight_spec

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
quiet = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")


@quiet
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("hazard", LAYERS)
def test_injecting_keeps_the_output_bitwise(hazard: str, factors: str, dtype: torch.dtype) -> None:
    layer, x = build(hazard, dtype)
    before = layer(x)
    convlora.inject(layer, "*", rank=2, factors=factors)
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.eval()(x), before)


@quiet
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("hazard", LAYERS)
def test_output_is_that_of_a_stock_layer_with_the_effective_weight(
    hazard: str, factors: str, dtype: torch.dtype
) -> None:
    layer, x = build(hazard, dtype)
    plain = layer(x)
    has_bias = layer.bias is not None
    convlora.inject(layer, "*", rank=2, alpha=4, factors=factors, bias=has_bias)
    y = randomise(layer)(x)
    assert torch.equal(y, stock(layer)(x))
    assert not torch.allclose(y, plain, atol=1e-2)
    assert torch.equal(convlora.merge(layer)(x), y)
    assert torch.equal(convlora.remove(layer)(x), y)
    assert type(layer) is LAYERS[hazard][0]


@quiet
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("hazard", LAYERS)
def test_effective_weight_is_the_naive_sum(hazard: str, factors: str) -> None:
    layer, _ = build(hazard, torch.float64)
    base = layer.weight.detach().clone()
    convlora.inject(layer, "*", rank=2, alpha=4, factors=factors)
    randomise(layer)
    spec = weight_spec(layer)
    expected = base + change(factors, slot_of(layer).low_rank("default").factors(), spec, 2.0, base)
    torch.testing.assert_close(layer.weight, expected, rtol=0, atol=1e-6)


@quiet
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("hazard", LAYERS)
def test_every_factor_gets_its_gradient(hazard: str, factors: str) -> None:
    layer, x = build(hazard, torch.float64)
    convlora.inject(layer, "*", rank=2, factors=factors)
    randomise(layer)
    for low_rank in (slot_of(layer).low_rank("default"),):
        for name, p in low_rank.factors().items():
            low_rank._parameters[name] = nn.Parameter(p.detach().double())
    factors_ = slot_of(layer).low_rank("default").factors()
    if factors == "dora":  # its norm counts as constant: see tests/factors/test_weight.py
        factors_ = {"lora_magnitude": factors_["lora_magnitude"]}

    def output(*values: Tensor) -> Tensor:
        keys = [f"convlora.default.{name}" for name in factors_]
        return torch.func.functional_call(layer, dict(zip(keys, values, strict=True)), (x,))

    torch.autograd.gradcheck(output, tuple(factors_.values()), fast_mode=True)


@pytest.mark.parametrize("factors", FACTORS)
def test_factors_are_float32_on_a_half_precision_base(factors: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layer = convlora.inject(nn.Conv2d(8, 8, 3).to(dtype), "*", rank=1, factors=factors)
        assert {p.dtype for p in convlora.parameters(layer)} == {torch.float32}
    layer = convlora.inject(nn.Conv2d(8, 8, 3), "*", rank=1, factors=factors)
    values = [p.clone() for p in convlora.parameters(layer)]
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16
    assert all(torch.equal(p, v) for p, v in zip(convlora.parameters(layer), values, strict=True))


def test_effective_weight_is_rounded_once() -> None:
    layer = randomise(convlora.inject(nn.Conv2d(8, 8, 3).bfloat16(), "*", rank=2))
    low_rank = slot_of(layer).low_rank("default")
    exact = layer._parameters["weight"].float() + low_rank()
    assert torch.equal(layer.weight, exact.bfloat16())


def test_class_stays_a_subclass_with_all_attributes() -> None:
    layer = convlora.inject(nn.Conv2d(4, 6, 3, stride=2, padding=1, bias=False), "*", rank=1)
    assert isinstance(layer, nn.Conv2d)
    assert type(layer).__module__ == "torch.nn.modules.conv"
    assert (layer.stride, layer.in_channels, layer.bias) == ((2, 2), 4, None)
    with pytest.raises(AttributeError, match="no attribute 'no_such'"):
        _ = layer.no_such


def test_calling_the_class_of_a_layer_makes_a_stock_layer() -> None:
    layer = convlora.inject(nn.Sequential(nn.Conv2d(3, 8, 3)), ["0"], rank=1)[0]
    made = type(layer)(8, 4, kernel_size=1, bias=False)
    assert type(made) is nn.Conv2d
    assert made.weight.shape == (4, 8, 1, 1)
    assert type(copy.copy(layer)) is type(layer)


def test_weight_is_the_parameter_itself_without_active_adapter() -> None:
    layer = convlora.inject(nn.Conv2d(4, 6, 3), "*", rank=1, bias=True)
    assert layer.weight is not layer._parameters["weight"]
    convlora.activate(layer, [])
    assert layer.weight is layer._parameters["weight"]
    assert layer.bias is layer._parameters["bias"]


def test_memory_format_of_the_weight_is_kept() -> None:
    layer = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
    stride = layer.weight.stride()
    assert convlora.inject(layer, "*", rank=1).weight.stride() == stride
    assert convlora.merge(layer).weight.stride() == stride


def test_remove_restores_the_layer_exactly() -> None:
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.requires_grad_(False)
    layer.extra = "mine"
    before, order = snapshot(layer), list(layer.__dict__)
    convlora.remove(randomise(convlora.inject(layer, "*", rank=1)))
    assert snapshot(layer) == before
    assert list(layer.__dict__) == order
    assert type(layer) is nn.Conv2d
    assert layer.bias.requires_grad
    assert not layer.weight.requires_grad


def test_class_cache_does_not_keep_classes_alive() -> None:
    class Mine(nn.Conv2d):
        pass

    layer = convlora.inject(Mine(4, 6, 3), "*", rank=1)
    assert type(layer) is type(convlora.inject(Mine(4, 6, 3), "*", rank=1))
    dead = weakref.ref(Mine)
    del Mine, layer
    gc.collect()
    assert dead() is None


def test_error_inside_the_getter_is_not_swallowed() -> None:
    layer = convlora.inject(nn.Conv2d(4, 6, 3), "*", rank=1)
    slot_of(layer).active = ("gone",)
    with pytest.raises((RuntimeError, KeyError)):
        _ = layer.weight
    del slot_of(layer).active
    with pytest.raises(RuntimeError, match="weight cannot be formed"):
        _ = layer.weight


def test_setting_a_new_parameter_replaces_the_base() -> None:
    layer = convlora.activate(convlora.inject(nn.Conv2d(4, 6, 3), "*", rank=1), [])
    fresh = nn.Parameter(torch.ones(6, 4, 3, 3))
    layer.weight = fresh
    assert layer._parameters["weight"] is fresh
    assert torch.equal(layer.weight, fresh)


def test_reset_parameters_reaches_the_base_while_an_adapter_acts() -> None:
    layer = convlora.inject(nn.Conv2d(4, 6, 3), "*", rank=1)
    before = layer._parameters["weight"].clone()
    layer.reset_parameters()
    assert not torch.equal(layer._parameters["weight"], before)
    assert layer.weight.requires_grad


# --- layers that compute their weight, or use it in their own way ----------------------------------------------


def old_weight_norm(layer: nn.Module) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(layer)


NORMS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "legacy_weight_norm": old_weight_norm,
    "legacy_spectral_norm": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("norm", NORMS)
def test_normed_layers_adapt_train_merge_and_come_back(norm: str, factors: str) -> None:
    layer = NORMS[norm](nn.Conv2d(6, 8, 3)).eval()
    x = torch.randn(2, 6, 9, 9)
    before, state, kind = layer(x), bits(layer), type(layer)
    convlora.inject(layer, "*", rank=2, factors=factors)
    assert torch.equal(layer(x), before)
    assert bits(layer).items() >= state.items()
    adapted = randomise(layer)(x)
    assert not torch.allclose(adapted, before, atol=1e-2)
    adapted.sum().backward()
    assert all(p.grad is not None for p in convlora.parameters(layer))
    torch.testing.assert_close(convlora.merge(layer)(x), adapted)
    convlora.unmerge(layer)
    torch.testing.assert_close(layer(x), adapted)
    convlora.remove(layer)
    assert type(layer) is kind
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("norm", NORMS)
def test_removing_merged_adapters_bakes_a_norm_in(norm: str) -> None:
    model = nn.Sequential(NORMS[norm](nn.Conv2d(6, 8, 3))).eval()
    x = torch.randn(2, 6, 9, 9)
    adapted = randomise(convlora.inject(model, "*", rank=2))(x)
    convlora.merge(model)
    with pytest.warns(convlora.ConvLoRAWarning, match="the norm of 1 weights was baked in"):
        convlora.remove(model)
    assert list(model.state_dict()) in (["0.weight", "0.bias"], ["0.bias", "0.weight"])
    assert type(model[0]) is nn.Conv2d
    torch.testing.assert_close(model(x), adapted)


def test_baking_a_norm_into_one_copy_leaves_the_others_alone() -> None:
    """Copies of a parametrized layer share its class, from which torch takes the property away."""
    model = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(6, 8, 3))).eval()
    randomise(convlora.inject(model, "*", rank=2))
    twin, x = copy.deepcopy(model), torch.randn(2, 6, 9, 9)
    adapted = model(x)
    with pytest.warns(convlora.ConvLoRAWarning, match="baked in"):
        convlora.remove(convlora.merge(twin))
    assert torch.equal(model(x), adapted)
    assert torch.equal(convlora.remove(model)(x), copy.deepcopy(model)(x))


@pytest.mark.parametrize("norm", NORMS)
def test_looking_at_a_normed_layer_in_train_mode_moves_no_buffer(norm: str, tmp_path: Any) -> None:
    """Reading a spectrally normed weight in train mode takes a step of the power iteration."""
    model = nn.Sequential(NORMS[norm](nn.Conv2d(6, 8, 3))).train()
    before = bits(model)
    with pytest.raises(convlora.ConvLoRAError):
        convlora.inject(model, ["0", "typo"])
    convlora.inject(model, "0", rank=1)
    convlora.save(convlora.unmerge(convlora.merge(model)), tmp_path / "a.safetensors")
    convlora.summary(model)
    convlora.remove(model)
    assert bits(model) == before
    assert all(module.training for module in model.modules())
    convlora.load(model, tmp_path / "a.safetensors")


class Standardised(nn.Conv2d):
    """A convolution with weight standardisation (Qiao et al. 2019)."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, w, self.bias)


class Same(nn.Conv2d):
    """A convolution that pads by itself, as TensorFlow's "same"."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (-(-n // s) for n, s in zip(x.shape[-2:], self.stride, strict=True))
        pads = [
            max((n - 1) * s + k - m, 0)
            for n, s, k, m in zip((rows, columns), self.stride, self.kernel_size, x.shape[-2:], strict=True)
        ]
        x = nn.functional.pad(x, [pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2])
        return nn.functional.conv2d(x, self.weight, self.bias, self.stride)


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("kind", [Standardised, Same])
def test_subclasses_with_their_own_forward(kind: Any, factors: str) -> None:
    layer, x = kind(6, 8, 3, stride=2), torch.randn(2, 6, 9, 9)
    before = layer(x)
    convlora.inject(layer, "*", rank=2, factors=factors)
    assert torch.equal(layer(x), before)
    adapted = randomise(layer)(x)
    assert torch.equal(stock(layer)(x), adapted)
    assert not torch.allclose(adapted, before, atol=1e-2)
    assert torch.equal(convlora.remove(convlora.merge(layer))(x), adapted)
    assert type(layer) is kind


# --- copies ----------------------------------------------------------------------------------------------------


def test_deepcopy_is_independent_and_equal() -> None:
    layer = randomise(convlora.inject(nn.Conv2d(6, 8, 3), "*", rank=2))
    twin, x = copy.deepcopy(layer), torch.randn(1, 6, 5, 5)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), layer(x))
    randomise(twin)
    assert not torch.equal(twin(x), layer(x))
    assert torch.equal(copy.deepcopy(convlora.merge(layer))(x), layer(x))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickle_by_every_protocol(protocol: int) -> None:
    layer, x = randomise(convlora.inject(nn.Conv2d(6, 8, 3), "*", rank=2)), torch.randn(1, 6, 5, 5)
    assert torch.equal(pickle.loads(pickle.dumps(layer, protocol))(x), layer(x))
    buffer = io.BytesIO()
    torch.save(convlora.merge(layer), buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), layer(x))


# --- rank dropout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", FACTORS)
def test_rank_dropout_drops_whole_components_and_keeps_the_mean(factors: str) -> None:
    layer = convlora.inject(nn.Conv2d(6, 8, 3), "*", rank=2, factors=factors, rank_dropout=0.5)
    randomise(layer)
    base = layer._parameters["weight"]
    full = layer.eval().weight - base
    parts = []
    low_rank = slot_of(layer).low_rank("default")
    for keep in ([0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]):
        dropped = low_rank.factorization.drop(low_rank.factors(), torch.tensor(keep))
        parts.append(update_of(low_rank.factorization, dropped, low_rank.spec, 1.0, base))
    if factors != "dora":  # whose norm is not linear
        torch.testing.assert_close(parts[1] + parts[2], 2 * full)
    layer.train()
    possible = parts if rank_counts(factors) else [parts[0], parts[3]]
    seen = set()
    for _ in range(60):
        now = layer.weight - base
        hits = [i for i, p in enumerate(possible) if torch.allclose(now, p, atol=1e-5)]
        assert len(hits) == 1
        seen.add(hits[0])
    assert seen == {*range(len(possible))}


def rank_counts(factors: str) -> bool:
    """Whether the factors of a `Conv2d(6, 8, 3)` of rank 2 have components; a ΔW that is one tensor is one itself."""
    return factors not in ("dense", "lokr")
