"""How exact a merged weight is: the checks of `benchmarks/trust` at a small count, and each rounding by hand."""

from __future__ import annotations

import copy
from fractions import Fraction
from typing import Any

import pytest
import torch
from oracle import NET_INPUT, adapted_net, bits
from torch import nn

import convlora
from benchmarks.trust import numerics
from benchmarks.trust.numerics import DTYPES, EXTREMES
from convlora.factors.fuse import fuse_weight_exactly, rounded_once

exactly = pytest.mark.parametrize("exact", [False, True], ids=["as unmerged", "exact"])


@pytest.fixture(scope="module")
def errors() -> dict[tuple[torch.dtype, bool], numerics.MergeErrors]:
    return numerics.merge_errors(layers=25)


@exactly
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merged_weight_is_within_its_bound(dtype: torch.dtype, exact: bool, errors: Any) -> None:
    seen = errors[dtype, exact]
    assert seen.elements > 1000
    assert seen.of_bound <= 1
    assert seen.of_bound > 0.2  # the bound is no idle one


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_exactly_merged_weight_is_correctly_rounded(dtype: torch.dtype, errors: Any) -> None:
    seen = errors[dtype, True]
    assert seen.correctly_rounded == seen.elements
    assert seen.ulp <= 0.5 + 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merged_weight_is_bitwise_the_unmerged_one(dtype: torch.dtype, errors: Any) -> None:
    assert errors[dtype, False].moved == 0


def test_float32_is_seen_to_round_more_than_once(errors: Any) -> None:
    seen = errors[torch.float32, False]
    assert seen.correctly_rounded < 0.9 * seen.elements
    assert seen.ulp > 1


def test_nearest_rounds_once() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        ends = torch.tensor([0.0, torch.finfo(dtype).smallest_normal, 1.0, torch.finfo(dtype).max], dtype=torch.float64)
        ulp = torch.finfo(dtype).eps
        near = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0]).double()[:, None] * ulp
        off = torch.tensor([-(2**-45), 0.0, 2**-45], dtype=torch.float64)[:, None, None]
        random = torch.randn(100, dtype=torch.float64, generator=generator)
        values = torch.cat([(ends * (1 + near)).flatten(), random.to(dtype).double() * (1 + ulp / 2), random])
        beyond = torch.tensor([torch.inf, -torch.inf, 1e300, 1e-300, -1e-300], dtype=torch.float64)
        values = torch.cat([(values * (1 + off)).flatten(), beyond])
        expected = numerics.rounded_to_nearest(values.numpy().astype("longdouble"), dtype)
        assert rounded_once(values, dtype).double().tolist() == [float(v) for v in expected]
        assert bool(rounded_once(torch.tensor([torch.nan]).double(), dtype).isnan())


def test_the_oracle_of_the_numerics_is_right() -> None:
    layer = convlora.inject(nn.Linear(8, 4), "*", rank=2, alpha=1, factors="locon")
    a, b = convlora.parameters(layer)
    with torch.no_grad():
        b.normal_()
    expected = [
        Fraction(w) + (Fraction(b[0, 0].item()) * Fraction(p) + Fraction(b[0, 1].item()) * Fraction(q)) / 2
        for w, p, q in zip(layer._parameters["weight"][0].tolist(), *a.tolist(), strict=True)  # type: ignore[union-attr]
    ]
    total, _, _ = numerics.fused_exactly(layer)
    assert [float(t) for t in total[0]] == pytest.approx([float(e) for e in expected], rel=1e-15, abs=0)
    ulp = numerics.ulps(total, torch.float32)
    values = torch.from_numpy(total.astype("float32"))
    assert torch.equal((torch.nextafter(values, values * 2) - values).abs(), torch.from_numpy(ulp.astype("float32")))


def test_where_weight_and_update_cancel_only_an_exact_merge_is_right() -> None:
    layer = nn.Linear(64, 64, bias=False)
    convlora.inject(layer, "*", rank=8, factors="locon")
    a, b = convlora.parameters(layer)
    with torch.no_grad():
        b.normal_()
        update = b.double() @ a.double()
        layer._parameters["weight"].copy_(-update)  # type: ignore[union-attr]
        exact = update + layer._parameters["weight"].double()  # type: ignore[union-attr]
    assert not torch.equal(convlora.merge(layer).weight, exact.float())
    assert torch.equal(convlora.merge(layer, exact=True).weight, exact.float())


def test_an_exact_merge_ends_with_unmerge_another_merge_and_its_context() -> None:
    model, x = adapted_net().eval(), torch.randn(NET_INPUT)
    y, state = model(x), bits(model)
    exact = convlora.merge(model, exact=True)[0].weight.clone()
    assert not torch.equal(exact, convlora.merge(copy.deepcopy(model))[0].weight)
    assert torch.equal(copy.deepcopy(model)[0].weight, exact)
    with convlora.merged(model):
        assert torch.equal(model(x), y)
    assert torch.equal(model[0].weight, exact)
    with convlora.disabled(model):
        convlora.merge(model)
    assert torch.equal(model[0].weight, exact)
    convlora.activate(model, {"default": 0.5})
    assert not torch.equal(model[0].weight, exact)
    convlora.activate(model, "default")
    assert torch.equal(model[0].weight, exact)
    assert torch.equal(convlora.unmerge(model)(x), y)
    assert torch.equal(convlora.merge(model)(x), y)
    assert bits(model) == state
    with pytest.raises(convlora.ConvLoRAError, match="no adapter"):
        convlora.merge(model, "typo", exact=True)
    assert torch.equal(model(x), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("factors", ["convlora", "locon"])
def test_exact_apply_to_is_bitwise_an_exact_merge(factors: str, dtype: torch.dtype) -> None:
    model = adapted_net(factors=factors, rank=2, alpha=3, bias=True).to(dtype)
    base = {k: v.clone() for k, v in model.state_dict().items() if ".convlora." not in k}
    applied = convlora.adapter(model).apply_to(base, strength=0.3, exact=True)
    convlora.remove(convlora.merge(model, {"default": 0.3}, exact=True))
    assert all(torch.equal(applied[key], value) for key, value in model.state_dict().items())


def test_fuse_exactly_forms_a_sum_of_several_updates_once() -> None:
    small = torch.full((1,), 2.0**-9, dtype=torch.float64)  # each is lost on a bfloat16 1, both are not
    assert fuse_weight_exactly(torch.ones(1).bfloat16(), [small, small * 1.01]).item() == 1 + 2**-7


def test_steps_below_the_resolution_of_a_bfloat16_base_are_not_lost() -> None:
    small = numerics.small_updates()
    assert small.error < 0.02
    assert small.weights_moved == 1
    assert small.in_bfloat16 == 0  # so these steps are below it


@pytest.mark.parametrize("name", EXTREMES)
def test_extremes(name: str) -> None:
    assert numerics.fault_at_extreme(name) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_overflow_is_refused(dtype: torch.dtype) -> None:
    assert numerics.fault_at_overflow(dtype) is None


def test_the_same_seed_gives_the_same_file_in_every_process() -> None:
    files = numerics.file_hashes(seed=0)
    assert len(set(files)) == len(files)
    assert numerics.file_hashes(seed=0) == files
    assert numerics.file_hashes_of_new_process(seed=0, hash_seed=1) == files
    assert set(numerics.file_hashes(seed=1)).isdisjoint(files)
