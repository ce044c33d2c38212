"""Algebra of adapters: every law against dense updates in float64."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import NET_INPUT, PRODUCTS, adapted_net, delta, net, randomise
from strategies import specs
from torch import Tensor, nn

import convlora
from convlora import Adapter, AdapterConfig
from convlora.adapter.parts import LayerFactors
from convlora.factors.base import WeightSpec, get_factors, register_factors

SPECS = {
    "a": WeightSpec((8, 6, 3, 3)),
    "b": WeightSpec((6, 3, 3, 3), groups=2),
    "c": WeightSpec((6, 4, 2, 3), transposed=True),
    "d": WeightSpec((5, 7)),
    "e": WeightSpec((4, 3, 5)),
    "f": WeightSpec((4, 6, 1, 1)),
}
ranks, numbers = st.integers(1, 3), st.floats(-3, 3)


def make(
    factors: str,
    sizes: Mapping[str, int],
    *,
    alpha: float | None = None,
    scaling: str = "linear",
    dtype: torch.dtype = torch.float64,
    bias: bool = False,
    shapes: Mapping[str, WeightSpec] = SPECS,
) -> Adapter:
    """An adapter with random factors of these ranks."""
    layers = {}
    for path, rank in sizes.items():
        spec = shapes[path]
        tensors = {n: torch.randn(s, dtype=dtype) for n, s in get_factors(factors).shapes(spec, rank).items()}
        if bias:
            tensors["lora_bias"] = torch.randn(spec.out_channels, dtype=dtype)
        layers[path] = LayerFactors(tensors, spec, rank, rank if alpha is None else alpha)
    return Adapter(AdapterConfig(targets="*", factors=factors, rank_scaling=scaling, bias=bias), layers)


def dense(adapter: Adapter, path: str) -> Tensor:
    """ΔW element by element, with its scale; zeros where the adapter has no such layer."""
    if path not in adapter.layers:
        return torch.zeros(SPECS[path].shape, dtype=torch.float64)
    layer = adapter.layers[path]
    return delta(adapter.config.factors, dict(layer.tensors), layer.spec) * adapter.config.scale(
        layer.rank, layer.alpha
    )


def matrix(factors: str, update: Tensor, spec: WeightSpec) -> Tensor:
    """The matrix that the factorization approximates, from a dense update as the layer stores it."""
    rows = get_factors(factors).shapes(spec, 1)["lora_B"][0]
    return spec.to_convolution(update).reshape(rows, -1)


def bitwise(one: Adapter, other: Adapter) -> bool:
    """The same layers, tensors, ranks and scales."""
    return list(one.layers) == list(other.layers) and all(
        (a.spec, a.rank, a.aliases) == (b.spec, b.rank, b.aliases)
        and one.config.scale(a.rank, a.alpha) == other.config.scale(b.rank, b.alpha)
        and a.tensors.keys() == b.tensors.keys()
        and all(torch.equal(a.tensors[n], b.tensors[n]) and a.tensors[n].dtype == b.tensors[n].dtype for n in a.tensors)
        for a, b in zip(one.layers.values(), other.layers.values(), strict=True)
    )


# --- combine ---------------------------------------------------------------------------------------------------------


@given(st.sampled_from(PRODUCTS), ranks, ranks, numbers, numbers, numbers)
def test_combine_is_the_weighted_sum_of_dense_updates(
    factors: str, r: int, q: int, v: float, w: float, alpha: float
) -> None:
    one = make(factors, {"a": r, "b": q, "d": 1}, alpha=alpha, bias=True)
    two = make(factors, {"b": r, "c": q, "d": 2}, scaling="sqrt")
    both = Adapter.combine([one, two], weights=[v, w])
    assert sorted(both.layers) == ["a", "b", "c", "d"]
    for path, layer in both.layers.items():
        expected = v * dense(one, path) + w * dense(two, path)
        torch.testing.assert_close(dense(both, path), expected, rtol=1e-12, atol=1e-12)
        assert layer.rank == sum(adapter.layers[path].rank for adapter in (one, two) if path in adapter.layers)
    for path in ("a", "b", "d"):
        torch.testing.assert_close(both.layers[path].tensors["lora_bias"], v * one.layers[path].tensors["lora_bias"])
    assert "lora_bias" not in both.layers["c"].tensors


@given(st.sampled_from(PRODUCTS), numbers, numbers, numbers)
def test_combine_is_linear_and_associative(factors: str, u: float, v: float, w: float) -> None:
    x, y, z = (make(factors, {"a": 1, "e": 2}) for _ in range(3))
    nested = Adapter.combine([Adapter.combine([x, y], [u, v]), z], [2, w])
    flat = Adapter.combine([x, y, z], [2 * u, 2 * v, w])
    for path in ("a", "e"):
        torch.testing.assert_close(dense(nested, path), dense(flat, path), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("factors", PRODUCTS)
def test_combine_with_weight_one_keeps_every_bit(factors: str) -> None:
    one = make(factors, {"a": 2, "c": 1}, dtype=torch.float32, bias=True)
    assert bitwise(Adapter.combine([one], [1.0]), one)


@pytest.mark.parametrize("factors", PRODUCTS)
def test_combined_adapter_acts_as_both_on_the_model(factors: str) -> None:
    model = net().eval()
    convlora.inject(model, ["0", "3", "6"], rank=2, alpha=3, factors=factors, name="rain", bias=True)
    convlora.inject(model, ["3", "4"], rank=1, factors=factors, name="snow", rank_scaling="sqrt")
    randomise(model, "rain")
    randomise(model, "snow")
    convlora.activate(model, {"rain": 0.7, "snow": -0.4})
    x = torch.randn(NET_INPUT)
    expected = model(x)
    both = Adapter.combine([convlora.adapter(model, "rain"), convlora.adapter(model, "snow")], [0.7, -0.4])
    assert both.config.name == "rain"
    convlora.remove(model)
    torch.testing.assert_close(convlora.load(model, both)(x), expected, rtol=1e-5, atol=1e-6)


def test_combine_takes_a_module_of_several_paths_as_one_layer() -> None:
    def shared() -> nn.Module:
        conv = nn.Conv2d(4, 4, 3, padding=1)
        return randomise(convlora.inject(nn.Sequential(conv, nn.ReLU(), conv), "0", rank=1))

    one = convlora.adapter(shared())
    two = one.layers["0"]
    swapped = Adapter(one.config, {"2": LayerFactors(two.tensors, two.spec, 1, 1.0, ("0",))})
    both = Adapter.combine([one, swapped], [1, 2])
    assert list(both.layers) == ["0"]
    assert both.layers["0"].aliases == ("2",)
    torch.testing.assert_close(both.delta("0"), 3 * one.delta("0"))
    apart = Adapter(
        one.config, {"0": LayerFactors(two.tensors, two.spec, 1, 1.0), "2": LayerFactors(two.tensors, two.spec, 1, 1.0)}
    )
    for order in ([one, apart], [apart, one]):
        with pytest.raises(convlora.ConvLoRAError, match=r"is one module with 0.* in another adapter only"):
            Adapter.combine(order, [1, 1])


def test_combine_keeps_the_fingerprint_only_of_one_base() -> None:
    one = convlora.adapter(adapted_net())
    assert one.fingerprint is not None
    assert Adapter.combine([one, one], [1, 1]).fingerprint == one.fingerprint
    assert Adapter.combine([one, make("convlora", {"a": 1})], [1, 1]).fingerprint is None


def test_combine_says_what_is_wrong() -> None:
    one, other = make("convlora", {"a": 1}), make("locon", {"a": 1})
    with pytest.raises(
        convlora.ConvLoRAError,
        match=r"differ \(convlora, locon\); bring all to one first: adapter\.refactor\('convlora'\)",
    ):
        Adapter.combine([one, other], [1, 1])
    Adapter.combine([one, other.refactor("convlora")], [1, 1])
    for adapters, weights in (([], []), ([one], [1, 2]), ([one], [math.nan]), ([one, "x"], [1, 1])):
        with pytest.raises(convlora.ConvLoRAError, match=r"Adapter\.combine: "):
            Adapter.combine(adapters, weights)  # type: ignore[arg-type]
    odd = make("convlora", {"a": 1}, shapes={"a": WeightSpec((8, 5, 3, 3))})
    with pytest.raises(convlora.ConvLoRAError, match="mismatched: a has weight"):
        Adapter.combine([one, odd], [1, 1])
    large = Adapter.combine([make("convlora", {"a": 1}, dtype=torch.float32, alpha=1e18)], [1e18])
    with pytest.raises(convlora.ConvLoRAError, match=r"non-finite: a\.lora_B"):
        Adapter.combine([large], [1e18])


# --- resize ----------------------------------------------------------------------------------------------------------


@given(st.sampled_from(PRODUCTS), specs(), st.integers(2, 4), st.data())
def test_resize_reaches_the_error_of_eckart_and_young(
    factors: str, spec: WeightSpec, r: int, data: st.DataObject
) -> None:
    small = data.draw(st.integers(1, r))
    adapter = make(factors, {"x": r}, alpha=-2, shapes={"x": spec})
    update = delta(factors, dict(adapter.layers["x"].tensors), spec) * adapter.config.scale(r, -2)
    resized = adapter.resize(rank=small)
    layer = resized.layers["x"]
    step = get_factors(factors).shapes(spec, 1)["lora_A"][0]
    beyond = torch.linalg.svdvals(matrix(factors, update, spec))[small * step :]
    left = update - delta(factors, dict(layer.tensors), spec) * resized.config.scale(layer.rank, layer.alpha)
    torch.testing.assert_close(left.norm(), beyond.norm(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(resized.errors["x"], float(beyond.norm() / update.norm()), rtol=1e-6, atol=1e-9)
    assert layer.rank <= small


@given(st.sampled_from(PRODUCTS))
def test_a_higher_rank_never_has_a_larger_error(factors: str) -> None:
    adapter = make(factors, {"a": 5, "c": 5})
    errors = [adapter.resize(rank=r).errors for r in range(1, 6)]
    for path in ("a", "c"):
        assert all(more[path] <= less[path] for less, more in itertools.pairwise(errors))
        assert errors[-1][path] == 0


@given(st.sampled_from(PRODUCTS), st.floats(0.01, 1))
def test_energy_keeps_its_share_with_the_fewest_components(factors: str, energy: float) -> None:
    adapter = make(factors, dict.fromkeys(SPECS, 4))
    resized = adapter.resize(energy=energy)
    for path, layer in resized.layers.items():
        update, kept = dense(adapter, path), dense(resized, path)
        assert (update - kept).norm() ** 2 <= (1 - energy) * update.norm() ** 2 * (1 + 1e-9) + 1e-20
        if layer.rank > 1 and layer.rank < adapter.layers[path].rank:
            less = adapter.resize(rank=layer.rank - 1)
            assert less.errors[path] ** 2 > 1 - energy


@pytest.mark.parametrize("factors", PRODUCTS)
def test_resize_undoes_a_combination_of_one_adapter_with_itself(factors: str) -> None:
    one = make(factors, {"a": 2, "b": 1, "c": 1, "d": 2}, bias=True)
    lean = Adapter.combine([one, one, one], [0.5, 0.25, 0.25]).resize(energy=1)
    for path, layer in lean.layers.items():
        torch.testing.assert_close(dense(lean, path), dense(one, path), rtol=1e-9, atol=1e-9)
        assert layer.rank == one.layers[path].rank
        assert torch.equal(layer.tensors["lora_bias"], one.layers[path].tensors["lora_bias"])


@pytest.mark.parametrize("factors", PRODUCTS)
def test_resize_leaves_layers_of_lower_rank_bitwise(factors: str) -> None:
    one = make(factors, {"a": 2, "d": 1}, alpha=5, scaling="sqrt", dtype=torch.float32)
    assert bitwise(one.resize(rank=2), one)
    assert bitwise(one.resize(rank=7), one)
    assert one.resize(rank=2).errors == {"a": 0.0, "d": 0.0}
    half = one.resize(rank=1)
    assert torch.equal(half.layers["d"].tensors["lora_A"], one.layers["d"].tensors["lora_A"])
    assert half.layers["a"].tensors["lora_A"].dtype == torch.float32
    assert half.config.scale(1, half.layers["a"].alpha) == 1


def test_a_zero_update_shrinks_to_rank_one() -> None:
    model = convlora.inject(net(), "0", rank=2)
    assert convlora.adapter(model).resize(energy=0.5).layers["0"].rank == 1


@pytest.mark.parametrize(
    "limits",
    [
        {},
        {"rank": 2, "energy": 0.5},
        {"rank": 0},
        {"rank": True},
        {"rank": 1.0},
        {"energy": 0},
        {"energy": 1.1},
        {"energy": math.nan},
    ],
)
def test_resize_needs_one_limit_in_range(limits: dict[str, Any]) -> None:
    with pytest.raises(convlora.ConvLoRAError, match=r"Adapter\.resize: "):
        make("locon", {"a": 1}).resize(**limits)


@pytest.mark.parametrize("factors", PRODUCTS)
def test_config_says_what_the_layers_are(factors: str, tmp_path: Any) -> None:
    """So that `inject(config=...)` gives the same shapes, and a file brings back the same adapter."""
    model = adapted_net(factors=factors, rank=2, ranks={"6": 1}, alphas={"3": 5}, bias=True)
    resized = Adapter.combine([convlora.adapter(model)] * 2, [1, 0.5]).resize(rank=2)
    resized.write(tmp_path / "a.safetensors")
    assert bitwise(Adapter.read(tmp_path / "a.safetensors"), resized)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convlora.ConvLoRAWarning)  # large ranks for small layers
        fresh = convlora.adapter(convlora.inject(net(), config=resized.config))
    for path, layer in resized.layers.items():
        ours, theirs = fresh.layers[path], layer
        assert {n: t.shape for n, t in ours.tensors.items()} == {n: t.shape for n, t in theirs.tensors.items()}
        assert (ours.rank, ours.alpha) == (theirs.rank, theirs.alpha)


# --- refactor --------------------------------------------------------------------------------------------------------


@given(specs(), st.integers(1, 3), st.sampled_from([("convlora", "locon"), ("locon", "convlora")]))
def test_refactor_is_lossless(spec: WeightSpec, r: int, kinds: tuple[str, str]) -> None:
    source, target = kinds
    adapter = make(source, {"x": r}, alpha=1.5, scaling="sqrt", bias=True, shapes={"x": spec})
    other = adapter.refactor(target)
    assert other.config.factors == target
    one, two = adapter.layers["x"], other.layers["x"]
    expected = delta(source, dict(one.tensors), spec) * adapter.config.scale(r, 1.5)
    got = delta(target, dict(two.tensors), spec) * other.config.scale(two.rank, two.alpha)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)
    assert other.errors["x"] < 1e-9
    assert torch.equal(one.tensors["lora_bias"], two.tensors["lora_bias"])
    if source == "convlora" and spec.groups == 1:
        half = len(spec.kernel) // 2
        k_row, k_col = math.prod(spec.kernel[:half]), math.prod(spec.kernel[half:])
        assert two.rank <= k_row * min(k_row, k_col) * r  # k²·r for k×k


@pytest.mark.parametrize("factors", PRODUCTS)
def test_refactor_keeps_plain_lora_bitwise(factors: str) -> None:
    (other,) = set(PRODUCTS) - {factors}
    adapter = make(factors, {"d": 2, "f": 2}, alpha=5, dtype=torch.float32)
    assert bitwise(adapter.refactor(other), adapter)
    assert adapter.refactor(factors) is adapter
    assert adapter.refactor(other, rank=1).layers["d"].rank == 1


def test_refactor_with_a_limit_reports_its_error() -> None:
    adapter = make("locon", {"a": 4})
    other = adapter.refactor("convlora", rank=1)
    left = dense(adapter, "a") - dense(other, "a")
    assert other.layers["a"].rank == 1
    assert 0 < other.errors["a"] < 1
    assert other.errors["a"] == pytest.approx(float(left.norm() / dense(adapter, "a").norm()))
    assert adapter.refactor("locon", rank=1).errors == adapter.resize(rank=1).errors


# --- extract ---------------------------------------------------------------------------------------------------------


def _pair(factors: str = "convlora") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two float64 checkpoints of one architecture, every weight and bias of a conv or Linear tuned."""
    base = net().double().state_dict()
    tuned = {n: t + torch.randn_like(t) if n[0] in "0346" else t.clone() for n, t in base.items()}
    return dict(base), tuned


