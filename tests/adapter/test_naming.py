"""`Adapter.rename`: other names, the same updates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import FACTORS, NET_LAYERS, adapted_net
from torch import nn

import convlora
from convlora import Adapter
from convlora.adapter.naming import other_prefixes

GIVEN: dict[str, tuple[Any, list[str]]] = {
    "a start for all": ({"": "net"}, ["net.0", "net.3", "net.4", "net.6"]),
    "written as a prefix": ({"": "net.", "6.": "head."}, ["net.0", "net.3", "net.4", "head"]),
    "one layer": ({"3": "body.conv"}, ["0", "body.conv", "4", "6"]),
    "two change places": ({"0": "3", "3": "0"}, ["3", "0", "4", "6"]),
    "the longest wins": ({"": "net", "6": "head"}, ["net.0", "net.3", "net.4", "head"]),
    "a function": (lambda path: f"m{path}.x", ["m0.x", "m3.x", "m4.x", "m6.x"]),
}


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("given", GIVEN)
def test_rename_gives_the_same_updates_by_other_names(given: str, factors: str, tmp_path: Path) -> None:
    names, expected = GIVEN[given]
    options = dict(rank=2, alpha=3, ranks={"6": 1}, alphas={"0": 0.5}, rank_scaling="sqrt", bias=True, name="rain")
    adapter = convlora.adapter(adapted_net(factors=factors, **options))
    other = adapter.rename(names)
    assert list(other.layers) == expected
    for old, new in zip(adapter.layers, other.layers, strict=True):
        weight = torch.randn(adapter.layers[old].spec.shape)
        assert torch.equal(adapter.delta(old, weight), other.delta(new, weight))
        assert torch.equal(adapter.layers[old].tensors["lora_bias"], other.layers[new].tensors["lora_bias"])
    assert other.config.name == "rain"
    assert other.fingerprint is None  # it covers names
    assert list(adapter.layers) == NET_LAYERS
    other.write(tmp_path / "a.safetensors")
    again = Adapter.read(tmp_path / "a.safetensors")
    assert again.config == other.config
    assert [layer.rank for layer in again.layers.values()] == [2, 2, 2, 1]


def test_a_renamed_config_selects_the_renamed_layers() -> None:
    adapter = convlora.adapter(adapted_net(rank=2, ranks={"6": 1}, alphas={"0": 0.5})).rename({"": "net"})
    model = nn.ModuleDict({"net": convlora.remove(adapted_net())})
    made = convlora.adapter(convlora.inject(model, config=adapter.config))
    assert [(path, layer.rank, layer.alpha) for path, layer in made.layers.items()] == [
        (path, layer.rank, layer.alpha) for path, layer in adapter.layers.items()
    ]


def test_rename_takes_aliases_copies_and_errors_along() -> None:
    torch.manual_seed(0)
    shared = nn.Conv2d(4, 4, 3, padding=1)
    model = nn.Sequential(shared, nn.BatchNorm2d(4), shared, nn.Conv2d(4, 4, 3, padding=1))
    convlora.inject(model, ["0"], rank=2, modules_to_save="3")
    model.train()(torch.randn(4, 4, 6, 6))  # the statistics move
    adapter = convlora.adapter(model).resize(rank=1)
    other = adapter.rename({"": "net", "2": "again"})
    assert other.layers["net.0"].aliases == ("again",)
    assert set(other.modules) == {"net.1", "net.3"}
    assert other.config.modules_to_save == (r"re:net\.3",)  # statistics are no modules to save
    assert other.errors == {"net.0": adapter.errors["0"]}
    assert all(other.modules[f"net.{path}"][n] is t for path, own in adapter.modules.items() for n, t in own.items())


def test_names_that_change_nothing_give_the_adapter_itself() -> None:
    adapter = convlora.adapter(adapted_net())
    assert adapter.rename(lambda path: path) is adapter
    assert adapter.rename({"0": "0"}) is adapter


WRONG: dict[str, tuple[Any, str]] = {
    "collision": ({"0": "3"}, "'0', '3' would all be named '3'"),
    "collision by a function": (lambda path: "x", "would all be named 'x'"),
    "unknown": ({"body": "x"}, "the adapter has nothing at 'body'; nearest: "),
    "unknown below": ({"0.conv": "x"}, "the adapter has nothing at '0.conv'"),
    "no path": (lambda path: None, r"the new name of '0' \(=None\) must be a dotted path"),
    "an empty part": ({"0": "net..0"}, r"the new name of '0' \(='net\.\.0'\) must be a dotted path"),
    "a leading dot": (lambda path: f".{path}", r"the new name of '0' \(='\.0'\) must be a dotted path"),
    "no string": ({"0": 1}, r"expected \{path: path\}, both strings, got \{'0': 1\}"),
    "neither": ("net.", r"expected \{path: path\} or a function of a path, got 'net\.'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_names_that_cannot_be_are_one_clear_error(case: str) -> None:
    names, message = WRONG[case]
    with pytest.raises(convlora.ConvLoRAError, match=rf"^Adapter\.rename: .*{message}") as caught:
        convlora.adapter(adapted_net()).rename(names)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("rename", [lambda p: f"a.b.{p}", lambda p: f"a.{p}", lambda p: p])
def test_other_prefixes_are_those_by_which_every_name_is_known(rename: Callable[[str], str]) -> None:
    adapter = convlora.adapter(adapted_net()).rename(rename)
    known = [f"x.{path}" for path in ["a.b.0", *adapter.layers]] + [*adapter.layers]
    assert other_prefixes(adapter, known) == [{"": "x"}]
    assert other_prefixes(adapter, known, "x.") == [{"": "x"}]
    assert other_prefixes(adapter, known, "y.") == []
    depth = rename("0").count(".")
    bare = other_prefixes(adapter, NET_LAYERS)
    assert bare == ([{rename("0")[:-2]: ""}] if depth else [])


def test_apply_to_says_which_renaming_fits() -> None:
    model = adapted_net()
    adapter = convlora.adapter(model).rename({"": "net"})
    state = convlora.remove(model).state_dict()
    with pytest.raises(convlora.ConvLoRAError, match=r"missing: net\.0\.weight.*; it fits by rename\({'net': ''}\)"):
        adapter.apply_to(state)
    assert list(adapter.rename({"net": ""}).apply_to(state)) == list(state)
