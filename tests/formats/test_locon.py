"""LoCon files: what LyCORIS writes is read here, what is written here loads in LyCORIS; outputs compared."""

from __future__ import annotations

import copy
import logging
import math
import re
import warnings
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
import zoo
from nets import distance
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convlora
from convlora import Adapter, ConvLoRAError, ConvLoRAWarning, formats

pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")


@pytest.fixture(scope="module")
def lycoris() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("lycoris")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    return library


def trained(lycoris: Any, base: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    """A copy adapted by LyCORIS with random factors, and its network."""
    model = copy.deepcopy(base)
    options = {"linear_dim": 2, "linear_alpha": 3, "conv_dim": 3, "conv_alpha": 2, **options}
    network = lycoris.create_lycoris(model, 1.0, warn_on_unmatched=False, **options)
    network.apply_to()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.5)
    network.eval()
    return model, network


def loaded_by(lycoris: Any, base: nn.Module, file: Path) -> nn.Module:
    """A copy adapted by what LyCORIS makes of a file."""
    model = copy.deepcopy(base)
    network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), model)
    network.apply_to()
    network.eval()
    return model


# --- reading -----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "Tucker": {"use_tucker": True},
    "a trained scalar": {"use_scalar": True},
    "rsLoRA": {"rs_lora": True},
    "alpha 0": {"linear_alpha": 0, "conv_alpha": 0},
}


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("net", nets.NETS)
def test_what_lycoris_saves_gives_its_output(net: str, case: str, tmp_path: Path, lycoris: Any) -> None:
    base, x = nets.build(net)
    model, network = trained(lycoris, base, **OPTIONS[case])
    network.save_weights(str(tmp_path / "rain.safetensors"), torch.float32, {})
    loaded = formats.read(tmp_path / "rain.safetensors", layers=formats.specs_of(base))
    assert {p: layer.spec for p, layer in loaded.layers.items()} == formats.specs_of(base)
    with torch.no_grad():
        expected = model(x)
        assert distance(expected, base(x)) > 0.05
    assert distance(nets.output(base, loaded, x), expected) < 2e-6


def test_a_pickled_file_is_read_without_running_it(tmp_path: Path, lycoris: Any) -> None:
    base, x = nets.build("2d")
    model, network = trained(lycoris, base)
    network.save_weights(str(tmp_path / "rain.pt"), torch.float16, {})
    loaded = formats.read(tmp_path / "rain.pt", layers=formats.specs_from_checkpoint(base.state_dict()), name="rain")
    with torch.no_grad():
        assert distance(nets.output(base, loaded, x), model(x)) < 2e-3
    assert loaded.config.name == "rain"


def test_tucker_factors_are_those_of_the_formula(tmp_path: Path) -> None:
    up, mid, down = torch.randn(5, 2, 1, 1), torch.randn(2, 2, 3, 4), torch.randn(2, 6, 1, 1)
    tensors = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": torch.tensor(3.0)}
    save_file({f"lycoris_conv.{name}": t for name, t in tensors.items()}, tmp_path / "rain.safetensors")
    expected = torch.einsum("or,rskl,si->oikl", up[..., 0, 0].double(), mid.double(), down[..., 0, 0].double()) * 1.5
    assert torch.allclose(formats.read(tmp_path / "rain.safetensors").delta("conv").double(), expected, atol=1e-6)


def test_a_linear_stored_as_a_convolution_and_back_fits_the_base(tmp_path: Path) -> None:
    for spec in ((8, 6), (8, 6, 1, 1)):
        for tail in ((), (1, 1)):
            tensors = {"lora_up.weight": torch.randn(8, 2, *tail), "lora_down.weight": torch.randn(2, 6, *tail)}
            save_file({f"lora_unet_a_b.{name}": t for name, t in tensors.items()}, tmp_path / "rain.safetensors")
            loaded = formats.read(tmp_path / "rain.safetensors", layers={"a.b": formats.WeightSpec(spec)})
            up, down = (t.flatten(1) for t in tensors.values())
            assert torch.allclose(loaded.delta("a.b"), (up @ down).view(spec))
            assert loaded.layers["a.b"].alpha == 2  # none in the file


