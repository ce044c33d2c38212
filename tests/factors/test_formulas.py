"""The factorizations beside those of the libraries from which they come: values and gradients."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from oracle import LAYERS, build, randomise
from torch import Tensor, nn

import convlora
from convlora.factors.base import WeightSpec, get_factors, update_of
from convlora.factors.dora import ROUNDING
from convlora.layer.adapted import slot_of, weight_spec

quiet = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


@pytest.fixture(scope="module")
def lycoris() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("lycoris")


MADE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 36), (5, 24)),
    "conv2d": (lambda: nn.Conv2d(12, 36, 3, stride=2, padding=1), (2, 12, 8, 8)),
    "pointwise": (lambda: nn.Conv2d(12, 36, 1, bias=False), (2, 12, 8, 8)),
    "conv1d": (lambda: nn.Conv1d(12, 36, 5), (2, 12, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, (1, 2, 3)), (2, 4, 4, 4, 4)),
}


def double_factors(layer: nn.Module) -> dict[str, Tensor]:
    low_rank = slot_of(layer).low_rank("default")
    for name, p in low_rank.factors().items():
        low_rank._parameters[name] = nn.Parameter(p.detach().double())
    return low_rank.factors()


def results(layer: nn.Module, x: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of what is wanted."""
    x = x.clone().requires_grad_()
    y = layer(x)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return {"y": y.detach(), **dict(zip(["x", *wanted], torch.autograd.grad(loss, [x, *wanted.values()]), strict=True))}


# --- DoRA ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", MADE)
def test_dora_has_the_outputs_and_gradients_of_peft(made: str, peft: Any) -> None:
    make, shape = MADE[made]
    base, x = nn.Sequential(make().double()), torch.randn(shape, dtype=torch.float64)
    config = peft.LoraConfig(target_modules=["0"], r=3, lora_alpha=5, use_dora=True, init_lora_weights=False)
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(base)).double()[0]
    ours = convlora.inject(copy.deepcopy(base), "0", rank=3, alpha=5, factors="dora")[0]
    values = {
        "lora_A": theirs.lora_A.default.weight,
        "lora_B": theirs.lora_B.default.weight,
        "lora_magnitude": theirs.lora_magnitude_vector.default.weight,
    }
    with torch.no_grad():
        values["lora_magnitude"] *= torch.linspace(0.5, 2, 36 if made != "conv3d" else 6).view_as(
            values["lora_magnitude"]
        )
        for name, p in double_factors(ours).items():
            p.copy_(values[name].reshape(p.shape))
    expected, found = results(theirs, x, values), results(ours, x, slot_of(ours).low_rank("default").factors())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value.reshape(found[name].shape), rtol=1e-9, atol=1e-9)


@quiet
@pytest.mark.parametrize("factors", ["dora", "dora_in"])
@pytest.mark.parametrize("hazard", LAYERS)
def test_the_norm_counts_as_constant_in_backward(hazard: str, factors: str) -> None:
    """The gradients of every layer type are those of the formula written out, its norm detached."""
    layer, x = build(hazard, torch.float64)
    base = layer.weight.detach().clone()
    randomise(convlora.inject(layer, "*", rank=2, alpha=3, factors=factors))
    tensors, spec = double_factors(layer), weight_spec(layer)
    found = results(layer, x, tensors)

    def written_out() -> Tensor:
        direction = spec.to_convolution(base) + 1.5 * get_factors("locon").delta(tensors, spec).view(
            spec.to_convolution(base).shape
        )
        side = 0 if factors == "dora" else 1
        others = [dim for dim in range(direction.dim()) if dim != side]
        norm = direction.square().sum(others, keepdim=True).sqrt().detach()
        return spec.from_convolution(tensors["lora_magnitude"].view_as(norm) * direction / norm)

    plain = copy.deepcopy(convlora.remove(copy.deepcopy(layer)))
    del plain._parameters["weight"]
    plain.weight = written_out()  # type: ignore[assignment]
    expected = results(plain, x, tensors)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


