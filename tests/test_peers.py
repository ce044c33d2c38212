"""Where peers fail: each case works here, and the same action through the real `peft` shows the failure.

The `peft` tests are there so that comparisons with it stay true: when one fails, peft has improved.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from oracle import PRODUCTS, bits, randomise, snapshot
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convlora
from convlora.adapter.file import checksum
from convlora.layer.adapted import base_tensor, weight_spec

both = pytest.mark.parametrize("factors", PRODUCTS)
# Tiny layers on purpose: some are smaller than their adapter.
pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")


class Standardised(nn.Conv2d):
    """A convolution with a forward of its own: the weight has zero mean and unit variance per output channel."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return self._conv_forward(x, w, self.bias)


class Twice(nn.Module):
    """One module at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]


class Tied(Twice):
    """One Parameter in two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.b.weight = self.a.weight


IMAGE = (2, 4, 9, 9)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dilation 2": (lambda: nn.Conv2d(4, 8, 3, dilation=2), IMAGE),
    "padding_mode reflect": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"), IMAGE),
    "padding_mode circular": (lambda: nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"), IMAGE),
    "groups 4": (lambda: nn.Conv2d(4, 8, 3, groups=4), IMAGE),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 9, 9)),
    "Conv3d (1, 1, 3)": (lambda: nn.Conv3d(4, 8, (1, 1, 3)), (2, 4, 3, 3, 5)),
    "kernel (1, 5)": (lambda: nn.Conv2d(4, 8, (1, 5)), IMAGE),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 8, 2, stride=2), IMAGE),
    "own forward": (lambda: Standardised(4, 8, 3), IMAGE),
}
PEFT_RAISES: dict[str, type[Exception]] = {
    "dilation 2": RuntimeError,
    "groups 4": NotImplementedError,
    "depthwise": ValueError,
    "Conv3d (1, 1, 3)": RuntimeError,
    "ConvTranspose2d": ValueError,
}
PEFT_WRONG = ["padding_mode reflect", "padding_mode circular", "own forward"]
PEFT_RIGHT = ["kernel (1, 5)"]


def adapted(base: nn.Module, factors: str, **options: Any) -> nn.Module:
    """A copy with trained-looking adapters, in eval mode."""
    options = {"targets": "*", "rank": 2, "factors": factors, **options}
    return randomise(convlora.inject(copy.deepcopy(base), **options)).eval()  # type: ignore[no-any-return]


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())


def exact_weight(layer: nn.Module, factors: str) -> Tensor:
    """W + ΔW of one layer in float64, element by element from the factors."""
    layer_factors = next(iter(convlora.adapter(layer).layers.values()))
    delta = oracle.delta(factors, dict(layer_factors.tensors), weight_spec(layer))
    return base_tensor(layer, "weight").detach().double() + delta * layer_factors.alpha / layer_factors.rank  # type: ignore[no-any-return]


# --- peft ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def peft_adapted(peft: Any, base: nn.Module, targets: list[str] | str = "0", rank: int = 2, **options: Any) -> Any:
    """A copy with random PEFT LoRA factors, in eval mode."""
    names = [targets] if isinstance(targets, str) else targets
    config = peft.LoraConfig(target_modules=names, r=rank, lora_alpha=rank, init_lora_weights=False, **options)
    return peft.inject_adapter_in_model(config, copy.deepcopy(base)).eval()


def peft_layers(peft: Any, model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]


@torch.no_grad()
def peft_merge_error(peft: Any, base: nn.Module, x: Tensor, targets: list[str] | str = "0", rank: int = 2) -> float:
    """How far the output moves when PEFT merges, relative to it."""
    model = peft_adapted(peft, base, targets, rank)
    before = model(x)
    for layer in peft_layers(peft, model):
        layer.merge()
    return distance(model(x), before)


# --- layers ----------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("case", LAYERS)
def test_unmerged_merged_and_removed_agree_with_the_exact_effective_weight(case: str, factors: str) -> None:
    make, shape = LAYERS[case]
    base, x = make().eval(), torch.randn(shape)
    model = adapted(base, factors)
    with torch.no_grad():
        exact = copy.deepcopy(base).double()
        exact.weight.copy_(exact_weight(model, factors))  # type: ignore[operator]
        expected = exact(x.double())
        unmerged = model(x)
        assert torch.allclose(unmerged.double(), expected, rtol=1e-5, atol=1e-5)
        assert distance(unmerged, base(x)) > 0.05
        assert torch.equal(convlora.merge(model)(x), unmerged)
        assert torch.equal(convlora.remove(model)(x), unmerged)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups:UserWarning")
