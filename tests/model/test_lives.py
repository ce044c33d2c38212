"""The laws of copies on many kinds of networks after 20 steps in train mode, and where other code gets in their way."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import LIVES, base_bits, injected, output, small, train, trained
from oracle import bits, snapshot
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from typer.testing import CliRunner

import convlora
from convlora import Adapter
from convlora.adapter.checkpoint import apply_adapters
from convlora.adapter.file import checksum
from convlora.cli.app import app
from convlora.layer.adapted import Adapted, slot_of
from convlora.layer.copies import statistics_names
from convlora.support.safetensors import from_safetensors, to_safetensors

TESTS = Path(__file__).parents[1]
STATISTICS = ["running_mean", "running_var", "num_batches_tracked"]
each = pytest.mark.parametrize("name", LIVES)
SMALL_ONES = ["unet", "instance norm", "nested head", "tied", "used twice", "assigned buffers", "unet, bf16"]
small_ones = pytest.mark.parametrize("name", SMALL_ONES)


def same(left: Any, right: Any) -> bool:
    """State dicts: the same keys in the same order, bitwise the same values."""
    return list(left) == list(right) and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


def copies_of(model: nn.Module, name: str = "default") -> dict[str, Tensor]:
    """Tensor name in the base -> an adapter's copy."""
    return {
        f"{path}.{kind}" if path else kind: tensor
        for path, module in model.named_modules()
        if isinstance(module, Adapted) and name in slot_of(module).copies()
        for kind, tensor in slot_of(module).copies()[name].tensors().items()
    }


def values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in tensors.items()}


# --- a life in train mode ----------------------------------------------------------------------------------------


@each
def test_training_leaves_every_base_key_bitwise(name: str) -> None:
    assert base_bits(trained(name)) == base_bits(LIVES[name].base())


@each
def test_training_moves_every_copy_of_running_statistics_and_nothing_is_reported(name: str) -> None:
    model = trained(name)
    base = LIVES[name].base().state_dict()
    moved = {key for key, tensor in copies_of(model).items() if not torch.equal(tensor, base[key])}
    kept = [
        f"{path}.{kind}"
        for path, module in LIVES[name].base().named_modules()
        for kind in statistics_names(module)
        if not (isinstance(module, nn.InstanceNorm2d) and kind == "num_batches_tracked")  # torch does not count there
    ]
    assert set(kept) <= moved
    assert convlora.changed(model) == []


@each
def test_switched_off_and_removed_the_output_is_bitwise_the_base_s(name: str) -> None:
    model, base, x = trained(name), LIVES[name].base(), LIVES[name].batch(0)
    live, expected = output(model, x), output(base, x)
    assert not torch.equal(live, expected)
    with convlora.disabled(model):
        assert torch.equal(output(model, x), expected)
    assert torch.equal(output(model, x), live)
    assert torch.equal(output(convlora.activate(model, []), x), expected)
    convlora.activate(model, "default")
    convlora.remove(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]
    assert all(p.requires_grad for p in model.parameters())
    assert bits(model) == bits(base)
    assert torch.equal(output(model, x), expected)


@each
def test_the_file_in_a_fresh_base_gives_the_live_output_bitwise(name: str, tmp_path: Path) -> None:
    model, x = trained(name), LIVES[name].batch(0)
    convlora.save(model, tmp_path / "a.safetensors")
    fresh = convlora.load(LIVES[name].base(), tmp_path / "a.safetensors")
    assert torch.equal(output(fresh, x), output(model, x))
    assert same(fresh.state_dict(), model.state_dict())
    convlora.save(fresh, tmp_path / "b.safetensors")
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@each
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_all_ways_to_merge_agree_bitwise(name: str, strength: float, tmp_path: Path) -> None:
    model, base, x = trained(name), LIVES[name].base(), LIVES[name].batch(0)
    convlora.activate(model, {"default": strength})
    live = output(model, x)
    convlora.save(model, tmp_path / "a.safetensors")
    save_file(values(base.state_dict()), tmp_path / "base.safetensors")
    state = convlora.merged_state_dict(model)
    files = [str(tmp_path / f"{file}.safetensors") for file in ("base", "a", "out")]
    result = CliRunner().invoke(app, ["merge", *files[:2], "-s", str(strength), "-o", files[2]])
    assert result.exit_code == 0, result.output
    written = load_file(files[2])
    assert all(torch.equal(written[key], value) for key, value in state.items())
    assert same(convlora.adapter(model).apply_to(base.state_dict(), strength), state)
    assert torch.equal(output(convlora.merge(model), x), live)
    assert torch.equal(output(convlora.unmerge(model), x), live)
    convlora.remove(convlora.merge(model))
    assert torch.equal(output(model, x), live)
    assert same(model.state_dict(), state)
    base.load_state_dict(state, strict=True)
    assert torch.equal(output(base, x), live)