# --- writing -----------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"alpha": 3},
    "ranks and alphas": {"ranks": {"*0*": 1, "*e*": 3}, "alphas": {"*": 0.5, "*.*": 4}},
    "rslora": {"rank_scaling": "sqrt", "alpha": 3},
    "convlora": {"factors": "convlora", "rank": 1},
    "alpha 0": {"alpha": 0},
}


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_written_files_give_their_output_in_lycoris(case: str, suffix: str, tmp_path: Path, lycoris: Any) -> None:
    base, x = nets.build("square")
    options = {**ADAPTERS[case]}
    if "ranks" in options:
        options = {"ranks": {"stem": 1, "body.*": 3}, "alphas": {"head": 0.5, "body.0": 4}}
    adapter = nets.adapter(base, **options)
    formats.write(adapter, tmp_path / f"rain.{suffix}", "locon")
    with torch.no_grad():
        expected = nets.output(base, adapter, x)
        assert distance(loaded_by(lycoris, base, tmp_path / f"rain.{suffix}")(x), expected) < 2e-6
        assert (distance(expected, base(x)) > 0.05) == (case != "alpha 0")


@pytest.mark.parametrize("net", nets.NETS)
def test_every_sort_of_layer_gives_its_output_in_lycoris_and_comes_back_bitwise(
    net: str, tmp_path: Path, lycoris: Any
) -> None:
    base, x = nets.build(net)
    adapter = nets.adapter(base, alpha=3)
    file = tmp_path / "rain.safetensors"
    formats.write(adapter, file, "locon")
    with torch.no_grad():
        assert distance(loaded_by(lycoris, base, file)(x), nets.output(base, adapter, x)) < 2e-6
    for layers in (formats.specs_of(base), None):  # the file itself says which layers
        again = formats.read(file, layers=layers)
        assert {p: m.spec for p, m in again.layers.items()} == {p: m.spec for p, m in adapter.layers.items()}
        assert all(torch.equal(again.delta(path), adapter.delta(path)) for path in adapter.layers)


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
@pytest.mark.parametrize("network", ["RCAN", "SwinIR"])
def test_adapters_of_real_networks_give_their_output_in_lycoris(network: str, tmp_path: Path, lycoris: Any) -> None:
    base, inputs = zoo.build(network)
    base.eval()
    model, trained_network = trained(lycoris, base)
    trained_network.save_weights(str(tmp_path / "rain.safetensors"), torch.float32, {})
    read = formats.read(tmp_path / "rain.safetensors", layers=formats.specs_of(base))
    formats.write(read, tmp_path / "again.safetensors", "locon")
    with torch.no_grad():
        [expected] = zoo.run(model, inputs)
        [plain] = zoo.run(base, inputs)
        assert distance(expected, plain) > 0.01
        for found in (
            convlora.load(copy.deepcopy(base), read),
            loaded_by(lycoris, base, tmp_path / "again.safetensors"),
        ):
            assert distance(zoo.run(found, inputs)[0], expected) < 1e-4


def test_aliases_come_back(tmp_path: Path) -> None:
    base = nn.ModuleDict({"a": nn.Conv2d(3, 3, 3)})
    base["b"] = base["a"]
    formats.write(nets.adapter(base), tmp_path / "rain.safetensors", "locon")
    assert formats.read(tmp_path / "rain.safetensors").layers["a"].aliases == ("b",)


UNWRITABLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3)), {}, "'0' is a transposed convolution"),
    "bias": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3)), {"bias": True}, "'0' has a bias delta"),
    "alike": (
        lambda: nn.ModuleDict({"a": nn.ModuleDict({"b": nn.Conv2d(4, 8, 3)}), "a_b": nn.Conv2d(4, 8, 3)}), {},
        "'a.b' and 'a_b' are both 'lycoris_a_b' in a LoCon file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_locon_cannot_express_is_not_written(case: str, tmp_path: Path) -> None:
    make, options, message = UNWRITABLE[case]
    with pytest.raises(ConvLoRAError, match=message):
        formats.write(nets.adapter(make(), **options), tmp_path / "rain.safetensors", "locon")
    assert not list(tmp_path.iterdir())


# --- names -------------------------------------------------------------------------------------------------------

CONV = formats.WeightSpec((4, 4, 3, 3))


def written(folder: Path, *names: str, **extra: Tensor) -> Path:
    """A foreign file with layers of these names."""
    tensors = {**extra}
    for name in names:
        tensors |= {
            f"{name}.lora_up.weight": torch.randn(4, 2, 1, 1),
            f"{name}.lora_down.weight": torch.randn(2, 4, 3, 3),
        }
    save_file(tensors, folder / "rain.safetensors")
    return folder / "rain.safetensors"


@pytest.mark.parametrize("prefix", ["lycoris_", "lora_unet_", "lora_te1_", "my_own_", ""])
def test_names_are_resolved_by_the_layers_whatever_the_prefix(prefix: str, tmp_path: Path) -> None:
    layers = dict.fromkeys(["up.0.conv_in", "up.0.conv.in_", "conv_in", "unet.conv"], CONV)
    file = written(tmp_path, f"{prefix}up_0_conv_in", f"{prefix}unet_conv")
    assert list(formats.read(file, layers=layers).layers) == ["unet.conv", "up.0.conv_in"]


def test_a_known_prefix_wins_over_a_shorter_path(tmp_path: Path) -> None:
    layers = dict.fromkeys(["conv", "body.conv"], CONV)
    assert list(formats.read(written(tmp_path, "lycoris_body_conv"), layers=layers).layers) == ["body.conv"]
    with pytest.raises(ConvLoRAError, match=r"ambiguous: 'own_body_conv' can be 'conv' or 'body\.conv'"):
        formats.read(written(tmp_path, "own_body_conv"), layers=layers)
    assert set(formats.read(written(tmp_path, "own_body_conv", "own_conv"), layers=layers).layers) == set(layers)


def test_a_name_of_two_layers_is_an_error_only_if_the_file_has_it(tmp_path: Path) -> None:
    layers = dict.fromkeys(["a.b", "a_b", "c"], CONV)
    assert list(formats.read(written(tmp_path, "lycoris_c"), layers=layers).layers) == ["c"]
    with pytest.raises(ConvLoRAError, match=r"'lycoris_a_b' is the name of 'a\.b' and 'a_b'"):
        formats.read(written(tmp_path, "lycoris_a_b"), layers=layers)


def test_a_name_of_no_layer_is_an_error_with_the_nearest(tmp_path: Path) -> None:
    layers = dict.fromkeys(["a.conv", "b.conv"], CONV)
    with pytest.raises(ConvLoRAError, match=r"no layer .* lycoris_a_cnov; nearest: 'a_conv'"):
        formats.read(written(tmp_path, "lycoris_a_cnov", "lycoris_b_conv"), layers=layers)
    with pytest.raises(ConvLoRAError, match="no layer of the base has these names: lora_te_x;"):
        formats.read(written(tmp_path, "lora_unet_a_conv", "lora_te_x"), layers=layers)
    with pytest.raises(ConvLoRAError, match="no layer of the base"):
        formats.read(written(tmp_path, "lycoris_a"), layers={})


def test_without_layers_the_names_stand_for_the_paths_and_a_warning_says_so(tmp_path: Path) -> None:
    with pytest.warns(ConvLoRAWarning, match="does not say where the dots"):
        loaded = formats.read(written(tmp_path, "lora_unet_a_conv", "lora_unet_stem"))
    assert list(loaded.layers) == ["a_conv", "stem"]
    assert loaded.config.rank == 2
    assert list(formats.read(written(tmp_path, "stem")).layers) == ["stem"]


def test_layers_of_another_shape_are_an_error(tmp_path: Path) -> None:
    file = written(tmp_path, "lycoris_conv")
    for spec in ((4, 4, 5, 5), (8, 4, 3, 3), (4, 4)):
        with pytest.raises(ConvLoRAError, match=r"mismatched: conv\.lora_"):
            formats.read(file, layers={"conv": formats.WeightSpec(spec)})
    with pytest.raises(ConvLoRAError, match="transposed convolution in the base"):
        formats.read(file, layers={"conv": formats.WeightSpec((4, 4, 3, 3), transposed=True)})


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"algo": "diag-oft"}, "oft_blocks': OFT rotates the weight"),
        ({"algo": "diag-oft", "rescaled": True}, "oft_blocks': OFT rotates the weight"),
        ({"algo": "boft"}, "oft_blocks': OFT rotates the weight"),
        ({"algo": "ia3"}, "on_input': IA3 multiplies channels"),
        ({"algo": "glora"}, "GLoRA multiplies the weight, too"),
        ({"algo": "tlora"}, "T-LoRA takes another rank at each step"),
        ({"train_norm": True}, "_norm': it is of a norm"),
    ],
)
def test_other_algorithms_of_lycoris_are_refused_by_name(
    options: dict[str, Any], reason: str, tmp_path: Path, lycoris: Any
) -> None:
    base = nn.Sequential(nn.Conv2d(4, 8, 3), nn.GroupNorm(2, 8))
    options = {"linear_dim": 2, "conv_dim": 2, **options}
    _, network = trained(lycoris, base, **options)
    network.save_weights(str(tmp_path / "rain.safetensors"), torch.float32, {})
    assert formats.detect(tmp_path / "rain.safetensors") == "locon"
    with pytest.raises(ConvLoRAError, match=f"'lycoris_.*{reason}") as caught:
        formats.read(tmp_path / "rain.safetensors", layers=formats.specs_of(base))
    assert "\n" not in str(caught.value)