@pytest.mark.parametrize("case", PEFT_RAISES)
def test_peft_cannot(case: str, peft: Any) -> None:
    make, shape = LAYERS[case]
    with pytest.raises(PEFT_RAISES[case]):
        peft_merge_error(peft, nn.Sequential(make()), torch.randn(shape), rank=4)


@pytest.mark.parametrize("case", PEFT_WRONG)
def test_peft_is_silently_wrong(case: str, peft: Any) -> None:
    make, shape = LAYERS[case]
    assert peft_merge_error(peft, nn.Sequential(make()), torch.randn(shape)) > 0.05


@pytest.mark.parametrize("case", PEFT_RIGHT)
def test_peft_can(case: str, peft: Any) -> None:
    make, shape = LAYERS[case]
    assert peft_merge_error(peft, nn.Sequential(make()), torch.randn(shape)) < 1e-5


def test_every_layer_case_is_compared_with_peft() -> None:
    assert sorted([*PEFT_RAISES, *PEFT_WRONG, *PEFT_RIGHT]) == sorted(LAYERS)


def weight_norm() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 3))


def legacy_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Conv2d(4, 8, 3))  # type: ignore[no-any-return]


@both
@pytest.mark.parametrize("make", [weight_norm, legacy_weight_norm])
def test_merging_a_weight_normed_layer_keeps_what_was_trained(make: Callable[[], nn.Module], factors: str) -> None:
    base, x = nn.Sequential(make()), torch.randn(IMAGE)
    with torch.no_grad():
        plain = base(x)
        model = randomise(convlora.inject(base, targets="0", rank=2, factors=factors))
        adapted_output = model(x)
        assert distance(adapted_output, plain) > 0.05
        assert torch.equal(convlora.merge(model)(x), adapted_output)
        assert torch.equal(convlora.unmerge(model)(x), adapted_output)
        assert torch.equal(convlora.remove(model)(x), plain)


def test_a_name_means_the_layer_and_not_the_parts_inside_it() -> None:
    model = convlora.inject(nn.Sequential(weight_norm()), targets="0", name="0")  # 0.parametrizations.weight.0
    convlora.inject(model, targets="0", name="second")  # 0.convlora.0
    assert list(convlora.adapters(model)) == ["0", "second"]


@pytest.mark.parametrize("make", [weight_norm, legacy_weight_norm])
def test_peft_loses_what_was_trained_on_a_weight_normed_layer(make: Callable[[], nn.Module], peft: Any) -> None:
    config = peft.LoraConfig(target_modules=["conv"], r=2, init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, nn.Sequential(OrderedDict(conv=make()))).eval()
    x = torch.randn(IMAGE)
    with torch.no_grad():
        plain, before = model.conv.base_layer(x), model(x)
        model.conv.merge()
        assert distance(before, plain) > 0.05
        assert torch.equal(model(x), plain)


# --- networks --------------------------------------------------------------------------------------------------


def span() -> nn.Module:
    """SPAN in train form: its convolutions are fused from `.weight` at every eval forward."""
    spandrel = pytest.importorskip("spandrel.architectures.SPAN")
    torch.manual_seed(0)
    model: nn.Module = spandrel.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2, img_range=1.0)
    return model


@both
def test_adapters_on_span_in_train_form_act_in_eval_mode_as_in_train_mode(factors: str) -> None:
    base, x = span().double().eval(), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    model = adapted(base, factors, targets=nn.Conv2d, exclude="eval_conv")
    with torch.no_grad():
        evaluated = model(x)
        assert distance(evaluated, base(x)) > 0.05
        assert distance(model.train()(x), evaluated) < 1e-9
        assert distance(convlora.merge(model).eval()(x), evaluated) == 0


