"""Factors whose update depends on the base weight: DoRA, and what a user registers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import LAYERS, NET_INPUT, NET_LAYERS, adapted_net, bits, build, change, net, randomise, snapshot
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import convlora
from convlora import Adapter
from convlora.factors.base import WeightSpec
from convlora.layer.adapted import slot_of, weight_spec

quiet = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")
DORA = ["dora", "dora_in"]


def naive(layer: nn.Module, name: str = "default") -> Tensor:
    """The change of an adapter of strength 1, in float64."""
    low_rank = slot_of(layer).low_rank(name)
    tensors = {n: p.detach() for n, p in low_rank.factors().items()}
    return change(low_rank.config.factors, tensors, weight_spec(layer), low_rank.scale, layer._parameters["weight"])  # type: ignore[arg-type]


# --- the change ----------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("strength", [0.5, -1.0, 2.0])
@pytest.mark.parametrize("factors", DORA)
@pytest.mark.parametrize("hazard", LAYERS)
def test_a_strength_scales_the_whole_change(hazard: str, factors: str, strength: float) -> None:
    layer, _ = build(hazard)
    randomise(convlora.inject(layer, "*", rank=2, alpha=3, factors=factors))
    expected = layer._parameters["weight"].double() + strength * naive(layer)
    convlora.activate(layer, {"default": strength})
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(convlora.merge(layer).weight, convlora.unmerge(layer).weight)


@pytest.mark.parametrize("others", ["dora", "locon", "dense"])
def test_of_several_adapters_each_changes_the_base(others: str) -> None:
    layer = nn.Conv2d(6, 8, 3)
    convlora.inject(layer, "*", rank=2, factors="dora", name="rain")
    convlora.inject(layer, "*", rank=1, factors=others, name="snow")
    randomise(layer, "rain")
    randomise(layer, "snow")
    convlora.activate(layer, {"rain": 0.7, "snow": -0.4})
    expected = layer._parameters["weight"].double() + 0.7 * naive(layer, "rain") - 0.4 * naive(layer, "snow")
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-5, atol=1e-5)


def test_beside_a_copy_of_the_weight_the_change_is_that_of_the_base() -> None:
    layer = nn.Conv2d(6, 8, 3)
    model = convlora.inject(nn.Sequential(layer, nn.Conv2d(8, 4, 1)), "0", rank=2, factors="dora", name="rain")
    convlora.inject(model, "1", rank=1, modules_to_save="0", name="snow")
    randomise(model, "rain")
    with torch.no_grad():
        slot_of(layer).copies()["snow"].tensors()["weight"].normal_()
    copied = slot_of(layer).copies()["snow"].tensors()["weight"].detach().double()
    convlora.activate(model, ["rain", "snow"])
    torch.testing.assert_close(layer.weight.double(), copied + naive(layer, "rain"), rtol=1e-5, atol=1e-5)


def test_the_change_is_computed_in_float32_and_rounded_once() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        layer = randomise(convlora.inject(nn.Conv2d(6, 8, 3).to(dtype), "*", rank=2, factors="dora"))
        wide = randomise(convlora.inject(nn.Conv2d(6, 8, 3), "*", rank=2, factors="dora"))
        with torch.no_grad():
            wide._parameters["weight"].copy_(layer._parameters["weight"])
            for mine, other in zip(convlora.parameters(wide), convlora.parameters(layer), strict=True):
                mine.copy_(other)
        torch.testing.assert_close(layer.weight, wide.weight.to(dtype), rtol=0, atol=0)


def test_an_exact_merge_is_the_nearest_value() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = randomise(convlora.inject(nn.Conv2d(6, 8, 3).to(dtype), "*", rank=2, alpha=3, factors="dora"))
        base = layer._parameters["weight"].detach().double()
        tensors = {name: p.detach().double() for name, p in slot_of(layer).low_rank("default").factors().items()}
        direction = base + 1.5 * (tensors["lora_B"].flatten(1) @ tensors["lora_A"].flatten(1)).view_as(base)
        norm = direction.flatten(1).norm(dim=1)
        exact = (tensors["lora_magnitude"] / norm).view(-1, 1, 1, 1) * direction
        merged = convlora.merge(layer, exact=True).weight
        step = torch.finfo(dtype).eps / 2
        assert bool(((merged.double() - exact).abs() <= step * exact.abs() * (1 + 1e-6)).all())


def test_weights_that_a_layer_computes_are_what_is_changed() -> None:
    x = torch.randn(2, 6, 9, 9)
    for made in (
        parametrizations.weight_norm(nn.Conv2d(6, 8, 3)),
        prune.l1_unstructured(nn.Conv2d(6, 8, 3), "weight", 0.5),
    ):
        plain = nn.Conv2d(6, 8, 3)
        with torch.no_grad():
            plain.weight.copy_(made.weight)  # type: ignore[operator, arg-type]
            plain.bias.copy_(made.bias)  # type: ignore[operator, arg-type, union-attr]
        before = made(x)
        for layer in (made, plain):
            torch.manual_seed(0)
            convlora.inject(layer, "*", rank=2, factors="dora")  # type: ignore[type-var]
        assert torch.equal(made(x), before)
        torch.manual_seed(0)
        randomise(made)
        torch.manual_seed(0)
        randomise(plain)
        mask = made._buffers.get("weight_mask")
        expected = plain.weight if mask is None else plain.weight * mask
        torch.testing.assert_close(made.weight, expected)


# --- the start -----------------------------------------------------------------------------------------------------


def doubled(model: nn.Module) -> nn.Module:
    return model.double()


def halved(model: nn.Module) -> nn.Module:
    return model.bfloat16()


def last(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def same(model: nn.Module) -> nn.Module:
    return model


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("moved", [doubled, halved, last, same])
@pytest.mark.parametrize("factors", DORA)
def test_the_start_changes_nothing_in_whatever_dtype_and_order_the_norm_is_summed(
    factors: str, moved: Callable[[nn.Module], nn.Module], exact: bool
) -> None:
    """The magnitude is rounded to float32 in one way, the norm of the moved weight in another."""
    base = nn.Sequential(nn.Conv2d(64, 48, 3), nn.Flatten(), nn.Linear(192, 130)).eval()
    model = convlora.inject(copy.deepcopy(base), "*", rank=2, factors=factors)
    model, base = moved(model), moved(base)
    x = torch.randn(2, 64, 4, 4).to(base[0].weight.dtype)  # type: ignore[arg-type]
    assert torch.equal(model(x), base(x))
    assert torch.equal(convlora.merge(model, exact=exact)(x), base(x))


def test_a_compiled_start_changes_nothing() -> None:
    base = nn.Sequential(nn.Conv2d(64, 48, 3), nn.Flatten(), nn.Linear(192, 130)).eval()
    model = convlora.inject(copy.deepcopy(base), "*", rank=2, factors="dora")
    for index in (0, 2):
        weight = torch.compile(lambda layer: layer.weight * 1.0, fullgraph=True)(model[index])
        assert torch.equal(weight, base[index].weight)  # type: ignore[arg-type]


def test_a_base_that_comes_after_inject_is_started_on_and_one_after_training_is_not() -> None:
    base, other = net().eval(), net().eval()
    x = torch.randn(NET_INPUT)
    model = convlora.inject(copy.deepcopy(base), NET_LAYERS, rank=1, factors="dora")
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x), other(x))
    model.load_state_dict(base.state_dict(), assign=True)
    assert torch.equal(model(x), base(x))
    model[0].reset_parameters()  # type: ignore[operator]
    assert torch.equal(model[0].weight, dict(model.named_parameters())["0.weight"])
    trained = [p.detach().clone() for p in convlora.parameters(randomise(model))]
    model.load_state_dict(other.state_dict())
    assert all(torch.equal(p, q) for p, q in zip(convlora.parameters(model), trained, strict=True))


def test_projections_of_attention_are_started_on_their_base_too() -> None:
    first, other = (nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
    x = torch.randn(2, 5, 8)
    before = first(x, x, x)[0]
    model = convlora.inject(copy.deepcopy(first), "in_proj", rank=2, factors="dora")
    assert torch.equal(model(x, x, x)[0], before)
    model.load_state_dict(other.state_dict())
    assert torch.equal(model(x, x, x)[0], other(x, x, x)[0])
    adapted = randomise(model)(x, x, x)[0]
    assert not torch.allclose(adapted, other(x, x, x)[0], atol=1e-2)
    fresh = copy.deepcopy(other)
    fresh.load_state_dict(convlora.adapter(model).apply_to(other.state_dict()))
    assert torch.equal(fresh(x, x, x)[0], adapted)
    assert torch.equal(convlora.load(copy.deepcopy(other), convlora.adapter(model))(x, x, x)[0], adapted)


def test_a_meta_model_starts_once_its_base_has_values() -> None:
    base = net().eval()
    with torch.device("meta"):
        model = net().eval()
    convlora.inject(model, NET_LAYERS, rank=1, factors="dora")
    model.to_empty(device="cpu")
    assert model[0].convlora.default.lora_magnitude.isnan().all()  # type: ignore[union-attr]
    with pytest.raises(convlora.ConvLoRAError, match="non-finite"):
        convlora.adapter(model)
    model.load_state_dict(base.state_dict())
    x = torch.randn(NET_INPUT)
    assert torch.equal(model(x), base(x))
    trained = randomise(copy.deepcopy(model))
    with torch.device("meta"):
        model = net().eval()
    convlora.inject(model, NET_LAYERS, rank=1, factors="dora")
    model.load_state_dict(trained.state_dict(), assign=True)
    assert torch.equal(model(x), trained(x))


# --- adapters as values --------------------------------------------------------------------------------------------


def test_what_needs_an_update_without_its_base_says_so() -> None:
    model = adapted_net(factors="dora", rank=1)
    adapter, plain = convlora.adapter(model), convlora.adapter(adapted_net(factors="locon", rank=1))
    base = net().state_dict()
    calls: dict[str, Callable[[], Any]] = {
        r"Adapter\.delta\('0'\) without weight=": lambda: adapter.delta("0"),
        r"Adapter\.combine": lambda: Adapter.combine([adapter, adapter], [0.5, 0.5]),
        r"Adapter\.resize": lambda: adapter.resize(rank=1),
        r"Adapter\.refactor": lambda: adapter.refactor("locon"),
        r"Adapter\.extract": lambda: Adapter.extract(base, net().state_dict(), rank=1, factors="dora"),
    }
    for operation, call in calls.items():
        with pytest.raises(
            convlora.ConvLoRAError, match=f"{operation}: the update of 'dora' factors depends on the base"
        ):
            call()
    with pytest.raises(convlora.ConvLoRAError, match="give its class a method 'fit'"):
        plain.refactor("dora")
    with pytest.raises(convlora.ConvLoRAError, match=r"weight \(2, 2\) instead of \(8, 3, 3, 3\) of '0'"):
        adapter.delta("0", torch.zeros(2, 2))
    assert adapter.refactor("dora") is adapter


def test_the_remedy_of_these_errors_works() -> None:
    model = adapted_net(factors="dora", rank=1, targets=["0", "3", "6"]).eval()
    base = {key: value for key, value in model.state_dict().items() if ".convlora." not in key}
    merged = convlora.adapter(model).apply_to(base)
    found = Adapter.extract(base, merged, energy=1, factors="dense")
    x = torch.randn(NET_INPUT)
    fresh = net().eval()
    fresh.load_state_dict(base)
    specs = convlora.formats.specs_of(fresh)
    found = Adapter.extract(base, merged, energy=1, factors="dense", specs={p: specs[p] for p in ("0", "3", "6")})
    torch.testing.assert_close(convlora.load(fresh, found)(x), model(x), rtol=1e-5, atol=1e-5)


def test_delta_and_apply_to_agree_with_the_model_bitwise() -> None:
    model = adapted_net(factors="dora", rank=2, alpha=3)
    adapter = convlora.adapter(model)
    base = {key: value for key, value in model.state_dict().items() if ".convlora." not in key}
    for path in NET_LAYERS:
        weight = base[f"{path}.weight"]
        assert torch.equal(weight + adapter.delta(path, weight), model[int(path)].weight)
        assert torch.equal(adapter.apply_to(base)[f"{path}.weight"], model[int(path)].weight)
        assert torch.equal(adapter.apply_to(base, 0.0)[f"{path}.weight"], weight)


def test_another_base_is_said_to_change_the_update(tmp_path: Path) -> None:
    convlora.save(adapted_net(factors="dora"), tmp_path / "a.safetensors")
    with pytest.warns(
        convlora.ConvLoRAWarning, match="another base.*the change that 'dora' factors make is another on it"
    ):
        convlora.load(net(), tmp_path / "a.safetensors")


def test_a_narrower_dtype_says_which_tensor_it_loses() -> None:
    model = adapted_net(factors="dora")
    with torch.no_grad():
        slot_of(model[0]).low_rank("default").factors()["lora_A"].mul_(1e-9)
    with pytest.warns(convlora.ConvLoRAWarning, match=r"float16 change '0\.lora_A' by 100\.00% and 1 in all"):
        convlora.adapter(model).to(torch.float16)
    randomise(model)
    convlora.adapter(model).to(torch.float16)  # warnings are errors in tests


def test_a_partial_swap_starts_the_other_layers_anew() -> None:
    model = adapted_net(factors="dora").eval()
    fresh = copy.deepcopy(model)
    adapter = convlora.adapter(model)
    part = Adapter(adapter.config, {"0": adapter.layers["0"]}, adapter.fingerprint)
    with pytest.warns(convlora.ConvLoRAWarning, match="left out what does not fit"):
        convlora.load(fresh, part, strict=False)
    assert torch.equal(fresh[0].weight, model[0].weight)
    for path in NET_LAYERS[1:]:
        assert torch.equal(fresh[int(path)].weight, fresh[int(path)]._parameters["weight"])  # type: ignore[arg-type]


def test_allocated_ranks_serve_dora() -> None:
    model, batches = net().train(), [torch.randn(NET_INPUT) for _ in range(3)]
    before = snapshot(model)
    ranks = convlora.allocate_ranks(
        model, "*", budget=200, batches=batches, loss=lambda m, x: m(x).square().mean(), factors="dora"
    )
    assert snapshot(model) == before
    injected = convlora.inject(model, "*", ranks=ranks, rank=0, factors="dora")
    assert 0 < convlora.summary(injected).trainable <= 200
    for factors in ("loha", "lokr", "dense"):
        with pytest.raises(convlora.ConvLoRAError, match=f"the rank of '{factors}' factors counts no components"):
            convlora.allocate_ranks(
                net(), "*", budget=200, batches=batches, loss=lambda m, x: m(x).square().mean(), factors=factors
            )


# --- compiled, and what users register -----------------------------------------------------------------------------


def test_strengths_and_scales_inside_recompile_nothing() -> None:
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Tensor]:
        graphs.append(1)
        return graph.forward

    model = adapted_net(factors="dora", alpha=1).eval()
    other = randomise(
        convlora.inject(convlora.remove(copy.deepcopy(model)), NET_LAYERS, rank=1, alpha=7, factors="dora")
    )
    compiled, x = torch.compile(model, backend=backend, fullgraph=True), torch.randn(NET_INPUT)
    torch.testing.assert_close(compiled(x), model(x))
    convlora.activate(model, {"default": 0.3})
    torch.testing.assert_close(compiled(x), model(x))
    convlora.load(model, convlora.adapter(other))
    convlora.activate(model, "default")
    torch.testing.assert_close(compiled(x), other(x))
    assert len(graphs) == 1


def test_gradients_per_sample_and_of_a_functional_call() -> None:
    model, x = adapted_net(factors="dora").eval(), torch.randn(NET_INPUT)
    values = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (sample[None],)).square().sum()  # type: ignore[no-any-return]

    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(values, x)
    for i, sample in enumerate(x):
        model.zero_grad()
        loss(dict(model.named_parameters()), sample).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                torch.testing.assert_close(per_sample[name][i], p.grad, rtol=1e-4, atol=1e-4)


class Gated:
    """W' = W · (1 + scale · gate), one gate for each output channel: an update that is nothing without its weight."""

    inits: tuple[str, ...] = ("default",)
    needs_weight = True

    def shapes(self, spec: WeightSpec, rank: int) -> dict[str, tuple[int, ...]]:
        return {"gate": (spec.out_channels, rank)}

    def init_(self, factors: Mapping[str, Tensor], method: str, weight: Tensor) -> None:
        nn.init.zeros_(factors["gate"])

    def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec, weight: Tensor, scale: float | Tensor) -> Tensor:
        return weight * (scale * factors["gate"].sum(1)).view(-1, *[1] * (weight.dim() - 1))

    def drop(self, factors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
        return {"gate": factors["gate"] * keep}


convlora.register_factors("test-gated", Gated)


@quiet
@pytest.mark.parametrize("hazard", LAYERS)
def test_a_registered_factorization_sees_the_weight_in_convolution_order(hazard: str, tmp_path: Path) -> None:
    layer, x = build(hazard)
    before, state = layer(x), bits(layer)
    convlora.inject(layer, "*", rank=2, alpha=4, factors="test-gated")
    assert torch.equal(layer(x), before)
    gate = randomise(layer).convlora.default.gate
    spec = weight_spec(layer)
    base = layer._parameters["weight"].detach()
    wide = (1 + 2 * gate.sum(1)).view(-1, *[1] * (base.dim() - 1))
    torch.testing.assert_close(layer.weight, spec.from_convolution(spec.to_convolution(base) * wide))
    y = layer(x)
    convlora.save(layer, tmp_path / "a.safetensors")
    convlora.remove(layer)
    assert bits(layer) == state
    assert torch.equal(convlora.load(layer, tmp_path / "a.safetensors")(x), y)
