"""Re-parameterisation, quantisation and export: the documented order is merge, remove, then the rest."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import randomise
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import convlora

quantization = pytest.importorskip("torch.ao.quantization")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


# --- networks that re-parameterise themselves -------------------------------------------------------------------


class Branches(nn.Module):
    """A 3×3 convolution with a norm, a 1×1 convolution and the identity, which become one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.norm = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.point = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "deployed"):
            return F.relu(self.deployed(x))
        return F.relu(self.norm(self.wide(x)) + self.point(x) + x)

    def kernel(self) -> tuple[Tensor, Tensor]:
        norm: Any = self.norm
        weight, bias = fuse_conv_bn_weights(
            self.wide.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        centre = self.point.weight + torch.eye(4)[:, :, None, None]
        assert self.point.bias is not None
        return (weight + F.pad(centre, [1, 1, 1, 1])).detach(), (bias + self.point.bias).detach()

    def to_new_convolution(self) -> nn.Module:
        weight, bias = self.kernel()
        self.deployed = nn.Conv2d(4, 4, 3, padding=1)
        self.deployed.weight.data, self.deployed.bias.data = weight, bias  # type: ignore[union-attr]
        del self.wide, self.norm, self.point
        return self

    def into_a_branch(self) -> nn.Module:
        weight, bias = self.kernel()
        self.wide.weight = nn.Parameter(weight)
        self.wide.bias = nn.Parameter(bias)
        self.deployed = self.wide
        del self.wide, self.norm, self.point
        return self

    def into_a_new_network(self) -> nn.Module:
        fresh = Branches()
        fresh.load_state_dict(self.state_dict(), strict=False)
        return fresh.eval().to_new_convolution()


def branches() -> tuple[nn.Module, Tensor]:
    model = Branches()
    model.norm.running_mean.normal_()  # type: ignore[union-attr, operator]
    model.norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
    return randomise(convlora.inject(model.eval(), "*", rank=1)), torch.randn(1, 4, 8, 8)


METHODS: dict[str, Callable[[Any], nn.Module]] = {
    "a new convolution": Branches.to_new_convolution,
    "into a branch": Branches.into_a_branch,
    "a new network": Branches.into_a_new_network,
}


@pytest.mark.parametrize("method", METHODS)
def test_merge_remove_and_re_parameterise(method: str) -> None:
    model, x = branches()
    y = model(x)
    deployed = METHODS[method](convlora.remove(convlora.merge(model)))
    torch.testing.assert_close(deployed(x), y)
    assert not [key for key in deployed.state_dict() if "convlora" in key]


@pytest.mark.parametrize("merged", [False, True])
def test_a_live_model_refuses_to_be_assigned_to(merged: bool) -> None:
    model, x = branches()
    if merged:
        convlora.merge(model)
    y = model(x)
    with pytest.raises(convlora.ConvLoRAError, match="merge"):
        METHODS["into a branch"](model)
    assert torch.equal(model(x), y)


def test_a_new_network_takes_the_merged_state_dict() -> None:
    """`state_dict` of an adapted model has the base's weights under the base's names, in a new network as in any."""
    model, x = branches()
    fresh = Branches().eval()
    fresh.load_state_dict(convlora.merged_state_dict(model))
    assert torch.equal(fresh(x), model(x))


# --- quantisers -------------------------------------------------------------------------------------------------


def adapted() -> tuple[nn.Module, Tensor]:
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    return randomise(convlora.inject(base.eval(), "*", rank=2)), torch.randn(2, 3, 8, 8)


def dynamic(model: nn.Module) -> nn.Module:
    return quantization.quantize_dynamic(model, {nn.Linear})  # type: ignore[no-any-return]


def static(model: nn.Module) -> nn.Module:
    wrapped = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub()).eval()
    wrapped.qconfig = quantization.get_default_qconfig("x86")  # type: ignore[assignment]
    prepared = quantization.prepare(wrapped)
    prepared(torch.randn(4, 3, 8, 8))
    return quantization.convert(prepared)[1]  # type: ignore[no-any-return]


def aware(model: nn.Module) -> nn.Module:
    model.train().qconfig = quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    prepared = quantization.prepare_qat(model)
    prepared(torch.randn(4, 3, 8, 8))
    return quantization.convert(prepared.eval())  # type: ignore[no-any-return]


def quantised(model: Any) -> list[bool]:
    return ["quantized" in type(model[place]).__module__ for place in (0, -1)]


@pytest.mark.parametrize(
    ("quantise", "wanted"), [(dynamic, [False, True]), (static, [True, True]), (aware, [True, True])]
)
def test_quantisers_take_merged_and_removed_layers_and_skip_adapted_ones(quantise: Any, wanted: list[bool]) -> None:
    model, _ = adapted()
    assert quantised(quantise(copy.deepcopy(model))) == [False, False]  # as docs/other_code.md says
    assert quantised(quantise(convlora.remove(convlora.merge(model)))) == wanted


def test_a_dynamically_quantised_model_computes_the_adapted_output() -> None:
    model, x = adapted()
    y = model(x)
    assert torch.equal(dynamic(copy.deepcopy(model))(x), y)
    plain = dynamic(convlora.remove(convlora.merge(model)))(x)
    assert float((plain - y).norm() / y.norm()) < 0.05


def test_an_adapter_trains_under_fake_quantisation_and_is_converted() -> None:
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).train()
    base.qconfig = quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    prepared = quantization.prepare_qat(base)
    model = randomise(convlora.inject(prepared, [nn.Conv2d, nn.Linear], rank=2))
    x = torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    assert all(p.grad is not None for p in convlora.parameters(model))
    y = model.eval()(x)
    plain = convlora.remove(convlora.merge(model))
    torch.testing.assert_close(plain(x), y)
    assert quantised(quantization.convert(plain)) == [True, True]


def test_after_merge_and_remove_an_exported_graph_has_constant_weights() -> None:
    def constant(model: nn.Module, x: Tensor) -> list[bool]:
        graph = torch.export.export(model, (x,)).graph
        convolutions = [node for node in graph.nodes if "conv2d" in str(node.target)]
        return [node.args[1].op == "placeholder" for node in convolutions]

    model, x = adapted()
    assert constant(model, x) == [False]
    assert constant(convlora.remove(convlora.merge(model)), x) == [True]
