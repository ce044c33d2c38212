"""What a layer's forward forms is not kept for backward: counted, and bitwise the plain composite."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import FACTORS, LAYERS, PRODUCTS, build, randomise
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import convlora
from benchmarks.counting import bytes_saved
from convlora.layer import again, forms
from convlora.layer.adapted import slot_of

quiet = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")


TELLS_OUTER_HOOKS = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")  # not in PyTorch 2.6


def cost(model: nn.Module, x: Tensor) -> tuple[int, int]:
    """(operations of forward and backward, bytes kept for backward) where the input needs a gradient."""
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def forward() -> Tensor:
        return model(x.detach().requires_grad_())  # type: ignore[no-any-return]

    def count_operations() -> int:
        with FlopCounterMode(display=False) as counter:
            forward().sum().backward()
        return counter.get_total_flops()

    return count_operations(), bytes_saved(forward, owned)


WIDE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(320, 320, 3, padding=1), (64, 320, 16, 16)),
    "heavy": (lambda: nn.Conv2d(320, 320, 3, padding=1), (2, 320, 16, 16)),
    "strided": (lambda: nn.Conv2d(320, 320, 3, stride=2, padding=1), (64, 320, 16, 16)),
    "dilated, reflect": (
        lambda: nn.Conv2d(320, 320, 3, padding=2, dilation=2, padding_mode="reflect"),
        (64, 320, 16, 16),
    ),
    "conv1d": (lambda: nn.Conv1d(640, 640, 5, padding=2), (64, 640, 256)),
    "conv3d": (lambda: nn.Conv3d(128, 128, 3, padding=1), (4, 128, 16, 16, 16)),
    "transposed": (lambda: nn.ConvTranspose2d(320, 320, 4, stride=2, padding=1), (64, 320, 16, 16)),
    "linear": (lambda: nn.Linear(2048, 2048), (64, 1024, 2048)),
    "heavy linear": (lambda: nn.Linear(2048, 2048), (1, 128, 2048)),
}
NARROW: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv2d": (lambda: nn.Conv2d(16, 16, 3, padding=1), (2, 16, 32, 32)),
    "grouped": (lambda: nn.Conv2d(16, 16, 3, padding=1, groups=4), (2, 16, 32, 32)),
    "strided": (lambda: nn.Conv2d(16, 16, 3, stride=2), (2, 16, 32, 32)),
    "conv1d": (lambda: nn.Conv1d(16, 16, 3), (2, 16, 64)),
    "conv3d": (lambda: nn.Conv3d(8, 8, 3), (1, 8, 8, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 16, 2, stride=2), (2, 16, 16, 16)),
    "linear": (lambda: nn.Linear(64, 64), (2, 128, 64)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RANK = 8


@quiet
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("kind", [*(f"wide {name}" for name in WIDE), *(f"narrow {name}" for name in NARROW)])
def test_what_an_adapter_costs(kind: str, device: str, dtype: torch.dtype, factors: str) -> None:
    size, _, name = kind.partition(" ")
    make, shape = (WIDE if size == "wide" else NARROW)[name]
    if device == "cpu" and (size == "wide" or dtype == torch.float16):
        pytest.skip("a CPU takes the same path, but for thin products, and seconds")
    with torch.device(device):
        base, x = make().to(dtype).requires_grad_(False), torch.randn(shape, dtype=dtype)
    operations, kept = cost(copy.deepcopy(base), x)
    model = convlora.inject(copy.deepcopy(base), "*", rank=RANK, factors=factors)
    found, found_kept = cost(model, x)
    low_rank = slot_of(model).low_ranks()["default"]
    chain = getattr(low_rank.factorization, "chain", None)
    chained = chain is not None and chain(low_rank.factors(), low_rank.spec) is not None
    y = base(x)
    channels = RANK * (y.numel() // y.shape[-1 if name.endswith("linear") else 1])
    branches = size == "wide" and chained
    weight = low_rank.spec.shape
    beside = 0 if factors in PRODUCTS else 4 * (RANK + 4) * max(weight[0], base.weight.numel() // weight[0])  # type: ignore[operator]
    assert found_kept <= kept + x.numel() * dtype.itemsize + (4 * channels if branches else beside)
    if branches:
        extra = 3 * 2 * (found_macs(base, x) * RANK // min(weight[:2]) + channels * max(weight[:2]))
        assert found <= operations + extra  # as PEFT's: forward, and two products in backward, of each thin layer
    else:
        whole, _ = cost(copy.deepcopy(base).requires_grad_(), x)  # the gradient of the weight, and products beside it
        products = {"dora": 6, "loha": 10}.get(factors, 4 * weight[-1])
        assert found <= whole + products * 2 * RANK * base.weight.numel()  # type: ignore[operator]


def found_macs(base: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        base(x)
    return counter.get_total_flops() // 2


# --- values --------------------------------------------------------------------------------------------------------


def derivatives(layer: nn.Module, x: Tensor, cast: torch.dtype | None = None) -> list[Tensor]:
    """Output, first derivatives, and those of their squares."""
    x = x.detach().requires_grad_()
    wanted = [x, *convlora.parameters(layer)]
    torch.manual_seed(0)
    with torch.autocast("cpu", cast, enabled=cast is not None):
        y = layer(x)
    loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    first = torch.autograd.grad(loss, wanted, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), wanted, allow_unused=True)  # type: ignore[arg-type]
    return [y, *first, *(g for g in second if g is not None)]


@pytest.fixture
def composite(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """The plain composite for every layer, whose effective weight is kept, or formed again."""
    monkeypatch.setattr(forms, "LEAST_WORK", float("inf"))
    monkeypatch.setattr(forms, "HEAVY", float("inf"))
    monkeypatch.setattr(forms, "WIDE", float("inf"))
    monkeypatch.setattr(forms, "FEW_PATCHES", float("inf"))

    def choose(kept: bool) -> None:
        for module in ("adapted", "lowrank"):
            monkeypatch.setattr(f"convlora.layer.{module}.forms_again", lambda: not kept and torch.is_grad_enabled())

    return choose


@quiet
@pytest.mark.parametrize("cast", [None, torch.bfloat16], ids=["float32", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("hazard", LAYERS)
def test_derivatives_are_bitwise_those_of_a_weight_that_is_kept(
    hazard: str, factors: str, dropout: float, cast: torch.dtype | None, composite: Callable[[bool], None]
) -> None:
    layer, x = build(hazard, torch.float32)
    randomise(convlora.inject(layer, "*", rank=2, factors=factors, rank_dropout=dropout)).train()
    composite(True)
    expected = derivatives(layer, x, cast)
    composite(False)
    found = derivatives(layer, x, cast)
    assert len(found) == len(expected)
    first = 2 + len(convlora.parameters(layer))
    if factors == "loha":  # of what its own product needs in backward, second derivatives are summed in another order
        torch.testing.assert_close(found[first:], expected[first:], rtol=1e-4, atol=1e-4)
        found, expected = found[:first], expected[:first]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Standardised(nn.Conv2d):
    """A forward of its own, in which the weight is one tensor among others."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(input, weight, self.bias) + F.conv2d(input, self.weight, None)


