"""An adapter of a network inside of another, or of a wrapped one, on the other: names that differ by a prefix."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lives import LIVES, output, trained
from oracle import FACTORS, NET_INPUT, NET_LAYERS, net, randomise, snapshot
from torch import nn

import convlora
from convlora import Adapter, formats


class Around(nn.Module):
    """A network inside of another, as `net`."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.net = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)  # type: ignore[no-any-return]


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return net().eval()


def file_of(model: nn.Module, path: Path, **options: Any) -> nn.Module:
    """An injected model as if trained, and its adapter as a file."""
    options = {"targets": "*", "rank": 2, "alpha": 3, "bias": True, "norm_statistics": "frozen", **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convlora.ConvLoRAWarning)
        convlora.save(randomise(convlora.inject(model, **options)), path)
    return model


@pytest.mark.parametrize("prefix", ["", "net.", "net"])
@pytest.mark.parametrize("direction", ["onto the part", "onto the whole"])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_the_whole_loads_onto_the_part_and_back(
    dtype: torch.dtype, factors: str, direction: str, prefix: str, tmp_path: Path
) -> None:
    part, whole = base().to(dtype), Around(base()).to(dtype).eval()
    of, onto = (whole, part) if direction == "onto the part" else (part, whole)
    file_of(of, tmp_path / "a.safetensors", factors=factors)
    x = torch.randn(NET_INPUT).to(dtype)
    assert convlora.load(onto, tmp_path / "a.safetensors", prefix=prefix) is onto  # no warning of another base
    assert torch.equal(output(onto, x), output(of, x))
    loaded, original = convlora.adapter(onto), convlora.adapter(of)
    start = "" if direction == "onto the part" else "net."
    assert list(loaded.layers) == [start + path for path in NET_LAYERS]
    assert [layer.alpha for layer in loaded.layers.values()] == [layer.alpha for layer in original.layers.values()]
    fresh = base().to(dtype) if onto is part else Around(base()).to(dtype)
    convlora.inject(fresh, config=loaded.config)  # its config names the layers of the model that it is on now
    assert list(convlora.adapter(fresh).layers) == list(loaded.layers)
    convlora.save(onto, tmp_path / "b.safetensors")
    convlora.load(of, tmp_path / "b.safetensors")  # and back, a hot swap
    assert torch.equal(output(of, x), output(onto, x))


@pytest.mark.parametrize("name", ["unet", "nested head", "used twice", "instance norm"])
def test_copies_and_shared_modules_come_along(name: str, tmp_path: Path) -> None:
    model, x = trained(name), LIVES[name].batch(0)
    convlora.save(model, tmp_path / "a.safetensors")
    whole = Around(LIVES[name].base())
    convlora.load(whole, tmp_path / "a.safetensors")
    assert torch.equal(output(whole, x), output(model, x))
    convlora.save(whole, tmp_path / "b.safetensors")
    part = convlora.load(LIVES[name].base(), tmp_path / "b.safetensors")
    assert torch.equal(output(part, x), output(model, x))
    before, after = Adapter.read(tmp_path / "a.safetensors"), convlora.adapter(part)
    assert list(after.layers) == list(before.layers)
    assert list(after.modules) == list(before.modules)
    assert after.fingerprint == before.fingerprint


def test_a_peft_adapter_of_a_compiled_network_loads(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))
    plain = nn.Sequential(OrderedDict((name, child) for name, child in model.named_children()))
    fresh = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3))
    fresh.load_state_dict(plain.state_dict())
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
    adapted = peft.get_peft_model(torch.compile(model, backend="eager"), config)
    adapted.save_pretrained(tmp_path / "peft")
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        convlora.load(fresh, formats.read(tmp_path / "peft"))
        torch.testing.assert_close(fresh(x), adapted(x))