def test_dora_by_input_channel_is_that_of_lycoris(lycoris: Any) -> None:
    from lycoris.functional.general import weight_decompose

    for spec in (WeightSpec((8, 6, 3, 3)), WeightSpec((8, 6)), WeightSpec((8, 3, 5), groups=2)):
        weight = torch.randn(spec.shape, dtype=torch.float64)
        for factors, on_out in (("dora", True), ("dora_in", False)):
            factorization = get_factors(factors)
            shapes = factorization.shapes(spec, 2)
            tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
            direction = weight + 0.7 * get_factors("locon").delta(tensors, spec).view(spec.shape)
            magnitude = tensors["lora_magnitude"].view([-1 if d == int(not on_out) else 1 for d in range(weight.dim())])
            expected = weight_decompose(direction, magnitude, 1, on_out)
            found = weight + update_of(factorization, tensors, spec, 0.7, weight)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_a_channel_of_zeros_has_no_nan_and_trains() -> None:
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(2, 4, 7, 7)
    with torch.no_grad():
        layer.weight[2] = 0
    before = layer(x)
    convlora.inject(layer, "*", rank=2, factors="dora")
    assert torch.equal(layer(x), before)
    optimizer = torch.optim.SGD(convlora.parameters(layer), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(x)[:, 2].sub(1).square().mean().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in convlora.parameters(layer))
        optimizer.step()
    assert layer.weight[2].ne(0).any()
    assert torch.equal(layer.weight[0], layer._parameters["weight"][0])


def test_a_magnitude_is_the_norm_up_to_rounding_alone() -> None:
    """Beyond that it scales the channel, however little, and its gradient is the same on both sides."""
    spec, weight = WeightSpec((3, 50)), torch.randn(3, 50, dtype=torch.float64)
    factorization = get_factors("dora")
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in factorization.shapes(spec, 1).items()}
    norm = weight.norm(dim=1)
    tensors["lora_magnitude"] = (norm * torch.tensor([1 + ROUNDING / 2, 1, 1 - 2 * ROUNDING])).requires_grad_()
    change = update_of(factorization, tensors, spec, 1.0, weight)
    assert not change[:2].any()
    torch.testing.assert_close(change[2], -2 * ROUNDING * weight[2], rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad((change * weight).sum(), tensors["lora_magnitude"])
    torch.testing.assert_close(gradient, norm)


# --- LoHa and LoKr ---------------------------------------------------------------------------------------------------

SHARED = [name for name in MADE if name != "conv3d"]


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("made", SHARED)
def test_products_have_the_tensors_outputs_and_gradients_of_peft(made: str, kind: str, rank: int, peft: Any) -> None:
    if (made, kind, rank) == ("conv1d", "lokr", 8):
        pytest.skip("PEFT multiplies a matrix and a whole 1d kernel as if the kernel came first")
    make, shape = MADE[made]
    base, x = nn.Sequential(make().double()), torch.randn(shape, dtype=torch.float64)
    make_config = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}[kind]
    config = make_config(target_modules=["0"], r=rank, alpha=3, init_weights=False)
    theirs = peft.inject_adapter_in_model(config, copy.deepcopy(base)).double()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convlora.ConvLoRAWarning)
        ours = convlora.inject(copy.deepcopy(base), "0", rank=rank, alpha=3, factors=kind)[0]
    tensors = double_factors(ours)
    start = {"loha": "hada_", "lokr": "lokr_"}[kind]
    values = {n.rpartition(".default")[0]: p for n, p in theirs.named_parameters() if n.startswith(start)}
    assert {name: tuple(p.shape) for name, p in values.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    with torch.no_grad():
        for name, p in tensors.items():
            p.copy_(values[name])
    expected, found = results(theirs, x, values), results(ours, x, tensors)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("kind", ["loha", "lokr"])
@pytest.mark.parametrize("made", MADE)
def test_products_have_the_tensors_and_updates_of_lycoris(made: str, kind: str, rank: int, lycoris: Any) -> None:
    layer = MADE[made][0]()
    module = getattr(lycoris, {"loha": "LohaModule", "lokr": "LokrModule"}[kind])
    theirs = module("layer", layer, 1.0, rank, alpha=3)
    spec = weight_spec(layer)
    factorization = get_factors(kind)
    start = {"loha": "hada_", "lokr": "lokr_"}[kind]
    values = {name: p.detach().normal_() for name, p in theirs.named_parameters() if name.startswith(start)}
    numbers = {name: p.numel() for name, p in values.items()}
    shapes = factorization.shapes(spec, rank)
    assert numbers == {name: torch.empty(shape).numel() for name, shape in shapes.items()}
    tensors = {name: value.reshape(shapes[name]) for name, value in values.items()}
    with torch.no_grad():
        expected = theirs.get_weight(spec.shape)
    torch.testing.assert_close(update_of(factorization, tensors, spec) * theirs.scale, expected.view(spec.shape))


def test_lokr_splits_as_lycoris_does(lycoris: Any) -> None:
    from lycoris.functional.general import factorization

    from convlora.factors.lokr import split

    for size in range(1, 300):
        for factor in (-1, 1, 2, 3, 4, 7, 8, 16):
            assert split(size, factor) == factorization(size, factor)
