"""The faster forms of a layer that trains: the composite's values and gradients, where and only where they apply."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import FACTORS, LAYERS, build, randomise
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import convlora
from convlora.layer import forms, thin
from convlora.layer.adapted import slot_of

quiet = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")
INFINITE = float("inf")
# LEAST_WORK, HEAVY, WIDE, FEW_PATCHES
FORMS = {
    "composite": (INFINITE, INFINITE, INFINITE, INFINITE),
    "thin": (0, INFINITE, INFINITE, INFINITE),
    "branches": (0, 0, 0, INFINITE),
    "patches": (INFINITE, INFINITE, INFINITE, 0),
}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Choose a form for every layer to which it applies."""

    def choose(name: str) -> None:
        for limit, value in zip(("LEAST_WORK", "HEAVY", "WIDE", "FEW_PATCHES"), FORMS[name], strict=True):
            monkeypatch.setattr(forms, limit, value)
        monkeypatch.setattr(forms, "LARGEST_SHARE", INFINITE)

    return choose


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of thin.py was called."""
    calls: list[str] = []

    def watch(name: str, plain: Callable[..., Tensor]) -> None:
        def spy(*arguments: Any) -> Tensor:
            calls.append(name)
            return plain(*arguments)

        monkeypatch.setattr(thin, name, spy)

    watch("linear", thin.linear)
    watch("conv2d", thin.conv2d)
    return calls


def adapted(layer: nn.Module, rank: int = 2, factors: str = "locon", **options: Any) -> Any:
    return randomise(convlora.inject(layer, "*", rank=rank, factors=factors, **options)).double()


def outcome(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of input and factors for a loss that weighs every output differently."""
    x = x.detach().requires_grad_()
    y = layer(x)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
    return [y, *torch.autograd.grad(loss, [x, *convlora.parameters(layer)])]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


# --- equal to the composite ---------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("form", ["thin", "branches", "patches"])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("hazard", LAYERS)
def test_every_layer_has_the_values_and_gradients_of_the_composite(
    hazard: str, factors: str, form: str, use: Callable[[str], None]
) -> None:
    layer, x = build(hazard, torch.float64)
    adapted(layer, factors=factors, alpha=3, bias=layer.bias is not None)
    use("composite")
    expected = outcome(layer, x)
    use(form)
    assert_close(outcome(layer, x), expected)


kernels = st.tuples(st.integers(1, 5), st.integers(1, 4))


@given(
    kernel=kernels,
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    share=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    extra=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    images=st.integers(0, 3),
    rank=st.integers(1, 3),
    last=st.booleans(),
)
def test_thin_gradients_of_any_shape(
    kernel: tuple[int, int],
    dilation: tuple[int, int],
    share: tuple[float, float],
    extra: tuple[int, int],
    channels: tuple[int, int],
    images: int,
    rank: int,
    last: bool,
) -> None:
    spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(int(part * span / 2) for part, span in zip(share, spans, strict=True))
    height, width = (span + 1 + more for span, more in zip(spans, extra, strict=True))
    inner, out = channels
    x = torch.randn(images, inner, height, width, dtype=torch.float64)
    if last:
        x = x.contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = torch.randn(out, inner, *kernel, dtype=torch.float64)
    a = torch.randn(rank, inner, *kernel, dtype=torch.float64, requires_grad=True)
    b = torch.randn(out, rank, 1, 1, dtype=torch.float64, requires_grad=True)
    update = thin.LowRankUpdate(a, b, 0.7)
    expected = nn.functional.conv2d(x, update.added_to(weight), None, 1, padding, dilation)
    y = thin.conv2d(x, weight, None, update, padding, dilation)
    gy = torch.randn_like(y)
    assert torch.equal(y, expected)
    assert_close(list(torch.autograd.grad(y, [x, a, b], gy)), list(torch.autograd.grad(expected, [x, a, b], gy)))


