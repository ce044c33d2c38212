"""A strength for each layer: what acts is `base + strength·change` layer by layer, wherever strengths are taken."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import LIVES, output, trained
from oracle import FACTORS, NET_INPUT, NET_LAYERS, PRODUCTS, adapted_net, bytes_of, net, randomise, snapshot
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import convlora
from convlora import Adapter
from convlora.adapter.checkpoint import apply_adapters
from convlora.layer.adapted import slot_of

BY_LAYER = {"*": 0.7, "[34]": -0.5, "re:4": 0.0}  # the last that matches wins
EACH = {"0": 0.7, "3": -0.5, "4": 0.0, "6": 0.7}


def two(factors: str = "convlora", dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = adapted_net(name="rain", factors=factors, rank=2, alpha=3, bias=True).to(dtype)
    convlora.inject(model, ["0", "3"], rank=1, factors=factors, name="snow")
    return randomise(model, "snow").eval()  # type: ignore[no-any-return]


def effective(model: nn.Module) -> dict[str, Tensor]:
    names = [(path, kind) for path in NET_LAYERS for kind in ("weight", "bias")]
    return {f"{path}.{kind}": getattr(model.get_submodule(path), kind).detach() for path, kind in names}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("factors", FACTORS)
def test_each_layer_has_the_strength_of_the_last_pattern_that_matches(factors: str, dtype: torch.dtype) -> None:
    model = two(factors, dtype)
    convlora.activate(model, {"rain": BY_LAYER, "snow": {"3": 2.0}})
    found = effective(model)
    for path in NET_LAYERS:
        rest = {"snow": {"0": 1.0, "3": 2.0}[path]} if path in ("0", "3") else {}
        convlora.activate(model, {"rain": EACH[path], **rest})
        alone = effective(model)
        assert all(torch.equal(found[f"{path}.{kind}"], alone[f"{path}.{kind}"]) for kind in ("weight", "bias"))
    assert model[4].weight is not None
    convlora.activate(model, {"rain": BY_LAYER})
    assert model[4].weight is model[4]._parameters["weight"]  # strength 0: it does not act there


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", FACTORS)
def test_all_places_that_take_strengths_agree_bitwise(factors: str, dtype: torch.dtype) -> None:
    model, x = two(factors, dtype), torch.randn(NET_INPUT).to(dtype)
    strengths: dict[str, Any] = {"rain": BY_LAYER, "snow": 0.3}
    adapters = [(convlora.adapter(model, name), strength) for name, strength in strengths.items()]
    base = convlora.remove(copy.deepcopy(model)).state_dict()
    with convlora.using(model, strengths):
        y = output(model, x)
        of_block = {entry.name: entry.strength for entry in convlora.summary(model).layers if entry.adapter == "rain"}
    assert of_block == EACH
    before = snapshot(model)
    state = convlora.merged_state_dict(model, strengths)
    assert snapshot(model) == before
    live = convlora.activate(copy.deepcopy(model), strengths)
    assert torch.equal(output(live, x), y)
    with convlora.disabled(live):
        assert not torch.equal(output(live, x), y)
    with convlora.merged(live):
        assert torch.equal(output(live, x), y)
    assert torch.equal(output(live, x), y)
    fused = convlora.merge(copy.deepcopy(model), strengths)
    assert torch.equal(output(fused, x), y)
    convlora.unmerge(fused)
    assert torch.equal(output(fused, x), output(model, x))  # the former strengths
    plain = convlora.remove(convlora.merge(copy.deepcopy(model), strengths))
    applied = apply_adapters(adapters, base)
    for other in (state, applied):
        assert {k: bytes_of(v) for k, v in other.items()} == {k: bytes_of(v) for k, v in plain.state_dict().items()}


@pytest.mark.parametrize("factors", PRODUCTS)
def test_combine_takes_weights_by_layer(factors: str) -> None:
    model = two(factors)
    rain, snow = (convlora.adapter(model, name) for name in ("rain", "snow"))
    both = Adapter.combine([rain, snow], [BY_LAYER, 0.3])
    for path in NET_LAYERS:
        expected = EACH[path] * rain.delta(path) + (0.3 * snow.delta(path) if path in snow.layers else 0)
        torch.testing.assert_close(both.delta(path), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["unet", "nested head", "instance norm"])
def test_copies_are_matched_by_their_modules(name: str, tmp_path: Path) -> None:
    model, x = trained(name), LIVES[name].batch(0)
    convlora.save(model, tmp_path / "a.safetensors")
    adapter = Adapter.read(tmp_path / "a.safetensors")
    copied = next(reversed(adapter.modules))
    strength = {"*": 0.25, f"re:{copied}": 0.0}
    convlora.activate(model, {"default": strength})
    own = model.get_submodule(copied)
    for kind, base in own._parameters.items() | own._buffers.items():
        assert base is None or getattr(own, kind) is base
    y = output(model, x)
    applied = adapter.apply_to(LIVES[name].base().state_dict(), strength)
    fresh = LIVES[name].base()
    fresh.load_state_dict(applied)
    assert torch.equal(output(fresh, x), y)
    assert all(torch.equal(v, applied[k]) for k, v in convlora.merged_state_dict(model).items())


def test_the_state_survives_deepcopy_pickle_and_blocks() -> None:
    model, x = two(), torch.randn(NET_INPUT)
    convlora.activate(model, {"rain": BY_LAYER})
    y = output(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, x), y)
        assert {p: slot_of(twin[int(p)]).strengths() for p in NET_LAYERS} == {
            p: {"rain": s} if s else {} for p, s in EACH.items()
        }
    with convlora.disabled(model), convlora.using(model, "snow"):
        assert not torch.equal(output(model, x), y)
    assert torch.equal(output(model, x), y)
    assert not any("strength" in key for key in model.state_dict())


def test_strengths_by_layer_recompile_nothing() -> None:
    model, x = convlora.remove(two(), "snow").eval(), torch.randn(NET_INPUT)
    count = CompileCounter()
    run = torch.compile(model, backend=count, fullgraph=True)
    with torch.no_grad():
        run(x)
        frames = count.frame_count
        for strength in ({"*": 0.5, "3": 2.0}, {"*": -1.0}, {"[06]": 0.1}):
            convlora.activate(model, {"rain": strength})
            torch.testing.assert_close(run(x), model(x))
        assert count.frame_count == frames


def test_summary_shows_strengths_where_they_are_not_one() -> None:
    model = two()
    assert "strength" not in str(convlora.summary(model))
    convlora.activate(model, {"rain": BY_LAYER})
    report = convlora.summary(model)
    assert {e.name: e.strength for e in report.layers if e.adapter == "rain"} == EACH
    assert {e.strength for e in report.layers if e.adapter == "snow"} == {0.0}
    lines = str(report).splitlines()
    assert lines[0].endswith("strength")
    assert [line.split()[-1] for line in lines if " rain " in line] == ["0.7", "-0.5", "0", "0.7"]


WRONG: dict[str, tuple[Any, str]] = {
    "no layer": ({"body.*": 0.5}, r"strength of 'rain' pattern 'body\.\*' matches none of the layers; nearest: "),
    "a layer without this adapter": ({"2": 0.5}, "strength of 'rain' pattern '2' matches none of the layers"),
    "no number": ({"0": "much"}, r"strength of 'rain' for '0' \(='much'\) must be a finite number"),
    "not finite": ({"*": float("nan")}, r"strength of 'rain' for '\*' \(=nan\) must be a finite number"),
    "no pattern": ({0: 1.0}, r"strength of 'rain' for 0 \(=1\.0\) must be"),
    "no expression": ({"re:(": 1.0}, r"'re:\(' is no regular expression"),
    "a list": ([0.5], r"strength of 'rain' \(=\[0\.5\]\) must be a finite number"),
}


@pytest.mark.parametrize("call", ["activate", "merge", "using", "merged_state_dict"])
@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_strength_is_one_clear_error_and_changes_nothing(case: str, call: str) -> None:
    strength, message = WRONG[case]
    model = two()
    before = snapshot(model)
    with pytest.raises(convlora.ConvLoRAError, match=message) as caught:
        if call == "using":
            with convlora.using(model, {"rain": strength}):
                pass
        else:
            getattr(convlora, call)(model, {"rain": strength})
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before
    with pytest.raises(convlora.ConvLoRAError, match=message.replace(" of 'rain'", "")):
        convlora.adapter(model, "rain").apply_to(net().state_dict(), strength)


def test_a_copy_of_another_shape_acts_whole_or_not_at_all() -> None:
    base = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8, 5))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8, 2))
    adapter = convlora.adapter(randomise(convlora.inject(model, "0", rank=1, modules_to_save="2")))
    adapter = Adapter(adapter.config, adapter.layers, None, modules=adapter.modules)
    convlora.load(base, adapter)
    x = torch.randn(4, 3, 1, 1)
    assert output(convlora.activate(base, {"default": {"0": 0.5}}), x).shape == (4, 2)
    assert output(convlora.activate(base, {"default": {"2": 0.0}}), x).shape == (4, 5)
    with pytest.raises(convlora.ConvLoRAError, match=r"has '2\.weight' in another shape than the base"):
        convlora.activate(base, {"default": {"2": 0.5}})