def test_peft_on_span_in_train_form_is_ignored_in_eval_mode(peft: Any) -> None:
    base, x = span().eval(), torch.rand(1, 3, 8, 8)
    fused = [name for name, module in base.named_modules() if name.endswith((".sk", ".conv.0", ".conv.1", ".conv.2"))]
    model = peft_adapted(peft, base, fused)
    with torch.no_grad():
        assert len(peft_layers(peft, model)) == 80
        assert torch.equal(model(x), base(x))
        assert not torch.equal(model.train()(x), base.train()(x))


@both
@pytest.mark.parametrize("kind", [Twice, Tied])
def test_shared_modules_and_shared_parameters_merge_exactly(kind: type[Twice], factors: str, tmp_path: Path) -> None:
    base, x = kind().eval(), torch.randn(IMAGE)
    model = adapted(base, factors)
    assert (model.a is model.b) == (kind is Twice)
    assert base_tensor(model.a, "weight") is base_tensor(model.b, "weight")  # type: ignore[arg-type]
    with torch.no_grad():
        expected = model(x)
        assert distance(expected, base(x)) > 0.05
        assert torch.equal(convlora.merge(model)(x), expected)
        convlora.save(model, tmp_path / "tied.safetensors")
        assert torch.equal(convlora.load(copy.deepcopy(base), tmp_path / "tied.safetensors")(x), expected)
        assert torch.equal(convlora.remove(convlora.unmerge(model))(x), base(x))


@pytest.mark.parametrize("kind", [Twice, Tied])
def test_peft_merges_shared_weights_wrong(kind: type[Twice], peft: Any) -> None:
    assert peft_merge_error(peft, kind(), torch.randn(IMAGE), ["a", "b"]) > 0.1


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_hundred_merges_and_unmerges_restore_the_base_bitwise(dtype: torch.dtype, factors: str) -> None:
    model, x = adapted(nn.Conv2d(4, 8, 3).to(dtype), factors), torch.randn(IMAGE, dtype=dtype)
    state, expected = bits(model), model(x)
    for _ in range(100):
        convlora.merge(model)(x)
        convlora.unmerge(model)
    assert bits(model) == state
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peft_drifts_over_a_hundred_merges(dtype: torch.dtype, peft: Any) -> None:
    model = peft_adapted(peft, nn.Sequential(nn.Conv2d(4, 8, 3).to(dtype)))
    before = model[0].base_layer.weight.clone()
    for _ in range(100):
        model[0].merge()
        model[0].unmerge()
    assert not torch.equal(model[0].base_layer.weight, before)


@both
def test_injecting_into_an_eval_model_keeps_eval_everywhere(factors: str) -> None:
    model = convlora.inject(nn.Sequential(nn.Conv2d(4, 8, 3)).eval(), targets="0", factors=factors, rank_dropout=0.5)
    assert not any(module.training for module in model.modules())
    x = torch.randn(IMAGE)
    randomise(model)
    assert torch.equal(model(x), model(x))  # no component is dropped


def test_peft_puts_a_layer_in_train_mode_into_an_eval_model(peft: Any) -> None:
    config = peft.LoraConfig(target_modules=["0"], lora_dropout=0.5, init_lora_weights=False)
    model, x = peft.inject_adapter_in_model(config, nn.Sequential(nn.Conv2d(4, 8, 3)).eval()), torch.randn(IMAGE)
    assert not model.training
    assert model[0].training
    assert not torch.equal(model(x), model(x))


def test_one_typo_among_several_targets_is_an_error_and_changes_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    before = snapshot(model)
    with pytest.raises(convlora.ConvLoRAError, match="target 'typo' selects no layer"):
        convlora.inject(model, targets=["0", "typo"])
    assert snapshot(model) == before


def test_peft_is_silent_about_one_typo_among_several_targets(peft: Any) -> None:
    model = peft_adapted(peft, nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3)), ["0", "typo"])
    assert len(peft_layers(peft, model)) == 1