@small_ones
def test_exact_merging_agrees_between_model_and_checkpoint(name: str) -> None:
    model, base = trained(name), LIVES[name].base()
    convlora.activate(model, {"default": 0.3})
    expected = convlora.adapter(model).apply_to(base.state_dict(), 0.3, exact=True)
    assert same(convlora.remove(convlora.merge(model, exact=True)).state_dict(), expected)


@each
def test_a_then_b_then_a_is_bitwise(name: str) -> None:
    model, x = trained(name), LIVES[name].batch(0)
    alone = output(model, x)
    options = {key: value for key, value in LIVES[name].options.items() if key != "bias"}
    convlora.activate(convlora.inject(model, rank=1, name="second", **options), "second")
    a, b = values(copies_of(model)), output(model, x)
    assert torch.equal(b, output(LIVES[name].base(), x))
    train(model, [LIVES[name].batch(90), LIVES[name].batch(91)], convlora.parameters(model, "second"))
    second = output(model, x)
    assert not torch.equal(second, b)
    assert torch.equal(output(convlora.activate(model, "default"), x), alone)
    assert same(values(copies_of(model)), a)
    assert torch.equal(output(convlora.activate(model, "second"), x), second)
    convlora.remove(model, "second")
    assert torch.equal(output(convlora.activate(model, "default"), x), alone)
    assert base_bits(model) == base_bits(LIVES[name].base())


@small_ones
@pytest.mark.parametrize("strength", [0.5, -1.0, 1.5])
def test_a_strength_mixes_copies_with_the_base(name: str, strength: float) -> None:
    model = convlora.activate(trained(name), {"default": strength})
    base, mixed = LIVES[name].base().state_dict(), convlora.merged_state_dict(model)
    for key, tensor in copies_of(model).items():
        if tensor.is_floating_point():
            wide = torch.promote_types(tensor.dtype, torch.float32)
            expected = (base[key].to(wide) + (tensor.to(wide) - base[key].to(wide)) * strength).to(tensor.dtype)
        else:
            expected = tensor
        assert torch.equal(mixed[key], expected)


# --- statistics --------------------------------------------------------------------------------------------------


KEEPERS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: nn.BatchNorm2d(4),
    "without affine": lambda: nn.BatchNorm2d(4, affine=False),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "instance norm": lambda: nn.InstanceNorm2d(4, track_running_stats=True),
    "synchronised": lambda: nn.SyncBatchNorm(4),
    "timm": lambda: pytest.importorskip("timm").layers.BatchNormAct2d(4),  # type: ignore[no-any-return]
}


@pytest.mark.parametrize("kind", KEEPERS)
def test_frozen_statistics_normalise_in_train_mode_and_do_not_move(kind: str) -> None:
    norm = KEEPERS[kind]().train()
    for _ in range(2):
        norm(torch.randn(4, 4, 5, 5) + 2)
    base = nn.Sequential(nn.Conv2d(3, 4, 1), norm)
    x = torch.randn(2, 3, 5, 5)
    expected = output(copy.deepcopy(base), x)
    model = convlora.inject(base, "0", rank=1, norm_statistics="frozen").train()
    before = base_bits(model)
    assert torch.equal(model(x), expected)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)
    train(model, [x, x])
    assert base_bits(model) == before
    assert convlora.adapter(model).modules == {}
    assert convlora.activate(model, [])[1].training  # off, it is the base's own norm
    assert convlora.remove(model)[1].training