def legacy_norm(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(layer)


OWN: dict[str, Callable[[], nn.Module]] = {
    "a forward of its own": lambda: Standardised(6, 8, 3),
    "weight norm": lambda: parametrizations.weight_norm(nn.Conv2d(6, 8, 3)),
    "legacy weight norm": lambda: legacy_norm(nn.Conv2d(6, 8, 3)),
    "pruned": lambda: prune.l1_unstructured(nn.Conv2d(6, 8, 3), "weight", 0.5),
    "channels last": lambda: nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("kind", OWN)
def test_layers_of_every_make_form_their_weight_again(kind: str, composite: Callable[[bool], None]) -> None:
    layer, x = OWN[kind](), torch.randn(2, 6, 9, 9)
    randomise(convlora.inject(layer, "*", rank=2))
    composite(True)
    expected = derivatives(layer, x)
    composite(False)
    assert all(torch.equal(a, b) for a, b in zip(derivatives(layer, x), expected, strict=True))
    owned = {t.untyped_storage()._cdata for t in (*layer.parameters(), *layer.buffers(), x)}
    composite(True)
    kept = bytes_saved(lambda: layer(x), owned)
    composite(False)
    effective = 8 * 6 * 9 * 4
    assert bytes_saved(lambda: layer(x), owned) <= kept - effective


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("few_patches", [0.0, float("inf")])
def test_what_is_not_kept_is_free_once_the_forward_is_over(
    factors: str, few_patches: float, composite: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd keeps the hooks themselves, and with them what they refer to."""
    composite(False)
    monkeypatch.setattr(forms, "FEW_PATCHES", few_patches)
    layer, x = randomise(convlora.inject(nn.Conv2d(6, 8, 3), "*", rank=2, factors=factors)), torch.randn(2, 6, 9, 9)
    formed: list[weakref.ref[Tensor]] = []
    note = again.note_formed

    def watch(slot: object, value: Tensor, *more: Any) -> None:
        formed.append(weakref.ref(value))
        note(slot, value, *more)

    monkeypatch.setattr("convlora.layer.slot.note_formed", watch)
    monkeypatch.setattr("convlora.layer.forms.note_formed", watch)
    y = layer(x)
    assert formed
    assert all(reference() is None for reference in formed)
    y.sum().backward()


def test_two_adapters_and_a_mixture_of_copies_are_formed_again(composite: Callable[[bool], None]) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)), torch.randn(2, 3, 9, 9)
    randomise(convlora.inject(model, "*", rank=1, name="a"))
    randomise(convlora.inject(model, "0", rank=2, name="b", modules_to_save="1"))
    convlora.activate(model, {"a": 0.7, "b": 0.5})
    composite(True)
    expected = derivatives(model, x)
    composite(False)
    assert all(torch.equal(a, b) for a, b in zip(derivatives(model, x), expected, strict=True))
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), x)}
    if TELLS_OUTER_HOOKS:
        assert bytes_saved(lambda: model(x), owned) == 2 * 8 * 7 * 7 * 4  # what goes into the second convolution


def test_hooks_that_are_there_get_everything_else(composite: Callable[[bool], None]) -> None:
    composite(False)
    layer, x = randomise(convlora.inject(nn.Conv2d(6, 8, 3), "*", rank=2)), torch.randn(2, 6, 9, 9)
    packed: list[tuple[int, ...]] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert (8, 6, 3, 3) not in packed
    if TELLS_OUTER_HOOKS:
        assert (2, 6, 9, 9) in packed
    for reentrant in (True, False):
        inside = copy.deepcopy(layer)
        y = checkpoint(inside, x.clone().requires_grad_(), use_reentrant=reentrant)
        y.square().sum().backward()
        layer.zero_grad()
        layer(x.clone().requires_grad_()).square().sum().backward()
        for ours, theirs in zip(convlora.parameters(inside), convlora.parameters(layer), strict=True):
            assert ours.grad is not None
            assert theirs.grad is not None
            assert torch.equal(ours.grad, theirs.grad)


def test_a_write_between_forward_and_backward_is_an_error(composite: Callable[[bool], None]) -> None:
    composite(False)
    for change in (lambda m: m.convlora.default.lora_A, lambda m: m._parameters["weight"]):
        layer: Any = randomise(convlora.inject(nn.Conv2d(6, 8, 3), "*", rank=2))
        y = layer(torch.randn(2, 6, 9, 9, requires_grad=True))
        with torch.no_grad():
            change(layer).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_another_strength_between_forward_and_backward_changes_no_gradient(composite: Callable[[bool], None]) -> None:
    composite(False)
    layer, x = randomise(convlora.inject(nn.Conv2d(6, 8, 3), "*", rank=2)), torch.randn(2, 6, 9, 9)
    expected = torch.autograd.grad(layer(x.requires_grad_()).square().sum(), x)[0]
    y = layer(x)
    convlora.activate(layer, {"default": 0.25})
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected)


def test_where_hooks_are_forbidden_the_layer_works() -> None:
    layer, x = randomise(convlora.inject(nn.Conv2d(6, 8, 3), "*", rank=2)), torch.randn(2, 6, 9, 9)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        layer(x).sum().backward()
    assert all(p.grad is not None for p in convlora.parameters(layer))


# --- half precision --------------------------------------------------------------------------------------------------


def test_gradients_in_half_precision_are_as_near_to_float64_as_peft_s(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three wide layers in bfloat16: errors of the activations are most of it."""
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(forms, "WIDE", 0)
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Sequential(nn.Conv2d(48, 48, 3, padding=1), nn.GELU()) for _ in range(3)))
    x = torch.randn(4, 48, 16, 16)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=r".*\.0", init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(base).bfloat16(), config)
    from convlora import formats

    written = wrapped.state_dict()
    model = convlora.inject(copy.deepcopy(base).bfloat16(), "*.0", rank=4, factors="locon")
    del formats
    with torch.no_grad():
        for place in range(3):
            for name in ("lora_A", "lora_B"):
                ours = getattr(slot_of(model[place][0]).low_ranks()["default"], name)  # type: ignore[index]
                ours.copy_(written[f"base_model.model.{place}.0.{name}.default.weight"])
    exact = copy.deepcopy(model).double()

    def gradients(net: nn.Module, parameters: list[nn.Parameter], dtype: torch.dtype) -> list[Tensor]:
        net(x.to(dtype)).double().square().mean().backward()
        return [p.grad.double() for p in parameters]  # type: ignore[union-attr]

    right = gradients(exact, list(convlora.parameters(exact)), torch.float64)
    ours = gradients(model, list(convlora.parameters(model)), torch.bfloat16)
    theirs = gradients(wrapped, [p for p in wrapped.parameters() if p.requires_grad], torch.bfloat16)

    def error(found: list[Tensor]) -> float:
        return float(sum((f - r).norm() / r.norm() for f, r in zip(found, right, strict=True))) / len(right)

    assert error(ours) <= 1.1 * error(theirs)