@pytest.mark.parametrize("bias", [True, False])
def test_thin_forms_pass_gradcheck_twice(bias: bool) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    x, a, b, beta = leaf(2, 3, 5, 4), leaf(2, 3, 3, 2), leaf(4, 2, 1, 1), leaf(4) if bias else None
    weight = torch.randn(4, 3, 3, 2, dtype=torch.float64)

    def conv(x: Tensor, a: Tensor, b: Tensor, beta: Tensor | None) -> Tensor:
        return thin.conv2d(x, weight, beta, thin.LowRankUpdate(a, b, 1.5), (1, 0), (1, 2))

    def linear(x: Tensor, a: Tensor, b: Tensor, beta: Tensor | None) -> Tensor:
        return thin.linear(x, weight[..., 0, 0], beta, thin.LowRankUpdate(a, b, 1.5))

    for function, inputs in ((conv, (x, a, b, beta)), (linear, (leaf(2, 4, 3), leaf(2, 3), leaf(4, 2), beta))):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "both"])
def test_a_frozen_factor_gets_no_gradient(frozen: str, use: Callable[[str], None], used: list[str]) -> None:
    layer = adapted(nn.Conv2d(4, 6, 3, padding=1))
    factors = dict(slot_of(layer).low_rank("default").named_parameters())
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    use("composite")
    full = dict(zip(["y", "x", *factors], outcome(layer, x), strict=True))
    for name, parameter in factors.items():
        parameter.requires_grad_(frozen not in (name, "both"))
    use("thin")
    x.requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    assert used == ["conv2d"]
    torch.testing.assert_close(x.grad, full["x"])
    for name, parameter in factors.items():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, full[name])
        else:
            assert parameter.grad is None


def test_the_first_layer_of_a_net_needs_no_gradient_of_its_input(use: Callable[[str], None], used: list[str]) -> None:
    net = adapted(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(6, 3, 3)))
    x = torch.randn(2, 3, 7, 7, dtype=torch.float64)
    gradients = []
    for form in ("composite", "thin"):
        use(form)
        gradients.append(torch.autograd.grad(net(x).square().sum(), convlora.parameters(net)))
    assert_close(*map(list, gradients))
    assert used == ["conv2d", "conv2d"]


def test_merged_and_unmerged_are_bitwise_equal_in_thin_form(use: Callable[[str], None], used: list[str]) -> None:
    layer, x = adapted(nn.Conv2d(5, 6, 3, padding=1)).float(), torch.randn(2, 5, 9, 9)
    use("thin")
    y = layer(x)
    assert used == ["conv2d"]
    assert torch.equal(convlora.merge(layer)(x), y)
    assert torch.equal(convlora.remove(layer)(x), y)


@pytest.mark.parametrize("form", ["thin", "branches"])
@pytest.mark.parametrize("hazard", ["plain", "linear", "pointwise"])
def test_injecting_keeps_the_output_bitwise_in_every_form(form: str, hazard: str, use: Callable[[str], None]) -> None:
    layer, x = build(hazard)
    before = layer(x)
    convlora.inject(layer, "*", rank=1, factors="locon")
    use(form)
    assert torch.equal(layer(x), before)


def test_a_second_order_gradient_is_the_composites(use: Callable[[str], None], used: list[str]) -> None:
    """A gradient penalty, as GANs and meta-learning take it."""
    layer, x = adapted(nn.Conv2d(3, 4, 3, padding=1)), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    penalties = []
    for form in ("composite", "thin"):
        use(form)
        z = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(layer(z).tanh().sum(), z, create_graph=True)
        penalties.append(torch.autograd.grad(gradient.square().sum(), convlora.parameters(layer)))
    assert used == ["conv2d"]
    assert_close(*map(list, penalties))


def test_checkpointing_and_saving_elsewhere_give_the_same_gradients(
    use: Callable[[str], None], used: list[str]
) -> None:
    layer, x = adapted(nn.Conv2d(3, 4, 3, padding=1)), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    use("thin")
    expected = outcome(layer, x)
    z = x.clone().requires_grad_()

    def gradients(y: Tensor) -> list[Tensor]:
        loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        return [y, *torch.autograd.grad(loss, [z, *convlora.parameters(layer)])]

    assert_close(gradients(checkpoint(layer, z, use_reentrant=False)), expected)
    with torch.autograd.graph.save_on_cpu():
        y = layer(z)
    assert_close(gradients(y), expected)
    assert len(used) == 4  # the checkpoint runs the layer twice