class Confusable(nn.Module):
    """Layers `a.b` and `a_b`: one name where dots become underscores."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ModuleDict({"b": nn.Conv2d(4, 4, 3)})
        self.a_b = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a_b(self.a["b"](x))  # type: ignore[no-any-return]


@both
def test_layers_whose_names_differ_in_a_dot_have_adapters_of_their_own(factors: str, tmp_path: Path) -> None:
    base, x = Confusable(), torch.randn(IMAGE)
    model = adapted(base, factors)
    a, b = convlora.adapter(model).delta("a.b"), convlora.adapter(model).delta("a_b")
    assert a.abs().max() > 0
    assert b.abs().max() > 0
    assert not torch.equal(a, b)
    convlora.save(model, tmp_path / "a.safetensors")
    assert torch.equal(convlora.load(base, tmp_path / "a.safetensors")(x), model(x))


# --- files and precision ---------------------------------------------------------------------------------------


def saved(tmp_path: Path) -> tuple[Path, nn.Sequential]:
    """A file, and a model that it fits."""
    base = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3))
    convlora.save(adapted(base, "locon"), tmp_path / "adapter.safetensors")
    return tmp_path / "adapter.safetensors", base


def refuse(model: nn.Module, path: Path, message: str) -> None:
    """Loading raises, naming what is wrong, and leaves the model alone."""
    before = snapshot(model)
    with pytest.raises(convlora.ConvLoRAError, match=message):
        convlora.load(model, path)
    assert snapshot(model) == before


def test_a_layer_that_the_model_has_under_another_name_is_an_error(tmp_path: Path) -> None:
    path, base = saved(tmp_path)
    renamed = nn.Sequential()
    renamed.add_module("0", base[0])
    renamed.add_module("head", base[1])
    refuse(renamed, path, "unexpected: 1; nearest")


def test_a_flipped_byte_is_an_error_wherever_it_is(tmp_path: Path) -> None:
    path, base = saved(tmp_path)
    whole = path.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        refuse(base, path, "read: ")
    path.write_bytes(whole)
    convlora.load(base, path)


def test_nan_factors_with_a_right_checksum_are_an_error(tmp_path: Path) -> None:
    path, base = saved(tmp_path)
    tensors = load_file(path)
    tensors["0.lora_B"][3, 1] = math.nan
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    metadata["checksum"] = checksum(tensors, metadata)
    save_file(tensors, path, metadata)
    refuse(base, path, r"non-finite: 0\.lora_B")


@pytest.mark.parametrize("damage", ["flipped byte", "NaN"])
def test_peft_loads_a_damaged_file_silently(damage: str, tmp_path: Path, peft: Any) -> None:
    base, x = nn.Sequential(nn.Conv2d(4, 8, 3)), torch.randn(IMAGE)
    config = peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False)
    peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(str(tmp_path), save_embedding_layers=False)
    path = tmp_path / "adapter_model.safetensors"
    right = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))(x)
    if damage == "NaN":
        save_file({key: tensor * math.nan for key, tensor in load_file(path).items()}, path)
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 0x40]))
    assert not torch.equal(peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))(x), right)


@both
def test_state_saved_while_merged_reloads_with_the_update_once(factors: str, tmp_path: Path) -> None:
    base, x = nn.Sequential(nn.Conv2d(4, 8, 3)).eval(), torch.randn(IMAGE)
    model = adapted(base, factors)
    expected = model(x)
    torch.save(convlora.merge(model).state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = adapted(base, factors)
    again.load_state_dict(state)
    assert torch.equal(again(x), expected)
    assert torch.equal(convlora.merge(again)(x), expected)
    assert torch.equal(state["0.weight"], base[0].weight)


@both
def test_merging_on_a_bfloat16_base_is_as_exact_as_bfloat16_can_be(factors: str) -> None:
    layer = adapted(nn.Conv2d(8, 8, 3).bfloat16(), factors)
    exact = exact_weight(layer, factors)
    best = (exact.bfloat16().double() - exact).abs()
    ours = (convlora.merge(layer).weight.double() - exact).abs()  # type: ignore[operator]
    assert ours.max() <= best.max() * 1.001
    assert ours.mean() <= best.mean() * 1.001


def test_peft_merging_on_a_bfloat16_base_rounds_more_than_once(peft: Any) -> None:
    layer = peft_adapted(peft, nn.Sequential(nn.Conv2d(8, 8, 3).bfloat16()))[0]
    base, a, b = (m.weight.detach().double() for m in (layer.base_layer, layer.lora_A.default, layer.lora_B.default))
    exact = base + (b.flatten(1) @ a.flatten(1)).view_as(base)
    layer.merge()
    best = (exact.bfloat16().double() - exact).abs()
    assert (layer.base_layer.weight.double() - exact).abs().mean() > best.mean() * 1.1