# --- compiled ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("made", ["conv2d", "transposed", "linear"])
def test_a_compiled_layer_keeps_what_the_frozen_one_keeps(made: str, factors: str) -> None:
    """As the compiler's partitioner decides it: the one of every backend, without code generation."""
    make, shape = NARROW[made]
    base, x = make().requires_grad_(False), torch.randn(shape)
    owned = {t.untyped_storage()._cdata for t in base.parameters()}
    model = convlora.inject(copy.deepcopy(base), "*", rank=2, factors=factors)
    owned |= {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}

    def kept(net: nn.Module) -> int:
        torch.compiler.reset()
        compiled = torch.compile(net, backend="aot_eager_decomp_partition", fullgraph=True)
        return bytes_saved(lambda: compiled(x.clone().requires_grad_()), owned)

    assert kept(model) <= max(kept(base), x.numel() * x.element_size())


def test_a_compiled_layer_with_rank_dropout_trains() -> None:
    layer, x = nn.Conv2d(6, 8, 3), torch.randn(2, 6, 9, 9)
    randomise(convlora.inject(layer, "*", rank=2, rank_dropout=0.5)).train()
    torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True)(x).sum().backward()
    assert all(p.grad is not None for p in convlora.parameters(layer))


def test_factors_on_patches_keep_nothing_more_and_pass_gradcheck_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "FEW_PATCHES", 0)
    layer = randomise(convlora.inject(nn.Conv2d(4, 5, 3, stride=2, padding=1, dilation=2), "*", rank=1)).double()
    low_rank = slot_of(layer).low_ranks()["default"]
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    owned = {t.untyped_storage()._cdata for t in (*layer.parameters(), *layer.buffers(), x)}
    assert bytes_saved(lambda: layer(x), owned) == 0

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low_rank._parameters.update(lora_A=a, lora_B=b)  # type: ignore[arg-type]
        return layer(x)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(function, (x, low_rank.lora_A, low_rank.lora_B))  # type: ignore[arg-type]
    assert torch.autograd.gradgradcheck(function, (x, low_rank.lora_A, low_rank.lora_B))  # type: ignore[arg-type]