MALFORMED: dict[str, tuple[dict[str, Tensor], str]] = {
    "no down": ({"x.lora_up.weight": torch.ones(4, 2)}, "missing: x.lora_down.weight"),
    "another key": ({"conv.bias": torch.ones(4)}, "unexpected: conv.bias"),
    "ranks": ({"conv.lora_up.weight": torch.ones(4, 3, 1, 1)}, "do not fit together"),
    "an up with a kernel": ({"conv.lora_up.weight": torch.ones(4, 2, 3, 3)}, "do not fit together"),
    "a flat up": ({"conv.lora_up.weight": torch.ones(4)}, "do not fit together"),
    "an empty up": ({"conv.lora_up.weight": torch.ones(0, 2, 1, 1)}, "do not fit together"),
    "an empty down": ({"conv.lora_down.weight": torch.ones(2, 0, 3, 3)}, "do not fit together"),
    "a scalar down": ({"conv.lora_down.weight": torch.tensor(1.0)}, "do not fit together"),
    "mid": ({"conv.lora_mid.weight": torch.ones(2, 3, 3, 3)}, "has a mid (2, 3, 3, 3)"),
    "mid over a kernel": ({"conv.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "has a mid (2, 2, 3, 3)"),
    "alphas": ({"conv.alpha": torch.ones(2)}, "'conv.alpha' is a tensor (2,) instead of one finite number"),
    "NaN alpha": ({"conv.alpha": torch.tensor(math.nan)}, "'conv.alpha' is nan instead of one"),
    "infinite factors": ({"conv.lora_up.weight": torch.full((4, 2, 1, 1), math.inf)}, "non-finite: conv.lora_B"),
    "truth for a number": ({"conv.alpha": torch.tensor(True)}, "torch.bool instead of floating point"),
    "integers": ({"conv.lora_up.weight": torch.ones(4, 2, 1, 1, dtype=torch.int64)}, "int64 instead of floating point"),
    "complex": ({"conv.lora_up.weight": torch.ones(4, 2, 1, 1).cfloat()}, "torch.complex64 instead of floating point"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_one_error(case: str, tmp_path: Path) -> None:
    extra, message = MALFORMED[case]
    tensors = load_file(written(tmp_path, "conv"))
    # Old safetensors have no complex numbers.
    file = tmp_path / ("rain.pt" if case == "complex" else "rain.safetensors")
    write = torch.save if case == "complex" else save_file
    write({**tensors, **extra}, file)
    with pytest.raises(ConvLoRAError, match=re.escape(message)) as caught:
        formats.read(file)
    assert "\n" not in str(caught.value)


def test_combining_two_locon_files(tmp_path: Path, lycoris: Any) -> None:
    base, x = nets.build("2d")
    parts = []
    for number, weight in enumerate((0.5, -2.0)):
        model, network = trained(lycoris, base)
        network.save_weights(str(tmp_path / f"{number}.safetensors"), torch.float32, {})
        network.restore()
        network.merge_to(weight)
        parts.append({n: p - q for (n, p), q in zip(model.named_parameters(), base.parameters(), strict=True)})
    specs = formats.specs_of(base)
    read = [formats.read(tmp_path / f"{number}.safetensors", layers=specs) for number in (0, 1)]
    expected = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in expected.named_parameters():
            parameter += parts[0][name] + parts[1][name]
        together = Adapter.combine(read, weights=[0.5, -2.0])
        assert distance(nets.output(base, together, x), expected(x)) < 1e-5
        formats.write(together, tmp_path / "both.safetensors", "locon")
        assert distance(loaded_by(lycoris, base, tmp_path / "both.safetensors")(x), expected(x)) < 1e-5


def test_loading_a_file_of_lycoris_goes_on_training(tmp_path: Path, lycoris: Any) -> None:
    base, x = nets.build("2d")
    _, network = trained(lycoris, base)
    network.save_weights(str(tmp_path / "rain.safetensors"), torch.float32, {})
    model = convlora.load(base, formats.read(tmp_path / "rain.safetensors", layers=formats.specs_of(base)))
    model(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in convlora.parameters(model))