# --- where it does not apply ----------------------------------------------------------------------------------------


def vmapped(layer: nn.Module, x: Tensor) -> Any:
    parameters = dict(layer.named_parameters())

    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (row[None],)).square().sum()

    return torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)


def forward_mode(layer: nn.Module, x: Tensor) -> Any:
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        return torch.autograd.forward_ad.unpack_dual(y)


def half(layer: nn.Module, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return layer.float()(x.float())


def two_adapters(layer: nn.Module, x: Tensor) -> Any:
    convlora.inject(layer, "*", rank=1, factors="locon", name="second")
    return convlora.activate(layer, ["default", "second"])(x)


def dropping(layer: nn.Module, x: Tensor) -> Any:
    other = convlora.inject(convlora.remove(layer), "*", rank=2, factors="locon", rank_dropout=0.5)
    torch.manual_seed(0)
    return other.double()(x)


def unfrozen(layer: nn.Module, x: Tensor) -> Any:
    dict(layer.named_parameters())["weight"].requires_grad_()
    return torch.autograd.grad(layer(x).sum(), dict(layer.named_parameters())["weight"])


def hooked(layer: nn.Module, x: Tensor) -> Any:
    slot_of(layer).low_rank("default").register_forward_hook(lambda module, inputs, output: 2 * output)
    return layer(x)


@pytest.mark.parametrize(
    "run",
    [
        vmapped, forward_mode, half, two_adapters, dropping, unfrozen, hooked,
        lambda layer, x: torch.jit.trace(layer, x)(x),
        lambda layer, x: torch.export.export(layer, (x,)).module()(x),
        lambda layer, x: torch.compile(layer, fullgraph=True, backend="aot_eager")(x),
        lambda layer, x: layer.bfloat16()(x.bfloat16()),
        lambda layer, x: layer(x[0]),
        lambda layer, x: convlora.merge(layer)(x),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning")
def test_what_needs_the_composite_gets_it(
    run: Callable[[nn.Module, Tensor], Any], use: Callable[[str], None], used: list[str]
) -> None:
    layer, x = adapted(nn.Conv2d(3, 4, 3, padding=1)), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    results = []
    for form in ("composite", "thin"):
        use(form)
        results.append(run(copy.deepcopy(layer), x))
    assert not used
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_layers_with_a_forward_of_their_own_keep_it(use: Callable[[str], None], used: list[str]) -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return self._conv_forward(x, self.weight / self.weight.std(), self.bias)

    layer, x = adapted(Standardised(3, 4, 3)), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    use("thin")
    y = layer(x)
    assert not used
    plain = nn.functional.conv2d(x, layer.weight / layer.weight.std(), layer.bias)
    assert torch.equal(y, plain)


def test_small_layers_and_large_ranks_get_the_composite(used: list[str]) -> None:
    """The rule of shapes as it is."""
    small, wide, thick = (nn.Conv2d(width, width, 3, padding=1) for width in (8, 48, 48))
    for layer, rank in ((small, 1), (wide, 4), (thick, 24)):
        convlora.inject(layer, "*", rank=rank, factors="locon")
        layer(torch.randn(torch.get_num_threads() ** 2, layer.in_channels, 64, 64))
    assert used == ["conv2d"]


# --- memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["composite", "thin"])
def test_a_forward_keeps_no_more_than_full_fine_tuning(form: str, use: Callable[[str], None]) -> None:
    def kept(model: nn.Module) -> int:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(torch.randn(2, 8, 32, 32))
        del y
        return sum(found.values())

    def net() -> nn.Sequential:
        layers = [layer for _ in range(3) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.SiLU())]
        return nn.Sequential(*layers)

    full = kept(net())
    use(form)
    model = convlora.inject(net(), "*", rank=2, factors="locon")
    weights = 3 * 8 * 8 * 9 * 4
    assert kept(model) <= full + (2 * weights if form == "composite" else 0)