@pytest.mark.parametrize("made", WIDE)
def test_branches_of_every_layer_type_pass_gradcheck_twice(made: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "WIDE", 0)
    monkeypatch.setattr(forms, "LEAST_WORK", float("inf"))
    kind = {"conv2d": nn.Conv2d, "conv1d": nn.Conv1d, "conv3d": nn.Conv3d, "transposed": nn.ConvTranspose2d}
    if made not in kind and made != "linear":
        pytest.skip("another shape of one of these")
    layer: Any = nn.Linear(2, 3) if made == "linear" else kind[made](2, 3, 2, stride=2)
    low_rank = slot_of(randomise(convlora.inject(layer, "*", rank=1, factors="locon")).double()).low_ranks()["default"]
    x = torch.randn(2, 2, *[3] * (0 if made == "linear" else layer.weight.dim() - 2), dtype=torch.float64)

    def function(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        low_rank._parameters.update(lora_A=a, lora_B=b)  # type: ignore[arg-type]
        return layer(x)  # type: ignore[no-any-return]

    inputs = (x.requires_grad_(), low_rank.lora_A, low_rank.lora_B)
    assert torch.autograd.gradcheck(function, inputs)  # type: ignore[arg-type]
    assert torch.autograd.gradgradcheck(function, inputs)  # type: ignore[arg-type]