@pytest.mark.parametrize("factors", PRODUCTS)
def test_extract_at_full_rank_reproduces_the_tuned_checkpoint(factors: str) -> None:
    base, tuned = _pair()
    adapter = Adapter.extract(base, tuned, energy=1, factors=factors)
    applied = adapter.apply_to(base)
    assert list(adapter.layers) == ["0", "3", "4", "6"]
    assert all(error < 1e-9 for error in adapter.errors.values())
    for name, value in tuned.items():
        torch.testing.assert_close(applied[name], value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("factors", PRODUCTS)
def test_extract_finds_the_adapter_that_made_the_checkpoint(factors: str) -> None:
    model = adapted_net(factors=factors, rank=1, targets=["0", "6"], bias=True).double()
    base = {n: t for n, t in model.state_dict().items() if ".convlora." not in n}
    made = convlora.adapter(model)
    found = Adapter.extract(base, made.apply_to(base), rank=1, factors=factors, name="rain")
    assert found.config.name == "rain"
    for path in ("0", "6"):
        torch.testing.assert_close(found.delta(path), made.delta(path), rtol=1e-9, atol=1e-9)
        assert found.errors[path] < 1e-9
        torch.testing.assert_close(found.layers[path].tensors["lora_bias"], made.layers[path].tensors["lora_bias"])


def test_extracted_adapter_loads_onto_a_model_whose_layers_are_told() -> None:
    base, tuned = _pair()
    specs = {"3": WeightSpec((8, 4, 3, 3), groups=2), "4": WeightSpec((8, 6, 2, 2), transposed=True)}
    adapter = Adapter.extract(base, tuned, energy=1, specs=specs)
    model, full = net().double(), net().double()
    model.load_state_dict(base)
    full.load_state_dict(tuned)
    x = torch.randn(NET_INPUT, dtype=torch.float64)
    convlora.load(model, adapter)  # without a warning: the fingerprint is that of this base
    torch.testing.assert_close(model.eval()(x), full.eval()(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(convlora.ConvLoRAError, match=r"mismatched: 3 [^;]*groups 2"):
        convlora.load(net().double(), Adapter.extract(base, tuned, rank=1))


def test_extract_error_is_that_of_each_layer() -> None:
    base, tuned = _pair()
    adapter = Adapter.extract(base, tuned, rank=2, factors="locon")
    for path, layer in adapter.layers.items():
        update = tuned[f"{path}.weight"] - base[f"{path}.weight"]
        assert layer.rank == 2
        assert adapter.errors[path] == pytest.approx(float((update - adapter.delta(path)).norm() / update.norm()))


def test_extract_takes_a_bias_without_its_weight() -> None:
    base, _ = _pair()
    tuned = {**base, "0.bias": base["0.bias"] + 1}
    adapter = Adapter.extract(base, tuned, rank=4)
    assert list(adapter.layers) == ["0"]
    assert torch.equal(adapter.apply_to(base)["0.weight"], base["0.weight"])
    assert torch.equal(adapter.apply_to(base)["0.bias"], tuned["0.bias"])


@pytest.mark.parametrize("weight", [None, torch.zeros(1, 3, 3, 3), torch.zeros(8, 0)])
def test_extract_leaves_out_a_bias_whose_weight_cannot_be_compared(weight: Tensor | None) -> None:
    base, tuned = _pair()
    tuned["0.bias"] = base["0.bias"] + 1
    tuned["0.weight"] = weight if weight is not None else torch.zeros(0)
    if weight is None:
        del tuned["0.weight"]
    with pytest.warns(convlora.ConvLoRAWarning, match=r"express it: 0\.bias, 0\.weight"):
        adapter = Adapter.extract({**base, 7: base["0.bias"]}, tuned, rank=1)  # type: ignore[dict-item]
    assert "0" not in adapter.layers


def test_extract_names_what_an_adapter_cannot_express() -> None:
    base, tuned = _pair()
    tuned["1.weight"] = base["1.weight"] + 1
    tuned["1.num_batches_tracked"] = base["1.num_batches_tracked"] + 1
    tuned["more"] = torch.zeros(3)
    base["mask"], tuned["mask"] = torch.zeros(2, 2), torch.zeros(3, 3)
    with pytest.warns(convlora.ConvLoRAWarning, match=r"express it: 1\.num_batches_tracked, 1\.weight, mask, more$"):
        adapter = Adapter.extract(base, tuned, rank=1)
    assert "1" not in adapter.layers


def test_extract_says_what_is_wrong() -> None:
    base, tuned = _pair()
    with pytest.raises(convlora.ConvLoRAError, match="no weight of two or more dimensions"):
        Adapter.extract(base, base, rank=1)
    with pytest.raises(convlora.ConvLoRAError, match="expected two state dicts"):
        Adapter.extract(net(), tuned, rank=1)  # type: ignore[arg-type]
    with pytest.raises(convlora.ConvLoRAError, match=r"non-finite: 0\.weight"):
        Adapter.extract(base, {**tuned, "0.weight": tuned["0.weight"] * math.inf}, rank=1)
    with pytest.raises(convlora.ConvLoRAError, match=r"missing: nine\.weight; mismatched: 3\.weight"):
        Adapter.extract(base, tuned, rank=1, specs={"3": WeightSpec((1, 1)), "nine": WeightSpec((1, 1))})
    with pytest.raises(convlora.ConvLoRAError, match=r"Adapter\.extract: give either"):
        Adapter.extract(base, tuned)


def test_extract_reads_mixed_precision() -> None:
    base, tuned = _pair()
    adapter = Adapter.extract({n: t.half() if t.is_floating_point() else t for n, t in base.items()}, tuned, energy=1)
    assert {t.dtype for layer in adapter.layers.values() for t in layer.tensors.values()} == {torch.float32}


# --- products and whole tensors --------------------------------------------------------------------------------------

OTHERS = ("loha", "lokr", "dense")


@pytest.mark.parametrize("target", [*PRODUCTS, "dense"])
@pytest.mark.parametrize("factors", OTHERS)
def test_the_update_of_every_factorization_that_sees_no_weight_is_had_in_others(factors: str, target: str) -> None:
    adapter = make(factors, {"a": 2, "b": 1, "d": 2}, alpha=3, bias=True)
    other = adapter.refactor(target)
    for path, layer in adapter.layers.items():
        torch.testing.assert_close(dense(other, path), dense(adapter, path), rtol=1e-9, atol=1e-9)
        assert torch.equal(other.layers[path].tensors["lora_bias"], layer.tensors["lora_bias"])


@pytest.mark.parametrize("factors", OTHERS)
def test_a_rank_that_counts_nothing_is_not_cut(factors: str) -> None:
    adapter = make(factors, {"a": 2})
    with pytest.raises(convlora.ConvLoRAError, match=rf"resize: the rank of '{factors}' factors counts no components"):
        adapter.resize(rank=1)
    assert adapter.refactor("locon", rank=1).layers["a"].rank == 1
    if factors != "dense":
        with pytest.raises(convlora.ConvLoRAError, match="'join', or bring the adapter to 'locon' by refactor"):
            Adapter.combine([adapter, adapter], [0.5, 0.5])
        with pytest.raises(convlora.ConvLoRAError, match="give its class a method 'fit'"):
            Adapter.extract(*_pair(), rank=1, factors=factors)


@given(numbers, numbers)
def test_whole_updates_add_up_exactly(v: float, w: float) -> None:
    one, two = make("dense", {"a": 1, "b": 4}, alpha=2, bias=True), make("dense", {"b": 2, "d": 1}, scaling="sqrt")
    both = Adapter.combine([one, two], [v, w])
    for path in ("a", "b", "d"):
        torch.testing.assert_close(dense(both, path), v * dense(one, path) + w * dense(two, path))


def test_a_whole_update_is_extracted_without_loss() -> None:
    base, tuned = _pair()
    adapter = Adapter.extract(base, tuned, energy=1, factors="dense")
    applied = adapter.apply_to(base)
    assert set(adapter.errors.values()) == {0.0}
    for name, value in tuned.items():
        torch.testing.assert_close(applied[name], value, rtol=1e-14, atol=1e-14)


# --- factorizations of users -----------------------------------------------------------------------------------------


def test_a_factorization_without_the_methods_is_told_which() -> None:
    class Plain:
        inits = ("default",)

        def shapes(self, spec: WeightSpec, rank: int) -> dict[str, tuple[int, ...]]:
            return {"left": (spec.out_channels, rank), "right": (rank, math.prod(spec.shape) // spec.out_channels)}

        def init_(self, factors: Mapping[str, Tensor], method: str) -> None:
            nn.init.zeros_(factors["left"])
            nn.init.ones_(factors["right"])

        def delta(self, factors: Mapping[str, Tensor], spec: WeightSpec) -> Tensor:
            return factors["left"] @ factors["right"]

        def drop(self, factors: Mapping[str, Tensor], keep: Tensor) -> dict[str, Tensor]:
            return {**factors, "left": factors["left"] * keep}

    register_factors("test-plain", Plain)
    adapter = make("test-plain", {"a": 2})
    for call, method in (
        (lambda: Adapter.combine([adapter], [1]), "join"),
        (lambda: adapter.resize(rank=1), "fit"),
        (lambda: make("locon", {"a": 1}).refactor("test-plain"), "fit"),
        (lambda: Adapter.extract(*_pair(), rank=1, factors="test-plain"), "fit"),
    ):
        with pytest.raises(
            convlora.ConvLoRAError, match=rf"'test-plain' cannot do this; give its class a method '{method}'"
        ):
            call()
    torch.testing.assert_close(adapter.refactor("locon").delta("a"), adapter.delta("a"))
