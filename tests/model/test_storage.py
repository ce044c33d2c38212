"""Files: what is saved comes back, what is damaged is refused, and nothing changes then."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import FACTORS, LAYERS, NET_INPUT, NET_LAYERS, PRODUCTS, adapted_net, bits, build, net, randomise, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import convlora
from convlora.factors.base import WeightSpec
from convlora.layer.adapted import slot_of

pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")


def same_net() -> nn.Sequential:
    """With the same weights at every call."""
    torch.manual_seed(0)
    return net().eval()


def pair() -> tuple[nn.Sequential, nn.Sequential]:
    """An adapted net and its base."""
    base = net().eval()
    model = net().eval()
    model.load_state_dict(base.state_dict())
    return randomise(convlora.inject(model, NET_LAYERS, rank=2, alpha=3, bias=True)), base


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Sequential, nn.Sequential, Path]:
    model, base = pair()
    convlora.save(model, tmp_path / "a.safetensors")
    return model, base, tmp_path / "a.safetensors"


Saved = tuple[nn.Sequential, nn.Sequential, Path]


@pytest.mark.parametrize("factors", FACTORS)
def test_load_into_a_fresh_model_restores_the_output_bitwise(factors: str, tmp_path: Path) -> None:
    model, base = pair()
    convlora.remove(model)
    options: dict[str, Any] = {"rank_scaling": "sqrt", "bias": True, "ranks": {"6": 1}, "alphas": {"0": 0.5}}
    randomise(convlora.inject(model, NET_LAYERS, rank=2, alpha=3, factors=factors, name="rain", **options))
    x = torch.randn(NET_INPUT)
    assert convlora.save(model, tmp_path / "a.safetensors") is model
    convlora.load(base, tmp_path / "a.safetensors")
    assert torch.equal(base(x), model(x))
    assert convlora.adapters(base) == convlora.adapters(model)
    assert bits(base) == bits(model)
    assert [p for p in base.parameters() if p.requires_grad] == convlora.parameters(base)


def test_saving_twice_gives_the_same_bytes(saved: Saved, tmp_path: Path) -> None:
    model, _, path = saved
    convlora.save(model, tmp_path / "b.safetensors")
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_keys_and_metadata_are_those_of_the_contract(saved: Saved) -> None:
    _, _, path = saved
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        keys = sorted(file.keys())
    assert keys == sorted(f"{i}.lora_{x}" for i in NET_LAYERS for x in ("A", "B", "bias"))
    assert metadata["format"] == "convlora"
    assert metadata["convlora.format_version"] == "1"
    assert json.loads(metadata["config"])["rank"] == 2
    assert json.loads(metadata["layers"])["3"][:2] == [2, 3]
    assert metadata["checksum"].startswith("sha256:")
    assert metadata["fingerprint"].startswith("sha256:")
    assert all(tensor.dtype == torch.float32 for tensor in load_file(path).values())


def test_a_smaller_dtype_makes_a_smaller_file(saved: Saved, tmp_path: Path) -> None:
    model, base, path = saved
    convlora.save(model, tmp_path / "half.safetensors", dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / "half.safetensors").values()} == {torch.float16}
    assert (tmp_path / "half.safetensors").stat().st_size < path.stat().st_size
    convlora.load(base, tmp_path / "half.safetensors")
    x = torch.randn(NET_INPUT)
    torch.testing.assert_close(base(x), model(x), rtol=1e-2, atol=1e-2)
    assert {p.dtype for p in convlora.parameters(base)} == {torch.float32}


def test_hot_swap_copies_in_place(saved: Saved) -> None:
    model, base, path = saved
    convlora.inject(base, NET_LAYERS, rank=2, alpha=8, bias=True)
    factors = convlora.parameters(base)
    convlora.load(base, path)
    x = torch.randn(NET_INPUT)
    assert torch.equal(base(x), model(x))
    assert all(p is q for p, q in zip(convlora.parameters(base), factors, strict=True))
    assert convlora.adapters(base) == convlora.adapters(model)
    convlora.merge(base)
    randomise(model)
    convlora.load(base, convlora.adapter(model))
    assert torch.equal(base(x), model(x))


def test_load_beside_another_adapter_under_another_name(saved: Saved) -> None:
    model, base, path = saved
    convlora.load(base, path, name="a")
    convlora.load(base, path, name="b")
    assert list(convlora.adapters(base)) == ["a", "b"]
    convlora.activate(base, {"a": 0.25, "b": 0.75})
    torch.testing.assert_close(base[0].weight, model[0].weight)


def test_load_freezes_and_remove_gives_the_base_back(saved: Saved) -> None:
    _, base, path = saved
    before = snapshot(base)
    convlora.remove(convlora.load(base, path))
    assert snapshot(base) == before


def test_wrapped_models_use_the_names_of_the_bare_model(saved: Saved, tmp_path: Path) -> None:
    model, base, path = saved
    compiled = torch.compile(model, backend="eager")
    convlora.save(compiled, tmp_path / "b.safetensors")
    assert path.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    parallel = nn.DataParallel(base)
    convlora.load(parallel, path)
    assert list(convlora.adapter(parallel).layers) == NET_LAYERS


# --- another base ----------------------------------------------------------------------------------------------


def test_another_base_of_the_same_shapes_gives_a_warning(saved: Saved) -> None:
    _, base, path = saved
    with torch.no_grad():
        base[3].weight[-1, -1, -1, -1] += 0.5
    with pytest.warns(convlora.ConvLoRAWarning, match="trained on another base of the same shapes"):
        convlora.load(base, path)
    assert list(convlora.adapters(base)) == ["default"]


def test_a_base_that_is_equal_up_to_rounding_gives_none(saved: Saved) -> None:
    _, base, path = saved
    before = bits(base)
    with torch.no_grad():
        for layer in (base[0], base[3], base[4], base[6]):
            layer.weight.mul_(3).div_(3)
    assert bits(base) != before
    convlora.load(base, path)  # warnings are errors in tests


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_base_in_another_precision_is_said_to_be_one(saved: Saved, dtype: torch.dtype) -> None:
    _, base, path = saved
    name = str(dtype).removeprefix("torch.")
    for model in (copy.deepcopy(base).to(dtype), copy.deepcopy(base).to(dtype).float()):
        with pytest.warns(convlora.ConvLoRAWarning, match=f"values of {name} here and of float32 there"):
            convlora.load(model, path)


@pytest.mark.parametrize("summary", [None, "", "[", "[1]", '{"dtype":"float32","sums":[1,2]}', '{"dtype":1,"sums":3}'])
def test_a_file_without_a_summary_of_the_base_that_is_known_reads_as_before(saved: Saved, summary: str | None) -> None:
    _, base, path = saved

    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        del metadata["base_summary"]
        if summary is not None:
            metadata["base_summary"] = summary

    rewrite(path, change)
    convlora.load(copy.deepcopy(base), path)
    with torch.no_grad():
        base[3].weight[-1, -1, -1, -1] += 1e-6
    with pytest.warns(convlora.ConvLoRAWarning, match="another base of the same shapes, or on another precision"):
        convlora.load(base, path)


def test_the_fingerprint_does_not_see_adapters_or_other_layers(saved: Saved) -> None:
    _, base, path = saved
    with torch.no_grad():
        base[1].weight.add_(1)
    randomise(convlora.inject(base, "0", rank=1, name="other"))
    convlora.load(base, path)  # warnings are errors in tests


# --- files that cannot be used ---------------------------------------------------------------------------------


def rewrite(path: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> None:
    """Edit a file as somebody who knows the format, checksum included."""
    from convlora.adapter.file import checksum

    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(path)
    edit(tensors, metadata)
    metadata["checksum"] = checksum(tensors, metadata)
    save_file(tensors, path, metadata)


def rename(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    for x in ("A", "B", "bias"):
        tensors[f"body.3.lora_{x}"] = tensors.pop(f"3.lora_{x}")
    metadata["layers"] = metadata["layers"].replace('"3":', '"body.3":')


def reshape(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["0.lora_A"] = torch.zeros(6, 12)
    layers = json.loads(metadata["layers"])
    layers["0"][2] = [8, 4, 3, 3]
    metadata["layers"] = json.dumps(layers)


def set_nan(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["0.lora_A"][0, 0] = float("nan")
    tensors["6.lora_B"][0, 0] = float("inf")


def drop(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    del tensors["0.lora_A"], tensors["4.lora_B"]
    tensors["3.lora_C"] = torch.zeros(1)


def orphan(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    tensors["7.lora_A"] = torch.zeros(1)


def newer(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata["convlora.format_version"] = "3"


def no_layers(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    del metadata["layers"]


def bad_layers(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata["layers"] = metadata["layers"].replace("[2,3,", "[-2,3,", 1)


def no_entries(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata["layers"] = "[]"


def unknown_factors(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    metadata["config"] = metadata["config"].replace("{", '{"factors":"nothing",', 1)


EDITS = {
    "renamed": (rename, r"unexpected: body\.3; nearest: '3'"),
    "reshaped": (reshape, r"mismatched: 0 \(the file has weight \(8, 4, 3, 3\), the model \(8, 3, 3, 3\)\)"),
    "non-finite": (set_nan, r"non-finite: 0\.lora_A, 6\.lora_B"),
    "dropped": (drop, r"missing: 0\.lora_A, 4\.lora_B; unexpected: 3\.lora_C"),
    "orphan": (orphan, r"unexpected: 7\.lora_A"),
    "newer": (newer, "format version '3', this release reads 2; update convlora"),
    "no layers": (no_layers, "malformed metadata"),
    "bad layers": (bad_layers, "rank -2"),
    "no entries": (no_entries, "unexpected|malformed"),
    "unknown factors": (unknown_factors, "'nothing' is not registered"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_unusable_content_is_refused_and_the_model_left_alone(edit: str, saved: Saved) -> None:
    _, base, path = saved
    change, message = EDITS[edit]
    rewrite(path, change)
    before = snapshot(base)
    with pytest.raises(convlora.ConvLoRAError, match=message) as caught:
        convlora.load(base, path)
    assert "\n" not in str(caught.value)
    assert snapshot(base) == before


@pytest.mark.parametrize("edit", ["renamed", "reshaped"])
def test_unusable_content_is_refused_in_a_hot_swap(edit: str, saved: Saved) -> None:
    _, base, path = saved
    convlora.load(base, path)
    rewrite(path, EDITS[edit][0])
    before = snapshot(base)
    with pytest.raises(convlora.ConvLoRAError, match=r"missing: 3; unexpected: body\.3|mismatched: 0"):
        convlora.load(base, path)
    assert snapshot(base) == before


PADDED = [factors for factors in FACTORS if factors != "lokr"]  # its tensors are others from some rank on


LOWER: dict[str, dict[str, Any]] = {
    "scale 1": dict(rank=1),
    "alpha": dict(rank=2, alpha=3),
    "rank-stabilised": dict(rank=2, alpha=3, rank_scaling="sqrt"),
    "ranks of their own": dict(rank=1, ranks={"3": 4, "6": 2}, alphas={"0": 0.5}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lower", LOWER)
@pytest.mark.parametrize("factors", PADDED)
def test_hot_swap_of_a_lower_rank_is_the_same_update(
    factors: str, lower: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, small = (same_net().to(dtype) for _ in range(2))
    randomise(convlora.inject(model, NET_LAYERS, rank=4, alpha=7, factors=factors, bias=True))
    randomise(convlora.inject(small, NET_LAYERS, factors=factors, bias=True, **LOWER[lower]))
    held, x = convlora.parameters(model), torch.randn(NET_INPUT).to(dtype)
    chance = torch.get_rng_state()
    convlora.load(model, convlora.adapter(small))
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(p is q for p, q in zip(convlora.parameters(model), held, strict=True))
    close: dict[str, float] = dict(rtol=1e-5, atol=1e-6) if dtype != torch.bfloat16 else dict(rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(model(x), small(x), **close)
    taken, given = convlora.adapter(model), convlora.adapter(small)
    for path, layer in taken.layers.items():
        of = given.layers[path]
        assert layer.rank == 4
        assert taken.config.scale(layer.rank, layer.alpha) == pytest.approx(given.config.scale(of.rank, of.alpha))
        weight = model.state_dict()[f"{path}.weight"]
        torch.testing.assert_close(taken.delta(path, weight), given.delta(path, weight), rtol=1e-5, atol=1e-6)
    assert taken.config == convlora.adapters(model)["default"]
    assert taken.config.rank_scaling == given.config.rank_scaling
    convlora.save(model, tmp_path / "a.safetensors")
    fresh = same_net().to(dtype)
    assert torch.equal(convlora.load(fresh, tmp_path / "a.safetensors")(x), model(x))
    convlora.inject(convlora.remove(fresh), config=taken.config)
    assert {p: (f.rank, f.alpha) for p, f in convlora.adapter(fresh).layers.items()} == {
        p: (f.rank, f.alpha) for p, f in taken.layers.items()
    }


@pytest.mark.parametrize("factors", PRODUCTS)
def test_what_a_hot_swap_pads_trains_as_a_new_adapter_does(factors: str) -> None:
    model, small = (randomise(convlora.inject(same_net(), NET_LAYERS, rank=r, factors=factors)) for r in (3, 1))
    convlora.load(model, convlora.adapter(small))
    optimizer = torch.optim.SGD(convlora.parameters(model), lr=0.1)
    for _ in range(2):  # the first step moves B alone, from zero
        optimizer.zero_grad()
        model(torch.randn(NET_INPUT)).square().mean().backward()
        optimizer.step()
    moved = [p.grad.flatten(1) if i % 2 == 0 else p.grad.flatten(1).T for i, p in enumerate(convlora.parameters(model))]
    assert all(bool(component.ne(0).any()) for gradient in moved for component in gradient)


def test_a_lower_rank_swaps_into_every_sort_of_layer() -> None:
    for hazard in LAYERS:
        layer, x = build(hazard)
        for factors in PADDED:
            large = randomise(convlora.inject(copy.deepcopy(layer), "*", rank=3, alpha=2, factors=factors))
            small = randomise(convlora.inject(copy.deepcopy(layer), "*", rank=2, alpha=5, factors=factors))
            convlora.load(large, convlora.adapter(small))
            torch.testing.assert_close(large(x), small(x), rtol=1e-4, atol=1e-5, msg=f"{hazard} {factors}")


def test_kronecker_products_swap_as_long_as_the_second_matrix_stays_one_of_low_rank() -> None:
    def made(rank: int) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(64, 64), nn.Conv1d(64, 64, 3, padding=1))
        return randomise(convlora.inject(layers, "*", rank=rank, alpha=2, factors="lokr"))  # type: ignore[no-any-return]

    model, small, whole, x = made(3), made(2), made(7), torch.randn(2, 64, 64)
    convlora.load(model, convlora.adapter(small))
    torch.testing.assert_close(model(x), small(x), rtol=1e-4, atol=1e-4)
    before = snapshot(model)
    with pytest.raises(convlora.ConvLoRAError, match=r"the file has \['lokr_w1', 'lokr_w2'\], the model \['lokr_w1', "):
        convlora.load(model, convlora.adapter(whole))
    assert snapshot(model) == before
    other = made(5)  # both have a whole one: the rank says nothing but in the scale
    convlora.load(whole, convlora.adapter(other))
    torch.testing.assert_close(whole(x), other(x), rtol=1e-4, atol=1e-4)


def test_a_factorization_without_sums_is_not_padded() -> None:
    class Diagonal:
        inits = ("default",)

        def shapes(self, spec: WeightSpec, rank: int) -> dict[str, tuple[int, ...]]:
            return {"gain": (spec.shape[0], rank), "mix": (rank, math.prod(spec.shape[1:]))}

        def init_(self, factors: Any, method: str) -> None:
            nn.init.normal_(factors["mix"])
            nn.init.zeros_(factors["gain"])

        def delta(self, factors: Any, spec: WeightSpec) -> torch.Tensor:
            return factors["gain"] @ factors["mix"]  # type: ignore[no-any-return]

        def drop(self, factors: Any, keep: torch.Tensor) -> Any:
            return {**factors, "gain": factors["gain"] * keep}

    convlora.register_factors("storage-diagonal", Diagonal)
    model, small = (convlora.inject(net(), "0", rank=rank, factors="storage-diagonal") for rank in (3, 2))
    before = snapshot(model)
    with pytest.raises(convlora.ConvLoRAError, match=r"mismatched: 0 \(rank 2 on rank 3, which 'storage-diagonal'"):
        convlora.load(model, convlora.adapter(small))
    assert snapshot(model) == before


def test_hot_swap_of_a_higher_rank_is_refused_with_the_remedy(saved: Saved, tmp_path: Path) -> None:
    _, base, path = saved
    convlora.load(base, path)
    other = randomise(convlora.inject(net(), NET_LAYERS, rank=3, bias=True))
    before = snapshot(base)
    remedy = r"name= loads beside it, Adapter\.resize\(rank=2\) lowers its ranks"
    with pytest.raises(convlora.ConvLoRAError, match=rf"mismatched: 0 \(the file has rank 3, .* rank 2\).*{remedy}"):
        convlora.load(base, convlora.adapter(other))
    with pytest.raises(convlora.ConvLoRAError, match=r"mismatched: 0 .*'locon' factors"):
        convlora.load(base, convlora.adapter(convlora.inject(net(), "0", rank=1, factors="locon")))
    assert snapshot(base) == before
    with pytest.warns(convlora.ConvLoRAWarning, match="another base"):
        convlora.load(base, convlora.adapter(other).resize(rank=2))
    assert [layer.rank for layer in convlora.adapter(base).layers.values()] == [2] * 4


OTHER_SCALE: dict[str, tuple[dict[str, Any], str]] = {
    "alpha": (dict(alpha=3), r"scale 3, the model's 1 \(alpha 1, rank 1, linear\); inject with alpha=3"),
    "alpha and rank": (dict(rank=2, alpha=1), "scale 0.5"),
    "rank scaling": (dict(rank=4, alpha=4, rank_scaling="sqrt"), r"scale 2, the model's 1 .*; inject with alpha=8"),
    "onto rank scaling": (dict(rank=4, alpha=4), r"scale 1, the model's 2 \(alpha 4, rank 4, sqrt\).* alpha=2"),
}


@pytest.mark.parametrize("case", OTHER_SCALE)
@pytest.mark.parametrize("strict", [True, False])
def test_a_full_checkpoint_of_another_scale_is_noticed(case: str, strict: bool) -> None:
    options, message = OTHER_SCALE[case]
    model = adapted_net(**options)
    rank = options.get("rank", 1)
    scaling = {"rank_scaling": "sqrt", "alpha": 4} if case.startswith("onto") else {}
    other = adapted_net(rank=rank, **scaling)
    with pytest.raises(RuntimeError, match=f"0.convlora.default: the checkpoint's adapter has {message}") as caught:
        other.load_state_dict(model.state_dict(), strict=strict)
    assert all(f"{path}.convlora.default: " in str(caught.value) for path in NET_LAYERS)


@pytest.mark.parametrize("change", ["as it is", "bfloat16", "averaged", "older", "base alone"])
@pytest.mark.parametrize("assign", [False, True])
def test_full_checkpoints_of_the_same_scale_load_strictly(change: str, assign: bool, tmp_path: Path) -> None:
    model = adapted_net(rank=3, alpha=1).eval()
    torch.save(model.state_dict(), tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "a.safetensors")  # tensors alone
    if change == "bfloat16":
        state = {key: value.to(torch.bfloat16) if value.is_floating_point() else value for key, value in state.items()}
    elif change == "averaged":
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
        for _ in range(20):
            average.update_parameters(model)
        state = average.module.state_dict()
    elif change == "older":  # states no scale
        state = {key: value for key, value in state.items() if "scale" not in key}
    elif change == "base alone":
        state = {key: value for key, value in state.items() if ".convlora." not in key}
        assert list(state) == list(net().state_dict())
    other = adapted_net(rank=3, alpha=1).eval()
    other.load_state_dict(state, assign=assign)
    assert all(value == pytest.approx(1 / 3) for key, value in other.state_dict().items() if "scale" in key)
    if change not in ("bfloat16", "base alone"):
        x = torch.randn(NET_INPUT)
        torch.testing.assert_close(other(x), model(x))


def test_a_swap_and_a_move_keep_the_scale_that_is_stated() -> None:
    model, small = (convlora.inject(same_net(), NET_LAYERS, rank=rank, alpha=5) for rank in (2, 1))
    convlora.load(model, convlora.adapter(small))
    model.half().float().to("meta").to_empty(device="cpu")
    stated = {key: value for key, value in model.state_dict().items() if "scale" in key}
    assert len(stated) == len(NET_LAYERS)
    assert all(value.item() == 5 and value.dtype == torch.float32 for value in stated.values())


def test_strict_false_takes_what_fits_and_warns_of_the_rest(saved: Saved) -> None:
    model, base, path = saved
    rewrite(path, rename)
    with pytest.warns(convlora.ConvLoRAWarning, match=r"left out what does not fit: unexpected: body\.3"):
        convlora.load(base, path, strict=False)
    assert list(convlora.adapter(base).layers) == ["0", "4", "6"]
    assert torch.equal(base[0].weight, model[0].weight)


def test_strict_false_in_a_hot_swap_leaves_no_mixture(saved: Saved) -> None:
    model, base, path = saved
    randomise(convlora.inject(base, NET_LAYERS, rank=2, bias=True))
    rewrite(path, rename)
    with pytest.warns(convlora.ConvLoRAWarning, match="left out"):
        convlora.load(base, path, strict=False)
    assert torch.equal(base[0].weight, model[0].weight)
    assert torch.equal(base[3].weight, base[3]._parameters["weight"])


def test_every_truncation_is_refused(saved: Saved) -> None:
    _, base, path = saved
    data, before = path.read_bytes(), snapshot(base)
    header = struct.unpack("<Q", data[:8])[0]
    for length in (0, 1, 7, 8, 9, header // 2, header + 7, header + 8, header + 9, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(convlora.ConvLoRAError, match="read"):
            convlora.load(base, path)
    assert snapshot(base) == before


def test_every_flipped_bit_is_refused(saved: Saved) -> None:
    _, base, path = saved
    data, before = path.read_bytes(), snapshot(base)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    step = max(1, (len(data) - header) // 100)
    for at in [*range(header), *range(header, len(data), step)]:
        flipped = bytearray(data)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        with pytest.raises(convlora.ConvLoRAError):
            convlora.load(base, path)
    assert snapshot(base) == before


def test_foreign_files_are_refused_and_pickles_never_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / "bomb.safetensors").write_bytes(pickle.dumps(Bomb()))
    torch.save({"w": Bomb()}, tmp_path / "bomb.pt")
    save_file({"conv.lora_A": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    save_file({"w": torch.zeros(1)}, tmp_path / "pt.safetensors", {"format": "pt"})
    (tmp_path / "folder").mkdir()
    for name in ("bomb.safetensors", "bomb.pt", "foreign.safetensors", "pt.safetensors", "folder", "absent"):
        with pytest.raises(convlora.ConvLoRAError, match=f"read: '.*{name}'"):
            convlora.load(net(), tmp_path / name)
    assert not (tmp_path / "exploded").exists()


# --- writing ---------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_and_no_other(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, path = saved
    data = path.read_bytes()
    randomise(model)

    def fail(*args: object) -> None:
        raise OSError("disk full")

    for step in ("fsync", "replace", "chmod"):
        monkeypatch.setattr(os, step, fail)
        with pytest.raises(convlora.ConvLoRAError, match=r"cannot be written \(disk full\)"):
            convlora.save(model, path)
        monkeypatch.undo()
    assert path.read_bytes() == data
    assert os.listdir(path.parent) == [path.name]
    convlora.save(model, path)
    assert path.read_bytes() != data


def test_places_that_cannot_be_written_are_one_clear_error(saved: Saved, tmp_path: Path) -> None:
    model, _, _ = saved
    (tmp_path / "folder").mkdir()
    for place in (tmp_path / "no" / "such" / "a.safetensors", tmp_path / "folder"):
        with pytest.raises(convlora.ConvLoRAError, match=r"write: .* cannot be written"):
            convlora.save(model, place)


def test_paths_of_another_type_and_factors_without_values_are_one_clear_error(saved: Saved) -> None:
    model, base, path = saved
    with pytest.raises(convlora.ConvLoRAError, match="write: '3' cannot be written"):
        convlora.save(model, 3)  # type: ignore[arg-type]
    with pytest.raises(convlora.ConvLoRAError, match="read: 'None' cannot be read"):
        convlora.load(base, None)  # type: ignore[arg-type]
    with pytest.raises(convlora.ConvLoRAError, match="no values yet"):
        convlora.save(model.to("meta"), path)


def test_a_link_stays_a_link_and_permissions_stay(saved: Saved, tmp_path: Path) -> None:
    model, _, path = saved
    path.chmod(0o640)
    (tmp_path / "link.safetensors").symlink_to(path)
    convlora.save(randomise(model), tmp_path / "link.safetensors")
    assert (tmp_path / "link.safetensors").is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    assert torch.equal(load_file(path)["0.lora_A"], slot_of(model[0]).low_rank("default").lora_A)


def test_non_finite_factors_are_not_saved(saved: Saved) -> None:
    model, _, path = saved
    data = path.read_bytes()
    with torch.no_grad():
        slot_of(model[4]).low_rank("default").lora_B[0, 0] = float("nan")
    with pytest.raises(convlora.ConvLoRAError, match=r"non-finite: 4\.lora_B"):
        convlora.save(model, path)
    assert path.read_bytes() == data


@pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")
@pytest.mark.parametrize("factors", FACTORS)
def test_a_span_adapter_is_hardly_larger_than_its_tensors(factors: str, tmp_path: Path) -> None:
    span = pytest.importorskip("spandrel.architectures.SPAN").SPAN
    model = span(num_in_ch=3, num_out_ch=3, feature_channels=26, upscale=4)
    for name, module in list(model.named_modules()):  # collapsed, as the released nets are
        if hasattr(module, "eval_conv"):
            model.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], module.eval_conv)
    convlora.inject(model, nn.Conv2d, rank=4, factors=factors)
    convlora.save(model, tmp_path / "span.safetensors")
    raw = sum(4 * p.numel() for p in convlora.parameters(model))
    assert len(convlora.adapter(model).layers) == 22
    assert raw < (tmp_path / "span.safetensors").stat().st_size <= 1.02 * raw + 8000