def test_update_bn_moves_the_acting_adapters_copy_alone() -> None:
    model = convlora.inject(trained("unet"), "*", rank=1, name="other", exclude="out")
    convlora.activate(model, "default")
    factors, before = bits(model), values(copies_of(model))
    update_bn([LIVES["unet"].batch(seed) * 3 for seed in range(4)], model)
    moved = {key for key, tensor in copies_of(model).items() if not torch.equal(tensor, before[key])}
    assert moved == {f"{path}.1.{kind}" for path in ("inside", "down", "up") for kind in STATISTICS}
    differing = {key for key, value in bits(model).items() if value != factors[key]}
    assert all(".convlora.default." in key for key in differing)
    assert convlora.changed(model) == []


# --- several adapters --------------------------------------------------------------------------------------------


def two() -> nn.Module:
    """Two adapters with lives of their own, one after the other."""
    model = trained("nested head", 5)
    convlora.activate(convlora.inject(model, "body.*", rank=1, name="b", modules_to_save="head"), "b")
    batches = [LIVES["nested head"].batch(seed) * 2 for seed in range(30, 34)]
    return train(model, batches, convlora.parameters(model, "b")).eval()


def test_copies_acting_together_add_up_in_inference() -> None:
    model, base = two(), LIVES["nested head"].base().state_dict()
    a, b = copies_of(model), copies_of(model, "b")
    for strengths in ({"default": 1.0, "b": 1.0}, {"b": 0.25, "default": -0.5}):
        convlora.activate(model, strengths)
        state = convlora.merged_state_dict(model)
        for key, tensor in a.items():
            if tensor.is_floating_point():
                expected = (
                    base[key] + strengths["default"] * (tensor - base[key]) + strengths["b"] * (b[key] - base[key])
                )
                torch.testing.assert_close(state[key], expected)
        x = LIVES["nested head"].batch(0)
        live = output(model, x)
        assert torch.equal(output(convlora.merge(model), x), live)
        convlora.unmerge(model)


def test_two_that_train_together_are_an_error_in_train_mode_and_one_moves_its_statistics() -> None:
    model, x = two(), LIVES["nested head"].batch(0)
    convlora.activate(model, ["default", "b"]).train()
    before = base_bits(model)
    with pytest.raises(convlora.ConvLoRAError, match=r"\['default', 'b'\] act together and 2 of them train"):
        model(x)
    for parameter in convlora.parameters(model, "default"):
        parameter.requires_grad_(False)
    resting = values(copies_of(model))
    moving = values(copies_of(model, "b"))
    model(x)
    assert same(copies_of(model), resting)
    assert not torch.equal(copies_of(model, "b")["body.1.running_mean"], moving["body.1.running_mean"])
    for parameter in convlora.parameters(model, "b"):
        parameter.requires_grad_(False)
    with pytest.raises(convlora.ConvLoRAError, match="0 of them train"):
        model(x)
    assert base_bits(model) == before


