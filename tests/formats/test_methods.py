"""DoRA, LoHa, LoKr and whole differences: equal in float64 to what LyCORIS and PEFT compute, and back again."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import distance
from oracle import randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convlora
from convlora import Adapter, ConvLoRAError, formats

ROUNDING = 1e-6  # files hold float32
pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")


@pytest.fixture(scope="module")
def lycoris() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        library = pytest.importorskip("lycoris")
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)
    return library


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def wide(name: str) -> tuple[nn.Module, Tensor]:
    """A network with channels that divide in several ways, in float64, and an input for it."""
    make, shape = {
        "1d": (lambda: nn.Sequential(nn.Conv1d(8, 12, 3, stride=2), nn.SiLU(), nn.Conv1d(12, 6, 1)), (2, 8, 11)),
        "2d": (
            lambda: nn.Sequential(
                nn.Conv2d(8, 12, 3, padding=1), nn.SiLU(), nn.Conv2d(12, 16, (1, 5)), nn.Linear(4, 6)
            ),
            (2, 8, 5, 8),
        ),
        "3d": (lambda: nn.Sequential(nn.Conv3d(8, 12, 3, padding=1), nn.SiLU(), nn.Conv3d(12, 4, 1)), (1, 8, 3, 3, 3)),
        "groups": (lambda: nn.Sequential(nn.Conv2d(8, 12, 3, groups=2), nn.Conv2d(12, 12, 3, groups=12)), (2, 8, 7, 7)),
    }[name]
    return make().double().eval(), torch.randn(shape, dtype=torch.float64)


NETS = ["1d", "2d", "3d", "groups"]


def output(base: nn.Module, adapter: Adapter, x: Tensor) -> Tensor:
    """Of the base with the adapter, live and merged into its bare checkpoint."""
    with torch.no_grad():
        live: Tensor = convlora.load(copy.deepcopy(base), adapter)(x)
        merged = copy.deepcopy(base)
        merged.load_state_dict(adapter.apply_to(base.state_dict()))
        assert distance(merged(x), live) < ROUNDING
    return live


# --- LyCORIS -----------------------------------------------------------------------------------------------------


def by_lycoris(lycoris: Any, base: nn.Module, **options: Any) -> tuple[nn.Module, Any]:
    """A copy adapted by LyCORIS with random factors, in float64, and its network."""
    model = copy.deepcopy(base)
    options = {"linear_dim": 2, "linear_alpha": 3, "conv_dim": 2, "conv_alpha": 5, **options}
    network = lycoris.create_lycoris(model, 1.0, warn_on_unmatched=False, **options)
    network.apply_to()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "dora_scale" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model, network.double().eval()


def written_by_lycoris(network: Any, file: Path) -> Path:
    network.save_weights(str(file), torch.float64, {})
    return file


ALGORITHMS: dict[str, tuple[dict[str, Any], str]] = {  # options -> factorization
    "LoHa": ({"algo": "loha"}, "loha"),
    "LoHa, Tucker": ({"algo": "loha", "use_tucker": True}, "loha"),
    "LoHa, rs": ({"algo": "loha", "rs_lora": True}, "loha"),
    "LoHa, a trained scalar": ({"algo": "loha", "use_scalar": True}, "loha"),
    "LoKr": ({"algo": "lokr"}, "lokr"),
    "LoKr, rank 1": ({"algo": "lokr", "linear_dim": 1, "conv_dim": 1}, "lokr"),
    "LoKr, Tucker": ({"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "use_tucker": True}, "lokr"),
    "LoKr, w1 in two": ({"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "decompose_both": True}, "lokr"),
    "LoKr, whole": ({"algo": "lokr", "full_matrix": True}, "lokr"),
    "LoKr, rs": ({"algo": "lokr", "linear_dim": 1, "conv_dim": 1, "rs_lora": True}, "lokr"),
    "LoKr, unbalanced": ({"algo": "lokr", "unbalanced_factorization": True, "full_matrix": True}, "dense"),
    "whole differences": ({"algo": "full"}, "dense"),
    "DoRA": ({"dora_wd": True}, "dora"),
    "DoRA, Tucker": ({"dora_wd": True, "use_tucker": True}, "dora"),
    "DoRA by input channel": ({"dora_wd": True, "wd_on_output": False}, "dora_in"),
    "DoRA of LoHa": ({"algo": "loha", "dora_wd": True}, "dora"),
    "DoRA of LoKr": ({"algo": "lokr", "dora_wd": True}, "dora"),
}


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("case", ALGORITHMS)
def test_what_lycoris_saves_gives_its_output(case: str, net: str, tmp_path: Path, lycoris: Any) -> None:
    options, factors = ALGORITHMS[case]
    base, x = wide(net)
    model, network = by_lycoris(lycoris, base, **options)
    with torch.no_grad():
        expected = model(x)
    file = written_by_lycoris(network, tmp_path / "rain.safetensors")
    loaded = formats.read(file, layers=formats.specs_of(base))
    assert loaded.config.factors == factors
    assert {p: layer.spec for p, layer in loaded.layers.items()} == formats.specs_of(base)
    assert distance(expected, base(x)) > 0.05
    assert distance(output(base, loaded, x), expected) < 3 * ROUNDING


def test_files_of_several_methods_are_brought_to_one_form(tmp_path: Path, lycoris: Any) -> None:
    base, x = wide("2d")
    files = {}
    for algo in ("lora", "loha", "lokr", "full"):
        model, network = by_lycoris(lycoris, base, algo=algo)
        with torch.no_grad():
            model(x)
        files[algo] = load_file(written_by_lycoris(network, tmp_path / f"{algo}.safetensors"))
    plan = {"lycoris_0.": "lora", "lycoris_2.": "full", "lycoris_3.": "loha"}
    together = {n: t for start, algo in plan.items() for n, t in files[algo].items() if n.startswith(start)}
    save_file(together, tmp_path / "together.safetensors")
    specs = formats.specs_of(base)
    adapter = formats.read(tmp_path / "together.safetensors", layers=specs)
    assert adapter.config.factors == "locon"
    assert adapter.layers["0"].rank == 2  # the factors of LoCon layers stay
    parts = {algo: formats.read(tmp_path / f"{algo}.safetensors", layers=specs) for algo in files}
    for path, algo in {"0": "lora", "2": "full", "3": "loha"}.items():
        torch.testing.assert_close(adapter.delta(path), parts[algo].delta(path), rtol=1e-12, atol=1e-12)
    plan = {"lycoris_0.": "loha", "lycoris_3.": "lokr"}
    together = {n: t for start, algo in plan.items() for n, t in files[algo].items() if n.startswith(start)}
    save_file(together, tmp_path / "together.safetensors")
    adapter = formats.read(tmp_path / "together.safetensors", layers=specs)
    assert adapter.config.factors == "dense"
    for path, algo in {"0": "loha", "3": "lokr"}.items():
        torch.testing.assert_close(adapter.delta(path), parts[algo].delta(path), rtol=1e-12, atol=1e-12)


def test_dora_beside_another_method_is_refused(tmp_path: Path, lycoris: Any) -> None:
    base, _ = wide("2d")
    tensors = {}
    for options in ({"dora_wd": True}, {}):
        _, network = by_lycoris(lycoris, base, **options)
        found = load_file(written_by_lycoris(network, tmp_path / "rain.safetensors"))
        tensors |= {n: t for n, t in found.items() if n.startswith("lycoris_0") == bool(options)}
    save_file(tensors, tmp_path / "rain.safetensors")
    with pytest.raises(
        ConvLoRAError, match="'0' is DoRA \\(dora\\) and '3' is locon: an adapter has one factorization"
    ):
        formats.read(tmp_path / "rain.safetensors", layers=formats.specs_of(base))


def loaded_by_lycoris(lycoris: Any, base: nn.Module, file: Path, **options: Any) -> nn.Module:
    """A copy adapted by what LyCORIS makes of a file; with options, by a network of these that loads it."""
    model = copy.deepcopy(base)
    if options:
        network = lycoris.create_lycoris(model, 1.0, warn_on_unmatched=False, **options)
        network.apply_to()
        assert not network.load_weights(str(file))
    else:
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(file), model)
        network.apply_to()
    network.double().eval()
    return model


def trained(base: nn.Module, factors: str, **options: Any) -> Adapter:
    """An adapter with trained-looking factors."""
    model = convlora.inject(
        copy.deepcopy(base), **{"targets": "*", "rank": 2, "alpha": 3, "factors": factors, **options}
    )
    magnitudes = {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith("lora_magnitude")}
    randomise(model, std=0.4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in magnitudes:
                parameter.copy_(magnitudes[name] * (1 + torch.rand_like(parameter)))
    return convlora.adapter(model)


WRITTEN = ["loha", "lokr", "dense", "dora"]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("factors", WRITTEN)
@pytest.mark.parametrize("scaling", [{}, {"rank_scaling": "sqrt", "ranks": {"0": 1}}, {"alpha": 0}])
def test_written_files_give_their_output_in_lycoris_and_come_back(
    factors: str, net: str, scaling: dict[str, Any], tmp_path: Path, lycoris: Any
) -> None:
    base, x = wide(net)
    adapter = trained(base, factors, **scaling)
    file = tmp_path / "rain.safetensors"
    formats.write(adapter, file, "locon")
    expected = output(base, adapter, x)
    with torch.no_grad():
        assert distance(loaded_by_lycoris(lycoris, base, file)(x), expected) < 3 * ROUNDING
        assert (distance(expected, base(x)) > 0.05) or scaling.get("alpha") == 0
    for layers in (formats.specs_of(base), None):  # the file itself says which layers
        again = formats.read(file, layers=layers)
        assert again.config.factors == factors
        assert distance(output(base, again, x), expected) < ROUNDING


def test_written_dora_by_input_channel_gives_its_output_in_lycoris(tmp_path: Path, lycoris: Any) -> None:
    base, x = wide("2d")
    adapter = trained(base, "dora_in")
    formats.write(adapter, tmp_path / "rain.safetensors", "locon")
    options = {"linear_dim": 2, "linear_alpha": 3, "dora_wd": True, "wd_on_output": False}
    with torch.no_grad():
        found = loaded_by_lycoris(lycoris, base, tmp_path / "rain.safetensors", **options)(x)
    expected = output(base, adapter, x)
    assert distance(found, expected) < 3 * ROUNDING
    again = formats.read(tmp_path / "rain.safetensors")
    assert again.config.factors == "dora_in"
    assert distance(output(base, again, x), expected) < ROUNDING


def test_bias_deltas_are_written_beside_whole_differences_alone(tmp_path: Path, lycoris: Any) -> None:
    base, x = wide("2d")
    adapter = trained(base, "dense", bias=True)
    formats.write(adapter, tmp_path / "rain.safetensors", "locon")
    expected = output(base, adapter, x)
    with torch.no_grad():
        assert distance(loaded_by_lycoris(lycoris, base, tmp_path / "rain.safetensors")(x), expected) < 3 * ROUNDING
    for factors in ("loha", "lokr", "dora", "locon"):
        with pytest.raises(ConvLoRAError, match="'0' has a bias delta, which LyCORIS leaves out beside factors"):
            formats.write(trained(base, factors, bias=True), tmp_path / "other.safetensors", "locon")


# --- PEFT --------------------------------------------------------------------------------------------------------


def by_peft(peft: Any, base: nn.Module, kind: str, **options: Any) -> Any:
    """A copy with random factors of PEFT, in float64."""
    config = {"LOHA": peft.LoHaConfig, "LOKR": peft.LoKrConfig, "LORA": peft.LoraConfig}[kind]
    scale = {"lora_alpha": 3} if kind == "LORA" else {"alpha": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT on convolutions whose kernel has one size
        model = peft.get_peft_model(
            copy.deepcopy(base), config(**{"target_modules": list(formats.specs_of(base)), "r": 2, **scale, **options})
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
            elif any(mark in name for mark in ("lora_", "hada_", "lokr_")):
                parameter.normal_(std=0.4)
    return model.double().eval()


METHODS: dict[str, tuple[str, dict[str, Any], str]] = {  # PEFT's type, options -> factorization
    "DoRA": ("LORA", {"use_dora": True}, "dora"),
    "DoRA, rs, patterns": (
        "LORA", {"use_dora": True, "use_rslora": True, "rank_pattern": {"0": 3}, "alpha_pattern": {"2": 5}}, "dora"
    ),
    "LoHa": ("LOHA", {}, "loha"),
    "LoHa, Tucker": ("LOHA", {"use_effective_conv2d": True}, "loha"),
    "LoHa, patterns": ("LOHA", {"rank_pattern": {"0": 3}, "alpha_pattern": {"^2": 5}}, "loha"),
    "LoKr": ("LOKR", {}, "lokr"),
    "LoKr, rank 1": ("LOKR", {"r": 1}, "lokr"),
    "LoKr, Tucker": ("LOKR", {"r": 1, "use_effective_conv2d": True}, "lokr"),
    "LoKr, w1 in two": ("LOKR", {"r": 1, "decompose_both": True}, "lokr"),
    "LoKr, whole": ("LOKR", {"r": 100, "alpha": 7}, "lokr"),
    "LoKr, a factor": ("LOKR", {"decompose_factor": 2, "r": 100}, "dense"),
    "LoKr, patterns": ("LOKR", {"r": 1, "rank_pattern": {"0": 9}, "alpha_pattern": {"0": 5}}, "lokr"),
}  # fmt: skip


FACTORED = ["LoKr, rank 1", "LoKr, w1 in two"]  # where w2 is a product


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("case", METHODS)
def test_what_peft_saves_gives_its_output(case: str, net: str, tmp_path: Path, peft: Any) -> None:
    kind, options, factors = METHODS[case]
    if kind == "LORA" and net == "groups":
        pytest.skip("PEFT's LoRA of grouped convolutions is of another shape")
    if kind != "LORA" and net == "3d":
        pytest.skip("PEFT has no LoHa and LoKr of Conv3d")
    if case == "LoKr, Tucker" and net == "1d":
        pytest.skip("PEFT's own forward fails there")
    base, x = wide(net)
    model = by_peft(peft, base, kind, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(str(tmp_path))
    loaded = formats.read(tmp_path, layers=formats.specs_of(base))
    # PEFT's product of a whole w2 of Conv1d is in no order that LoKr factors have.
    assert loaded.config.factors == ("dense" if (kind, net) == ("LOKR", "1d") and case not in FACTORED else factors)
    with torch.no_grad():
        expected = model(x)
        assert distance(expected, base(x)) > 0.02
    assert distance(output(base, loaded, x), expected) < ROUNDING
    raw = {
        n: t.detach().contiguous()
        for n, t in model.state_dict().items()
        if any(f in n for f in ("lora_", "hada_", "lokr_"))
    }
    save_file(raw, tmp_path / "adapter_model.safetensors")  # with the adapter's name in the keys
    raw_loaded = formats.read(tmp_path, layers=formats.specs_of(base))
    assert distance(output(base, raw_loaded, x), expected) < ROUNDING


@pytest.mark.parametrize("factors", ["loha", "lokr"])
def test_kernels_that_a_folder_does_not_say_are_asked_for(factors: str, tmp_path: Path) -> None:
    base, _ = wide("2d")
    formats.write(trained(base, factors, targets=["0"], rank=1), tmp_path, "peft")
    if factors == "lokr":
        with pytest.raises(ConvLoRAError, match="'0' is of a convolution, or divides its channels otherwise"):
            formats.read(tmp_path)
    else:
        with pytest.raises(ConvLoRAError, match="mismatched: 0"):
            convlora.load(base, formats.read(tmp_path))
    assert formats.read(tmp_path, layers=formats.specs_of(base)).config.factors == factors
    formats.write(trained(base, factors, targets=["3"]), tmp_path, "peft")
    assert list(formats.read(tmp_path).layers) == ["3"]  # a Linear has none


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("factors", WRITTEN)
@pytest.mark.parametrize("scaling", [{}, {"rank_scaling": "sqrt", "ranks": {"0": 1}, "alphas": {"2": 7}}])
def test_written_folders_give_their_output_in_peft_and_come_back(
    factors: str, net: str, scaling: dict[str, Any], tmp_path: Path, peft: Any
) -> None:
    base, x = wide(net)
    scaling = {**scaling, **({"alphas": {"0": 7}} if "alphas" in scaling and net in ("1d", "groups") else {})}
    adapter = trained(
        base, factors, **({**scaling, "rank": 1, "ranks": None} if (factors, net) == ("lokr", "1d") else scaling)
    )
    if (net == "groups" and factors in ("dora", "dense")) or (net == "3d" and factors in ("loha", "lokr")):
        with pytest.raises(ConvLoRAError, match=r"no PEFT adapter holds this one: '0' is a (grouped )?convolution"):
            formats.write(adapter, tmp_path / "rain", "peft")
        return
    formats.write(adapter, tmp_path, "peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).double().eval()
    expected = output(base, adapter, x)
    with torch.no_grad():
        assert distance(model(x), expected) < ROUNDING
    again = formats.read(tmp_path, layers=formats.specs_of(base))
    assert again.config.factors == ("locon" if factors == "dense" else factors)
    assert distance(output(base, again, x), expected) < ROUNDING


def test_what_peft_has_no_place_for_is_not_written(tmp_path: Path) -> None:
    base, _ = wide("2d")
    for factors in ("loha", "lokr", "dora"):
        with pytest.raises(ConvLoRAError, match=f"'0' has a bias delta, for which PEFT has no place beside {factors}"):
            formats.write(trained(base, factors, bias=True), tmp_path / "rain", "peft")
    with pytest.raises(
        ConvLoRAError, match="'0' is a Conv1d with a whole lokr_w2, whose product PEFT forms in another"
    ):
        formats.write(trained(wide("1d")[0], "lokr", rank=9), tmp_path / "rain", "peft")
    with pytest.raises(ConvLoRAError, match="the update of 'dora_in' factors depends on the base's weights"):
        formats.write(trained(base, "dora_in"), tmp_path / "rain", "peft")
    assert not list(tmp_path.iterdir())


def test_a_trained_head_beside_dora_reads_and_writes(tmp_path: Path, peft: Any) -> None:
    base, x = wide("2d")
    model = by_peft(peft, base, "LORA", use_dora=True, target_modules=["0", "2"], modules_to_save=["3"])
    with torch.no_grad():
        model.base_model.model[3].modules_to_save["default"].weight.normal_()
        expected = model(x)
    model.save_pretrained(str(tmp_path / "theirs"))
    adapter = formats.read(tmp_path / "theirs")
    assert (adapter.config.factors, list(adapter.modules)) == ("dora", ["3"])
    formats.write(adapter, tmp_path / "ours", "peft")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).double().eval()
    with torch.no_grad():
        assert distance(again(x), expected) < ROUNDING
        assert distance(convlora.load(copy.deepcopy(base), adapter)(x), expected) < ROUNDING


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ALGORITHMS)
def test_half_precision_files_mean_what_their_values_mean(
    case: str, dtype: torch.dtype, tmp_path: Path, lycoris: Any
) -> None:
    base, x = wide("2d")
    _, network = by_lycoris(lycoris, base, **ALGORITHMS[case][0])
    narrow = {n: t.to(dtype) for n, t in load_file(written_by_lycoris(network, tmp_path / "rain.safetensors")).items()}
    outputs = []
    for tensors in (narrow, {name: tensor.double() for name, tensor in narrow.items()}):
        save_file(tensors, tmp_path / "rain.safetensors")
        outputs.append(output(base, formats.read(tmp_path / "rain.safetensors", layers=formats.specs_of(base)), x))
    assert distance(*outputs) < ROUNDING


def test_attention_is_for_lora_alone_in_peft(tmp_path: Path) -> None:
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2)})
    for factors, path in (("dora", "attn.in_proj"), ("loha", "attn.in_proj"), ("lokr", "attn.out_proj")):
        adapter = trained(base, factors, targets=[path])
        with pytest.raises(ConvLoRAError, match=f"'{path}' is a projection of an attention, which only LoRA of PEFT"):
            formats.write(adapter, tmp_path / "rain", "peft", base=base.state_dict())
    with pytest.raises(ConvLoRAError, match=r"no file of diffusers holds this one: 'attn\.in_proj' is a projection"):
        formats.write(trained(base, "locon", targets=["attn.in_proj"]), tmp_path / "rain.safetensors", "diffusers")
    assert not list(tmp_path.iterdir())
