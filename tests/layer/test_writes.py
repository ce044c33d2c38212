"""Other people's code writes to an adapted layer: it is refused, or changes nothing that later calls compute."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import LAYERS, bits, randomise
from torch import Tensor, nn
from torch.ao.quantization import fuse_modules
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import convlora

STATES: dict[str, Callable[[nn.Module], Any]] = {
    "live": lambda model: None,
    "merged": convlora.merge,
    "at half strength": lambda model: convlora.activate(model, {"default": 0.5}),
    "merged at half strength": lambda model: convlora.merge(convlora.activate(model, {"default": 0.5})),
}


def conv_and_norm(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=bias), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()


def live(base: nn.Module | None = None, **options: Any) -> nn.Module:
    model = convlora.inject(conv_and_norm() if base is None else base, "*", rank=2, **options)
    return randomise(model).eval()


def fuse(model: Any) -> None:
    model[0], model[1] = fuse_conv_bn_eval(model[0], model[1]), nn.Identity()


def fuse_in_place(model: Any) -> None:
    """As detection libraries do to convolutions without a bias, before they predict."""
    conv, norm = model[0], model[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * scale
    bias = shift if conv.bias is None else conv.bias * scale + shift
    if conv.bias is None:
        conv.register_parameter("bias", nn.Parameter(bias))
    else:
        conv.bias = nn.Parameter(bias)
    conv.weight.data = conv.weight * scale[:, None, None, None]
    model[1] = nn.Identity()


def quietly(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def run(model: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch deprecates what people use
            change(model)

    return run


ASSIGNMENTS: dict[str, Callable[[Any], Any]] = {
    "weight": lambda m: setattr(m[3], "weight", nn.Parameter(m[3].weight.detach().clone())),
    "bias": lambda m: setattr(m[3], "bias", nn.Parameter(m[3].bias.detach().clone())),
    "None": lambda m: setattr(m[3], "bias", None),
    "register_parameter": lambda m: m[3].register_parameter("weight", nn.Parameter(m[3].weight.detach())),
    "del": lambda m: delattr(m[3], "weight"),
    "fuse_conv_bn_eval": fuse,
    "fusion in place": fuse_in_place,
    "weight_norm": lambda m: parametrizations.weight_norm(m[3]),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m[3]),
    "legacy weight_norm": quietly(lambda m: nn.utils.weight_norm(m[3])),
    "legacy weight_norm of the bias": quietly(lambda m: nn.utils.weight_norm(m[3], "bias")),
    "legacy spectral_norm": quietly(lambda m: nn.utils.spectral_norm(m[3])),
    "prune": lambda m: prune.l1_unstructured(m[3], "weight", 0.5),
    "prune the bias": lambda m: prune.random_unstructured(m[3], "bias", 0.5),
    "prune globally": lambda m: prune.global_unstructured(
        [(m[0], "weight"), (m[3], "weight")], prune.L1Unstructured, amount=0.5
    ),
}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("change", ASSIGNMENTS)
def test_replacing_a_tensor_of_an_acting_layer_is_refused_and_changes_nothing(change: str, state: str) -> None:
    model, x = live(), torch.randn(2, 3, 9, 9)
    STATES[state](model)
    with torch.no_grad():
        y, before = model(x), bits(model)
        with pytest.raises(convlora.ConvLoRAError, match=r"merge\(model\) and remove\(model\) first"):
            ASSIGNMENTS[change](model)
        assert torch.equal(model(x), y)
        assert bits(model) == before
        assert torch.equal(convlora.remove(convlora.merge(model))(x), y)


def test_a_fusion_that_adds_a_bias_is_refused() -> None:
    model = live(conv_and_norm(bias=False))
    with pytest.raises(convlora.ConvLoRAError, match=r"Conv2d\.bias cannot be set"):
        fuse_in_place(model)
    assert isinstance(model[1], nn.BatchNorm2d)  # type: ignore[index]


@pytest.mark.parametrize("change", ["weight", "bias", "fuse_conv_bn_eval", "legacy weight_norm", "prune"])
def test_after_merge_and_remove_all_of_it_works(change: str) -> None:
    model, x = convlora.remove(convlora.merge(live())), torch.randn(2, 3, 9, 9)
    y = model(x)
    ASSIGNMENTS[change](model)
    if change != "prune":
        torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize("change", [name for name in ASSIGNMENTS if name != "del"])
def test_a_layer_on_which_no_adapter_acts_is_the_base_s(change: str) -> None:
    plain, x = conv_and_norm(), torch.randn(2, 3, 9, 9)
    model = convlora.activate(live(copy.deepcopy(plain)), [])
    torch.manual_seed(0)
    ASSIGNMENTS[change](plain)
    torch.manual_seed(0)
    ASSIGNMENTS[change](model)
    assert torch.equal(model(x), plain(x))


def test_modules_to_save_are_trained_in_place() -> None:
    model: Any = convlora.inject(conv_and_norm(), "0", rank=1, modules_to_save="3")
    with pytest.raises(convlora.ConvLoRAError, match=r"Conv2d\.weight cannot be set"):
        model[3].weight = nn.Parameter(torch.zeros(4, 8, 3, 3))
    with torch.no_grad():
        model[3].weight.zero_()  # the adapter's own copy
    assert not convlora.adapter(model).modules["3"]["weight"].any()
    assert convlora.remove(model)[3].weight.any()  # type: ignore[index, union-attr]


# --- writes into what is read ------------------------------------------------------------------------------------

WRITES: dict[str, Callable[[Any], Any]] = {
    "nn.init": lambda layer: nn.init.zeros_(layer.weight),
    ".data": lambda layer: layer.weight.data.zero_(),
    "a view": lambda layer: layer.weight.detach().flatten()[0].fill_(100),
    "mul_": lambda layer: layer.weight.mul_(2),
    "numpy": lambda layer: layer.weight.detach().numpy().fill(0),
    "the bias": lambda layer: layer.bias.data.zero_(),
    ".data =": lambda layer: setattr(layer.weight, "data", torch.zeros_like(layer.weight)),
}


@pytest.mark.parametrize("warm", [True, False], ids=["kept", "not kept"])
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("kind", ["plain", "groups", "transposed2d", "conv1d", "conv3d", "linear"])
@torch.no_grad()
def test_a_write_into_an_effective_tensor_changes_no_later_call(kind: str, write: str, state: str, warm: bool) -> None:
    made, arguments, shape = LAYERS[kind]
    layer, x = live(made(**arguments), bias=True), torch.randn(shape)
    STATES[state](layer)
    twin = copy.deepcopy(layer)
    if warm:
        layer(x)
    WRITES[write](layer)
    y = twin(x)
    assert torch.equal(layer(x), y)
    assert torch.equal(copy.deepcopy(layer)(x), y)
    assert bits(layer) == bits(twin)
    assert torch.equal(convlora.remove(convlora.merge(layer))(x), y)


@torch.no_grad()
def test_a_write_inside_a_caller_s_choice_changes_no_later_call() -> None:
    layer, x = convlora.activate(live(nn.Conv2d(6, 8, 3)), []), torch.randn(1, 6, 5, 5)
    with convlora.using(layer, "default"):
        y = layer(x)
        layer.weight.zero_()  # type: ignore[operator]
        assert torch.equal(layer(x), y)
        with pytest.raises(convlora.ConvLoRAError, match="cannot be set"):
            layer.weight = nn.Parameter(layer.weight)  # type: ignore[arg-type]


class Clamped(nn.Conv2d):
    """A forward of its own that writes into the weight that it reads."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        weight.data.mul_(0.5)
        return F.conv2d(input, weight, self.bias)


