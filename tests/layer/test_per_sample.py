"""Several adapters in one batch."""

from __future__ import annotations

import copy

import pytest
import torch
from oracle import LAYERS, NET_INPUT, adapted_net, bits, build, randomise
from torch import Tensor, nn

import convlora

NAMES = ["rain", None, "fog", "rain", "fog"]


def two_adapters(model: nn.Module, **options: object) -> nn.Module:
    for name in ("rain", "fog"):
        convlora.inject(model, "*", rank=1, name=name, **options)  # type: ignore[arg-type]
        randomise(model, name)
    return model


def one_by_one(model: nn.Module, x: Tensor, names: list[str | None]) -> Tensor:
    rows = x.split(len(x) // len(names))
    outputs = []
    for name, row in zip(names, rows, strict=True):
        convlora.activate(model, [] if name is None else name)
        outputs.append(model(row))
    convlora.activate(model, {"rain": 0.5})
    return torch.cat(outputs)


@pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")
@pytest.mark.parametrize("hazard", [name for name, (_, _, shape) in LAYERS.items() if shape[0] == 2])
@pytest.mark.parametrize("factors", ["convlora", "locon"])
def test_each_sample_gets_its_adapter(hazard: str, factors: str) -> None:
    layer, x = build(hazard, torch.float64)
    has_bias = layer.bias is not None
    x = torch.cat([x, x + 1, x[:1] - 1])
    two_adapters(layer, factors=factors, bias=has_bias)
    with torch.no_grad():
        expected = one_by_one(layer, x, NAMES)
        with convlora.per_sample(layer, NAMES):
            for _ in range(2):  # the second time with weights that are kept
                torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12)


def test_gradients_reach_the_adapters_of_their_samples_only() -> None:
    layer = two_adapters(nn.Conv2d(3, 4, 3)).double()
    x = torch.randn(3, 3, 6, 6, dtype=torch.float64)
    names = ["fog", "rain", None]
    with convlora.per_sample(layer, names):
        layer(x)[:1].square().sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in convlora.parameters(layer, "rain"))
    found = [p.grad.clone() for p in convlora.parameters(layer, "fog") if p.grad is not None]
    layer.zero_grad()
    convlora.activate(layer, "fog")
    layer(x[:1]).square().sum().backward()
    for gradient, parameter in zip(found, convlora.parameters(layer, "fog"), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_the_state_comes_back_also_after_an_error() -> None:
    model = two_adapters(adapted_net(name="snow")).eval()
    convlora.activate(model, {"rain": 0.25, "snow": 2})
    x = torch.randn(NET_INPUT)
    with torch.no_grad():
        before, state = model(x), bits(model)
        with pytest.raises(ZeroDivisionError), convlora.per_sample(model, ["fog", None]):
            assert not torch.equal(model(x), before)
            with convlora.per_sample(model, [None, None]):
                base = model(x)
            with convlora.disabled(copy.deepcopy(model)) as off:
                assert torch.equal(base, off(x))
            raise ZeroDivisionError
        assert torch.equal(model(x), before)
    assert bits(model) == state


def test_folded_rows_belong_to_samples_in_turn() -> None:
    layer = two_adapters(nn.Linear(4, 3)).double()
    windows = torch.randn(6, 5, 4, dtype=torch.float64)  # three samples of two windows
    names = ["rain", "fog", None]
    with torch.no_grad():
        expected = one_by_one(layer, windows, names)
        with convlora.per_sample(layer, names, folded=True):
            torch.testing.assert_close(layer(windows), expected)
        with convlora.per_sample(layer, names), pytest.raises(convlora.ConvLoRAError, match="say folded=True"):
            layer(windows)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "expected a list"),
        ("rain", "expected a list"),
        (["rain", "hail"], "hail"),
        (["rain", 3], "3"),
    ],
)  # fmt: skip
def test_wrong_names_are_refused(names: object, message: str) -> None:
    model = two_adapters(nn.Conv2d(3, 4, 3))
    with pytest.raises(convlora.ConvLoRAError, match=message), convlora.per_sample(model, names):  # type: ignore[arg-type]
        pass


def test_merged_models_other_batches_and_other_readers_are_refused() -> None:
    class Reader(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight * 2)

    x = torch.randn(2, 3, 6, 6)
    model = two_adapters(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with convlora.per_sample(model, ["rain"] * 3), pytest.raises(convlora.ConvLoRAError, match="3 names for a layer"):
        model(x)
    with convlora.per_sample(model, ["rain"] * 3), pytest.raises(convlora.ConvLoRAError, match="3 names for a layer"):
        model(x[0])
    with (
        pytest.raises(convlora.ConvLoRAError, match="unmerge first"),
        convlora.per_sample(convlora.merge(model), ["rain", "fog"]),
    ):
        pass
    reader = two_adapters(Reader(3, 4, 3))
    with convlora.per_sample(reader, ["rain", "fog"]), pytest.raises(convlora.ConvLoRAError, match="run the samples"):
        reader(x)


def test_a_copy_made_inside_is_an_ordinary_model() -> None:
    model = two_adapters(nn.Conv2d(3, 4, 3))
    x = torch.randn(1, 3, 6, 6)
    with convlora.per_sample(model, ["rain", "fog"]):
        inside = copy.deepcopy(model)
    assert torch.equal(convlora.activate(inside, "fog")(x), convlora.activate(model, "fog")(x))