def test_what_fits_below_several_prefixes_is_not_guessed(tmp_path: Path) -> None:
    of = file_of(base(), tmp_path / "a.safetensors")
    model = nn.ModuleDict({"student": base(), "teacher": base()})
    before = snapshot(model)
    ways = r"several ways, with 'student\.' before them, with 'teacher\.' before them: say which by prefix="
    with pytest.raises(convlora.ConvLoRAError, match=rf"unexpected: 0, 3, 4, 6; its names fit in {ways}") as caught:
        convlora.load(model, tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before
    convlora.load(model, tmp_path / "a.safetensors", prefix="teacher.")
    x = torch.randn(NET_INPUT)
    assert torch.equal(output(model["teacher"], x), output(of, x))
    assert not torch.equal(output(model["student"], x), output(of, x))


def test_every_layer_has_to_fit_under_the_prefix(tmp_path: Path) -> None:
    file_of(base(), tmp_path / "a.safetensors")
    other = base()
    other[6] = nn.Linear(32, 5)  # of another shape
    whole = Around(other)
    before = snapshot(whole)
    with pytest.raises(convlora.ConvLoRAError, match=r"unexpected: 0, 3, 4, 6; nearest: 'net\.0'"):
        convlora.load(whole, tmp_path / "a.safetensors")
    with pytest.raises(convlora.ConvLoRAError, match=r"mismatched: net\.6 \(the file has weight \(5, 64\)"):
        convlora.load(whole, tmp_path / "a.safetensors", prefix="net.")
    with pytest.raises(convlora.ConvLoRAError, match="prefix 'gone' neither added nor taken away"):
        convlora.load(whole, tmp_path / "a.safetensors", prefix="gone")
    with pytest.raises(convlora.ConvLoRAError, match=r"prefix \(=3\) must be a string"):
        convlora.load(whole, tmp_path / "a.safetensors", prefix=3)  # type: ignore[arg-type]
    assert snapshot(whole) == before
    with pytest.warns(convlora.ConvLoRAWarning, match=r"left out what does not fit: mismatched: net\.6"):
        convlora.load(whole, tmp_path / "a.safetensors", prefix="net.", strict=False)
    assert list(convlora.adapter(whole).layers) == ["net.0", "net.3", "net.4"]


def test_names_that_fit_as_they_are_stay(tmp_path: Path) -> None:
    """Of a network that has the layers twice, with and without the prefix."""
    model = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "net": nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3)})})
    randomise(convlora.inject(model, "re:conv", rank=1))
    convlora.save(model, tmp_path / "a.safetensors")
    fresh = nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3), "net": nn.ModuleDict({"conv": nn.Conv2d(3, 8, 3)})})
    fresh.load_state_dict({k: v for k, v in model.state_dict().items() if ".convlora." not in k})
    convlora.load(fresh, tmp_path / "a.safetensors")
    convlora.load(fresh, tmp_path / "a.safetensors", prefix="other.", name="again")  # a prefix that is not needed
    assert [list(convlora.adapter(fresh, name).layers) for name in ("default", "again")] == [["conv"], ["conv"]]
    with pytest.warns(convlora.ConvLoRAWarning, match=r"another base.*; its names fit with 'net\.' before them"):
        convlora.load(fresh, tmp_path / "a.safetensors", prefix="net.", name="inside")
    assert list(convlora.adapter(fresh, "inside").layers) == ["net.conv"]


def test_the_adapter_that_is_to_be_swapped_tells_which_prefix(tmp_path: Path) -> None:
    of = file_of(base(), tmp_path / "a.safetensors")
    model = nn.ModuleDict({"student": base(), "teacher": base()})
    convlora.inject(model, "student.*", rank=2, bias=True)
    convlora.load(model, tmp_path / "a.safetensors")
    x = torch.randn(NET_INPUT)
    assert torch.equal(output(model["student"], x), output(of, x))


def test_a_swap_that_cannot_be_is_told_by_the_names_of_the_model(tmp_path: Path) -> None:
    file_of(Around(base()), tmp_path / "a.safetensors", rank=3)
    model = convlora.inject(base(), "*", rank=1, bias=True)
    higher = (
        r"mismatched: 0 \(the file has rank 3, the adapter on the model rank 1\), 3 .*; its names fit without 'net\.'"
    )
    with pytest.raises(convlora.ConvLoRAError, match=higher):
        convlora.load(model, tmp_path / "a.safetensors")


def test_names_of_a_network_in_a_sequence_fit_below_its_number() -> None:
    model = nn.Sequential(
        nn.Identity(), base(), nn.Flatten(), nn.Linear(1, 1), nn.Identity(), nn.Identity(), nn.Identity()
    )
    of = randomise(convlora.inject(base(), "*", rank=1))  # "0" … "6" are names of the model, too, of other modules
    convlora.load(model, convlora.adapter(of))
    assert list(convlora.adapter(model).layers) == [f"1.{path}" for path in NET_LAYERS]


def test_a_layer_alone_is_found_in_a_network_and_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer, model = nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(3, 8, 3))
    model[1].load_state_dict(layer.state_dict())
    of = randomise(convlora.inject(layer, "*", rank=1))
    x = torch.randn(1, 3, 6, 6)
    convlora.load(model, convlora.adapter(of))
    assert torch.equal(model[1](x), of(x))
    alone = nn.Conv2d(3, 8, 3)
    alone.load_state_dict({k: v for k, v in layer.state_dict().items() if "convlora" not in k})
    convlora.load(alone, convlora.adapter(model))
    assert torch.equal(alone(x), of(x))


def test_the_model_itself_is_never_a_nearest_name() -> None:
    other = nn.Sequential(nn.Conv2d(1, 1, 1))
    with pytest.raises(convlora.ConvLoRAError, match=r"unexpected: deep\.conv; nearest: '0'$"):
        convlora.load(other, convlora.adapter(randomise(convlora.inject(nn.Sequential(
            OrderedDict(deep=nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3))))), "*", rank=1))))  # fmt: skip
    with pytest.raises(convlora.ConvLoRAError, match="there is none"):
        convlora.load(nn.Flatten(), convlora.adapter(convlora.inject(net(), ["0", "3"], rank=1)))