def test_callers_use_copies_side_by_side() -> None:
    model, x = two(), LIVES["nested head"].batch(0)
    choices: list[Any] = ["default", "b", [], {"b": 0.5}, {"default": 0.5, "b": 0.5}]
    expected = [output(convlora.activate(model, choice), x) for choice in choices]
    convlora.activate(model, [])
    found: list[Tensor | None] = [None] * len(choices)
    ready = threading.Barrier(len(choices))

    def serve(number: int) -> None:
        with torch.no_grad(), convlora.using(model, choices[number]):
            for _ in range(5):
                ready.wait()
                found[number] = model(x)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(len(choices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(y is not None and torch.equal(y, z) for y, z in zip(found, expected, strict=True))
    assert torch.equal(output(model, x), expected[2])


# --- what a copy survives ----------------------------------------------------------------------------------------


@small_ones
def test_copies_survive_deepcopy_and_go_apart(name: str) -> None:
    model, x = trained(name), LIVES[name].batch(0)
    twin = copy.deepcopy(model)
    before = bits(model)
    assert torch.equal(output(twin, x), output(model, x))
    train(twin, [LIVES[name].batch(1)])
    assert bits(model) == before
    assert bits(twin) != before
    assert base_bits(twin) == base_bits(model)
    assert convlora.changed(twin) == convlora.changed(model) == []


@each
def test_a_full_checkpoint_brings_the_copies_back(name: str) -> None:
    model, x = trained(name), LIVES[name].batch(0)
    fresh = injected(name)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(output(fresh, x), output(model, x))
    before = values(copies_of(fresh))
    fresh.load_state_dict(LIVES[name].base().state_dict())  # a plain checkpoint: the base's keys alone
    assert same(copies_of(fresh), before)


def test_whole_models_load_in_a_fresh_process(tmp_path: Path) -> None:
    models = {name: (trained(name), LIVES[name].batch(0)) for name in LIVES}
    torch.save({n: (model, x, output(model, x)) for n, (model, x) in models.items()}, tmp_path / "models.pt")
    code = f"""
        import torch
        torch.set_num_threads({torch.get_num_threads()})  # another number rounds differently
        models = torch.load({str(tmp_path / "models.pt")!r}, weights_only=False)
        import convlora
        for name, (model, x, y) in models.items():
            with torch.no_grad():
                assert torch.equal(model(x), y), name
                assert convlora.changed(model) == [], name
                assert torch.equal(convlora.remove(convlora.merge(model))(x), y), name
    """
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True, env={**os.environ, "PYTHONPATH": paths})


@pytest.mark.parametrize("name", ["unet", "nested head", "tied"])
def test_copies_follow_a_model_to_another_dtype_and_device(name: str) -> None:
    model, x = trained(name), LIVES[name].batch(0)
    expected = bits(model)
    model.double()
    assert {t.dtype for t in copies_of(model).values() if t.is_floating_point()} == {torch.float64}
    wide = x if LIVES[name].tokens else x.double()
    y = output(model, wide)
    assert torch.equal(output(convlora.remove(convlora.merge(copy.deepcopy(model))), wide), y)
    assert bits(model.float()) == expected
    assert convlora.changed(model) == []
    model.to("meta")
    assert all(t.is_meta for t in copies_of(model).values())


def test_a_copy_of_a_tied_tensor_is_one_and_stays_tied() -> None:
    model = trained("tied")
    assert slot_of(model.embed).copies()["default"].tensor("weight") is model.out.weight
    assert model.embed.weight is model.out.weight
    train(copy.deepcopy(model), [LIVES["tied"].batch(1)])
    convlora.remove(convlora.merge(model))
    assert model.embed.weight is model.out.weight
    with pytest.warns(convlora.ConvLoRAWarning, match=r"out\.weight shared .* name both modules"):
        half = convlora.inject(LIVES["tied"].base(), "body", rank=1, modules_to_save="embed")
    assert half.embed.weight is not half.out.weight


@pytest.mark.parametrize("buffers", [False, True])
def test_averages_of_weights_hold_averaged_copies(buffers: bool) -> None:
    model = injected("nested head")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=buffers)
    for seed in range(3):
        train(model, [LIVES["nested head"].batch(seed)])
        average.update_parameters(model)
    live, kept = copies_of(model), copies_of(average.module)
    assert not torch.equal(live["head.0.weight"], kept["head.0.weight"])
    assert torch.equal(live["head.1.running_mean"], kept["head.1.running_mean"]) is not buffers
    assert base_bits(average.module) == base_bits(LIVES["nested head"].base())
    assert convlora.changed(average) == []
    x = LIVES["nested head"].batch(9)
    fresh = convlora.load(LIVES["nested head"].base(), convlora.adapter(average))
    assert torch.equal(output(fresh, x), output(average, x))


# --- files -------------------------------------------------------------------------------------------------------