@torch.no_grad()
def test_a_forward_that_writes_into_its_weight_does_not_add_up() -> None:
    layer, x = convlora.merge(live(Clamped(6, 8, 3))), torch.randn(1, 6, 5, 5)
    assert torch.equal(layer(x), layer(x))


@torch.no_grad()
def test_the_layer_itself_computes_with_what_is_kept() -> None:
    layer: Any = live(nn.Conv2d(6, 8, 3))
    layer(torch.randn(1, 6, 5, 5))
    kept = layer.convlora._fused["weight"].value
    layer(torch.randn(1, 6, 5, 5))
    assert layer.convlora._fused["weight"].value is kept
    assert layer.weight is not kept
    assert layer.weight.data_ptr() != kept.data_ptr()


# --- norms that are taken off, scripts, quantisers -----------------------------------------------------------------


def test_remove_weight_norm_leaves_the_base_and_the_adapter() -> None:
    layer: Any = nn.Conv2d(6, 8, 3)
    quietly(nn.utils.weight_norm)(layer)
    model, x = live(layer), torch.randn(1, 6, 6, 6)
    y = model(x)
    nn.utils.remove_weight_norm(model)
    torch.testing.assert_close(model(x), y)
    torch.testing.assert_close(convlora.merge(model)(x), y)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning", "ignore:`torch.jit.script`:DeprecationWarning")
def test_script_says_what_to_do(state: str) -> None:
    model, x = live(), torch.randn(1, 3, 9, 9)
    STATES[state](model)
    y, classes = model(x), [type(module) for module in model]  # type: ignore[attr-defined]
    with pytest.raises(convlora.ConvLoRAError, match=r"merge\(model\) and remove\(model\) first"):
        torch.jit.script(model)
    assert [type(module) for module in model] == classes  # type: ignore[attr-defined]
    assert torch.equal(model(x), y)
    plain = convlora.remove(convlora.merge(model))
    assert torch.equal(torch.jit.script(plain)(x), plain(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_fuse_modules_refuses_an_adapted_layer_and_takes_a_plain_one() -> None:
    model, x = live(), torch.randn(2, 3, 9, 9)
    with pytest.raises((AssertionError, NotImplementedError), match="Adapted"):
        fuse_modules(model, [["0", "1", "2"]])
    plain = convlora.remove(convlora.merge(model))
    torch.testing.assert_close(fuse_modules(plain, [["0", "1", "2"]])(x), plain(x))