def test_a_hot_swap_takes_the_copies_of_another_file(tmp_path: Path) -> None:
    model, x = trained("nested head"), LIVES["nested head"].batch(0)
    other = train(injected("nested head"), [LIVES["nested head"].batch(seed) * 4 for seed in range(3)])
    convlora.save(model, tmp_path / "a.safetensors")
    convlora.save(other, tmp_path / "b.safetensors")
    convlora.save(injected("nested head"), tmp_path / "unmoved.safetensors")
    a, b, held = output(model, x), output(other, x), [id(t) for t in copies_of(model).values()]
    assert torch.equal(output(convlora.load(model, tmp_path / "b.safetensors"), x), b)
    assert torch.equal(output(convlora.load(model, tmp_path / "a.safetensors"), x), a)
    base = LIVES["nested head"].base()
    unmoved = convlora.load(model, tmp_path / "unmoved.safetensors")
    assert torch.equal(output(unmoved, x), output(base, x))  # statistics that the file lacks are the base's
    assert [id(t) for t in copies_of(model).values()] == held


def test_float64_and_integer_copies_are_bitwise_in_a_file(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("big", torch.tensor([2**53 + 1, -(2**62)]))
            self.register_buffer("flag", torch.tensor([True, False]))
            self.register_buffer("byte", torch.tensor([255, 0], dtype=torch.uint8))
            self.wide = nn.Parameter(torch.rand(3, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.wide.sum().float()

    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 3, 1), Odd())
    model = convlora.inject(copy.deepcopy(base), "0", rank=1, modules_to_save="1")
    with torch.no_grad():
        copies_of(model)["1.big"].add_(1)
        copies_of(model)["1.flag"].logical_not_()
        copies_of(model)["1.wide"].add_(1e-12)
    convlora.save(model, tmp_path / "a.safetensors")
    fresh = convlora.load(copy.deepcopy(base), tmp_path / "a.safetensors")
    assert same(fresh.state_dict(), model.state_dict())
    assert same(convlora.merged_state_dict(fresh), convlora.adapter(model).apply_to(base.state_dict()))


def missing(tensors: dict[str, Tensor], modules: dict[str, list[str]]) -> None:
    del tensors["head.0.bias"]


def extra(tensors: dict[str, Tensor], modules: dict[str, list[str]]) -> None:
    tensors["head.0.more"] = torch.ones(1)


def renamed(tensors: dict[str, Tensor], modules: dict[str, list[str]]) -> None:
    tensors["head.0.weights"] = tensors.pop("head.0.weight")
    modules["head.0"] = ["weights", "bias"]


def unstated(tensors: dict[str, Tensor], modules: dict[str, list[str]]) -> None:
    modules["head.0"] = ["bias"]


def half(tensors: dict[str, Tensor], modules: dict[str, list[str]]) -> None:
    del tensors["head.0.bias"]
    modules["head.0"] = ["weight"]


def absent(tensors: dict[str, Tensor], modules: dict[str, list[str]]) -> None:
    tensors["tail.weight"] = torch.ones(1)
    modules["tail"] = ["weight"]


def flat(tensors: dict[str, Tensor], modules: dict[str, list[str]]) -> None:
    tensors["head.0.weight"] = tensors["head.0.weight"].flatten()


def statistics(tensors: dict[str, Tensor], modules: dict[str, list[str]]) -> None:
    tensors["head.1.running_mean"] = torch.ones(3)


def infinite(tensors: dict[str, Tensor], modules: dict[str, list[str]]) -> None:
    tensors["head.0.bias"][0] = torch.nan


def not_names(tensors: dict[str, Tensor], modules: dict[str, Any]) -> None:
    modules["head.0"] = {"weight": 1}


DAMAGES: dict[Callable[..., None], str] = {
    missing: r"missing: head\.0\.bias",
    extra: r"unexpected: head\.0\.more",
    renamed: r"head\.0 .the file has weights",
    unstated: r"unexpected: head\.0\.weight",
    half: r"head\.0 .the file lacks bias",
    absent: "unexpected: tail",
    flat: r"head\.0 .*weight\W+\(48,\)",
    statistics: r"head\.1 .*running_mean\W+\(3,\)",
    infinite: r"non-finite: head\.0\.bias",
    not_names: "modules are described by another thing",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_one_error_and_changes_nothing(damage: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    convlora.save(trained("nested head"), path)
    tensors, metadata = from_safetensors(path.read_bytes())
    modules = json.loads(metadata["modules"])
    damage(tensors, modules)
    metadata["modules"] = json.dumps(modules)
    metadata["checksum"] = checksum(tensors, metadata)
    path.write_bytes(to_safetensors(tensors, metadata))
    for model in (LIVES["nested head"].base(), injected("nested head")):
        before = snapshot(model)
        with pytest.raises(convlora.ConvLoRAError, match=DAMAGES[damage]) as caught:
            convlora.load(model, path)
        assert "\n" not in str(caught.value)
        assert snapshot(model) == before


# --- a head of another size --------------------------------------------------------------------------------------


def with_other_head(tmp_path: Path, classes: int = 7) -> tuple[nn.Module, Path]:
    """A net with a head of another size, its adapter trained and stored."""
    torch.manual_seed(0)
    model = small()
    torch.manual_seed(1)
    model.head = nn.Linear(8, classes)
    model = convlora.inject(model, "body.*", rank=1, modules_to_save="head")
    train(model, [LIVES["unet"].batch(seed) for seed in range(3)]).eval()
    convlora.save(model, tmp_path / f"{classes}.safetensors")
    return model, tmp_path / f"{classes}.safetensors"


def base_net() -> nn.Module:
    torch.manual_seed(0)
    return small()


def test_a_head_of_another_size_loads_switches_and_merges(tmp_path: Path) -> None:
    model, path = with_other_head(tmp_path)
    x = LIVES["unet"].batch(0)
    base, expected = base_net(), output(model, x)
    loaded = convlora.load(base_net(), path)
    assert torch.equal(output(loaded, x), expected)
    with convlora.disabled(loaded):
        assert torch.equal(output(loaded, x), output(base, x))
    assert base_bits(loaded) == bits(base)
    state = convlora.merged_state_dict(loaded)
    assert same(state, Adapter.read(path).apply_to(base.state_dict()))
    assert same(state, convlora.merged_state_dict(model))
    assert torch.equal(output(convlora.merge(loaded), x), expected)
    convlora.remove(loaded)
    assert torch.equal(output(loaded, x), expected)
    assert same(loaded.state_dict(), state)
    assert loaded.head.weight.requires_grad
    assert (loaded.head.out_features, loaded.head.in_features) == (7, 8)
    convlora.inject(loaded, "head", rank=1)


@pytest.mark.parametrize("strengths", [{"default": 0.5}, {"default": 1.0, "b": 1.0}], ids=["half", "together"])
def test_a_head_of_another_size_acts_whole_and_alone(strengths: dict[str, float], tmp_path: Path) -> None:
    _, path = with_other_head(tmp_path)
    loaded = convlora.load(base_net(), path)
    convlora.activate(convlora.inject(loaded, "body.*", rank=1, name="b", modules_to_save="head"), "default")
    before = snapshot(loaded)
    for call in (convlora.activate, convlora.merge, convlora.merged_state_dict):
        with pytest.raises(convlora.ConvLoRAError, match="another shape than the base"):
            call(loaded, strengths)
    with pytest.raises(convlora.ConvLoRAError, match="another shape"), convlora.using(loaded, strengths):
        pass
    if len(strengths) == 1:
        with pytest.raises(convlora.ConvLoRAError, match="acts at strength 1"):
            Adapter.read(path).apply_to(base_net().state_dict(), 0.5)
    assert snapshot(loaded) == before


@pytest.mark.parametrize("order", [(7, 5), (5, 7), (7, 6), (7, 1), (1, 5)])
def test_heads_of_several_sizes_do_not_mix_in_silence(order: tuple[int, int], tmp_path: Path) -> None:
    model = base_net()
    for classes in order:
        model = convlora.load(model, with_other_head(tmp_path, classes)[1], name=f"of{classes}")
    with pytest.raises(convlora.ConvLoRAError, match="another shape than the base"):
        output(model, LIVES["unet"].batch(0))
    for classes in order:
        convlora.activate(model, f"of{classes}")
        assert output(model, LIVES["unet"].batch(0)).shape == (4, classes)


# --- what users do -----------------------------------------------------------------------------------------------


def test_merged_state_dict_is_that_of_eval_mode_and_touches_nothing() -> None:
    model = convlora.inject(base_net(), "body.*", rank=2, modules_to_save="head", rank_dropout=0.5)
    train(model, [LIVES["unet"].batch(1)])
    first = convlora.merged_state_dict(model, "default")
    before, state = snapshot(model), torch.get_rng_state()
    assert same(first, convlora.merged_state_dict(model))
    assert same(first, convlora.merged_state_dict(model, "default"))
    assert torch.equal(torch.get_rng_state(), state)
    assert snapshot(model) == before
    assert same(first, convlora.remove(convlora.merge(copy.deepcopy(model))).state_dict())


def test_a_distillation_by_the_base_keeps_the_base() -> None:
    model = injected("unet, statistics alone").train()
    distiller = convlora.distill.Distiller(model, ["down.0"])
    before = base_bits(model)
    distiller(LIVES["unet"].batch(1)).loss.backward()
    assert base_bits(model) == before
    assert copies_of(model)["down.1.num_batches_tracked"].item() == 1


# --- other code in the way ---------------------------------------------------------------------------------------


def test_factors_of_one_adapter_and_copies_of_another_on_one_layer() -> None:
    base, x = base_net(), LIVES["unet"].batch(0)
    model = convlora.inject(copy.deepcopy(base), "body.*", rank=1, name="a", bias=True)
    train(model, [x, x])
    convlora.activate(convlora.inject(model, "body.3", rank=1, name="b", modules_to_save="body.0"), "b")
    train(model, [x, x], convlora.parameters(model, "b"))
    for strengths in ({"a": 1.0, "b": 1.0}, {"a": 0.5, "b": -0.5}, {"b": 1.0}, {"a": 1.0}):
        live = output(convlora.activate(model, strengths), x)
        state = convlora.merged_state_dict(model)
        parts = [(convlora.adapter(model, name), strength) for name, strength in strengths.items()]
        assert same(apply_adapters(parts, base.state_dict()), state)
        twin = convlora.merge(copy.deepcopy(model))
        assert torch.equal(output(twin, x), live)
        assert same(convlora.remove(twin).state_dict(), state)
        with convlora.using(convlora.activate(model, []), strengths):
            assert torch.equal(output(model, x), live)


def test_a_bias_that_the_base_lacks_comes_and_goes() -> None:
    base, x = base_net(), LIVES["unet"].batch(0)
    base.head = nn.Linear(8, 5, bias=False)
    model = copy.deepcopy(base)
    model.head = nn.Linear(8, 6)
    model = train(convlora.inject(model, "body.*", rank=1, modules_to_save="head"), [x])
    loaded, live = convlora.load(copy.deepcopy(base), convlora.adapter(model)), output(model, x)
    assert torch.equal(output(loaded, x), live)
    with convlora.disabled(loaded):
        assert torch.equal(output(loaded, x), output(base, x))
    state = convlora.merged_state_dict(loaded)
    assert torch.equal(output(convlora.remove(convlora.merge(loaded)), x), live)
    assert same(loaded.state_dict(), state)


def test_copies_in_a_parameter_list_are_read_through_it() -> None:
    class Gains(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.gains = nn.ParameterList([nn.Parameter(torch.ones(3, 1, 1)), nn.Parameter(torch.zeros(1))])

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) * self.gains[0] + self.gains[1]  # type: ignore[no-any-return]

    torch.manual_seed(0)
    base, x = Gains(), LIVES["unet"].batch(0)
    model = train(convlora.inject(copy.deepcopy(base), "conv", rank=1, modules_to_save="gains"), [x, x])
    live = output(model, x)
    assert torch.equal(output(convlora.load(copy.deepcopy(base), convlora.adapter(model)), x), live)
    with convlora.disabled(model):
        assert torch.equal(output(model, x), output(base, x))
    assert torch.equal(output(convlora.remove(convlora.merge(model)), x), live)


def test_norms_that_are_converted_after_inject_are_named(tmp_path: Path) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(convlora.inject(base_net(), "body.*", rank=1))
    names = [f"body.{n}.{kind}" for n in (1, 4) for kind in nn.BatchNorm2d(1).state_dict()]
    assert convlora.changed(model) == names
    with pytest.warns(convlora.ConvLoRAWarning, match=r"10 Parameters or buffers .*body\.1\.running_mean"):
        convlora.save(model, tmp_path / "a.safetensors")


def test_samples_of_several_adapters_do_not_move_the_statistics_of_the_base() -> None:
    model = convlora.inject(base_net(), "body.*", rank=1).train()
    before = bits(model)
    refused = pytest.raises(convlora.ConvLoRAError, match=r"per_sample: running statistics would move in train mode")
    with refused, convlora.per_sample(model, ["default", None, None, "default"]):
        model(LIVES["unet"].batch(0))
    assert bits(model) == before


def test_a_norm_that_cannot_be_copied_is_refused_with_the_remedy() -> None:
    base = nn.Sequential(nn.Conv2d(3, 4, 1), torch.jit.script(nn.BatchNorm2d(4)))
    before = bits(base)
    with pytest.raises(convlora.ConvLoRAError, match=r"'1' cannot be adapted: .*norm_statistics='base' leaves"):
        convlora.inject(base, "0", rank=1)
    assert bits(base) == before
    with pytest.warns(convlora.ConvLoRAWarning, match="norm_statistics='base'"):
        model = convlora.inject(base, "0", rank=1, norm_statistics="base")
    assert convlora.changed(train(model, [LIVES["unet"].batch(0)])) == [f"1.{name}" for name in STATISTICS]


@pytest.mark.parametrize("assign", [False, True])
def test_a_base_checkpoint_reaches_the_base_and_not_what_was_trained(assign: bool) -> None:
    model, x = trained("nested head", 3), LIVES["nested head"].batch(0)
    other = LIVES["nested head"].base()
    train(other, [x], other.parameters())
    copies = values(copies_of(model))
    model.load_state_dict(other.state_dict(), assign=assign)
    assert same(copies_of(model), copies)
    with convlora.disabled(model):
        assert torch.equal(output(model, x), output(other, x))
    assert convlora.changed(model) == []


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_a_model_from_the_meta_device_takes_copies_from_its_checkpoint(how: str) -> None:
    with torch.device("meta"):
        model = convlora.inject(small(), "body.*", rank=1, modules_to_save="head")
    x = LIVES["unet"].batch(0)
    if how == "to_empty":  # the base's checkpoint: a fresh adapter
        plain = base_net().eval()
        model.to_empty(device="cpu").load_state_dict(plain.state_dict())
    else:
        plain = train(convlora.inject(base_net(), "body.*", rank=1, modules_to_save="head"), [x])
        model.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(output(model, x), output(plain, x))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), plain(x))
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


class Scaled(nn.Conv2d):
    """A convolution that keeps a running statistic itself."""

    running_max: Tensor

    def __init__(self) -> None:
        super().__init__(3, 3, 1)
        self.register_buffer("running_max", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.training:
            self.running_max.copy_(torch.maximum(self.running_max, y.detach().abs().max()))
        return y / (1 + self.running_max)


@pytest.mark.parametrize("statistics", ["adapter", "frozen"])
def test_a_target_that_keeps_statistics_keeps_its_factors_and_the_rest_is_said(statistics: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(Scaled(), nn.BatchNorm2d(3)), LIVES["unet"].batch(0)
    with pytest.warns(
        convlora.ConvLoRAWarning, match=r"1 of the selected layers \(first: '0'\) keep running statistics"
    ):
        model = convlora.inject(copy.deepcopy(base), "0", rank=1, norm_statistics=statistics)
    train(model, [x, x])
    assert convlora.changed(model) == ["0.running_max"]
    with pytest.warns(convlora.ConvLoRAWarning, match=r"outside the adapter .*0\.running_max"):
        convlora.save(model, tmp_path / "a.safetensors")
    base[0].running_max.copy_(model[0].running_max)
    assert torch.equal(output(convlora.load(base, tmp_path / "a.safetensors"), x), output(model, x))
