"""Files of diffusers: what it saves is read here, what is written here loads there; updates and outputs compared."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import distance
from oracle import randomise
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convlora
from convlora import Adapter, ConvLoRAError, formats
from convlora.formats.locon import FOLDER_FILE, FOLDER_FILES
from convlora.formats.peft import METADATA

ROUNDING = 1e-6  # a model holds float32 factors
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def diffusers() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("peft")
        library = pytest.importorskip("diffusers")
    before = library.utils.logging.get_verbosity()
    library.utils.logging.set_verbosity_error()
    yield library
    library.utils.logging.set_verbosity(before)


def unet(diffusers: Any) -> nn.Module:
    """A small one with convolutions, attention and time embeddings, in float64."""
    torch.manual_seed(0)
    network: nn.Module = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, attention_head_dim=4,
        cross_attention_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return network.double().eval()


def run(network: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((1, 4, 8, 8), (1, 3, 8)))
    with torch.no_grad():
        return network(x, torch.tensor([7]), text).sample  # type: ignore[no-any-return]


def adapted(network: nn.Module, **options: Any) -> Any:
    """A copy with an adapter of random factors, added as diffusers has it."""
    from peft import LoraConfig

    model: Any = copy.deepcopy(network)
    torch.manual_seed(2)
    model.add_adapter(LoraConfig(**{"target_modules": ["conv1", "to_q"], "init_lora_weights": False, **options}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(1 + torch.rand_like(parameter))
    return model.double().eval()


CONFIGS: dict[str, dict[str, Any]] = {
    "alpha": {"r": 4, "lora_alpha": 16},
    "patterns": {"r": 4, "lora_alpha": 16, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"conv1": 3}},
    "rs": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "bias": {"r": 2, "lora_alpha": 3, "lora_bias": True, "target_modules": ["conv1", "to_out.0"]},
    "DoRA": {"r": 2, "lora_alpha": 3, "use_dora": True},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_what_a_model_saves_gives_its_output(case: str, tmp_path: Path, diffusers: Any) -> None:
    base = unet(diffusers)
    model = adapted(base, **CONFIGS[case])
    model.save_lora_adapter(str(tmp_path))
    expected = run(model)
    for place in (tmp_path, tmp_path / FOLDER_FILE):
        assert formats.detect(place) == "diffusers"
        for layers in (formats.specs_of(base), None):
            adapter = formats.read(place, layers=layers)
            assert distance(run(convlora.load(copy.deepcopy(base), adapter)), expected) < ROUNDING
    assert distance(expected, run(base)) > 0.01
    if case == "patterns":
        assert {(p.rpartition(".")[2], layer.rank, layer.alpha) for p, layer in adapter.layers.items()} == {
            ("to_q", 2, 16), ("conv1", 4, 3),
        }  # fmt: skip


def pipeline_file(diffusers: Any, folder: Path, model: Any, **more: Any) -> Path:
    """What a pipeline saves of a UNet, and of what is given beside it."""
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(model)
    diffusers.StableDiffusionPipeline.save_lora_weights(str(folder), unet_lora_layers=layers, **more)
    return folder / FOLDER_FILE


def test_what_a_pipeline_saves_gives_its_output(tmp_path: Path, diffusers: Any) -> None:
    base = unet(diffusers)
    model = adapted(base, **CONFIGS["patterns"])
    stated = model.peft_config["default"].to_dict()
    file = pipeline_file(diffusers, tmp_path, model, unet_lora_adapter_metadata=stated)
    assert all(name.startswith("unet.") for name in load_file(file))
    for options in ({}, {"prefix": "unet"}, {"prefix": "unet."}):
        for layers in (formats.specs_of(base), None):
            adapter = formats.read(file, layers=layers, **options)
            assert set(adapter.layers) <= set(formats.specs_of(base))
            assert distance(run(convlora.load(copy.deepcopy(base), adapter)), run(model)) < ROUNDING


def test_a_file_without_metadata_takes_alpha_from_the_reader(tmp_path: Path, diffusers: Any) -> None:
    base = unet(diffusers)
    model = adapted(base, r=4, lora_alpha=16)
    file = pipeline_file(diffusers, tmp_path, model)
    specs = formats.specs_of(base)
    with pytest.raises(ConvLoRAError, match="has no scale: neither an alpha, nor lora_adapter_metadata in the file"):
        formats.read(file, layers=specs)
    for options in ({}, {"prefix": "unet"}):
        adapter = formats.read(file, layers=specs, alpha=16, **options)
        assert distance(run(convlora.load(copy.deepcopy(base), adapter)), run(model)) < ROUNDING
    model.save_lora_adapter(str(tmp_path / "stated"))
    with pytest.raises(ConvLoRAError, match="rank= and alpha= are for files that do not state them; this one does"):
        formats.read(tmp_path / "stated", alpha=16)


def test_a_pickled_file_is_read_without_running_it(tmp_path: Path, diffusers: Any) -> None:
    base = unet(diffusers)
    model = adapted(base, r=4, lora_alpha=16)
    model.save_lora_adapter(str(tmp_path), safe_serialization=False)
    assert [p.name for p in tmp_path.iterdir()] == [FOLDER_FILES[1]]
    assert formats.detect(tmp_path) == "diffusers"
    adapter = formats.read(tmp_path, layers=formats.specs_of(base), alpha=16)  # such a file has no metadata
    assert distance(run(convlora.load(copy.deepcopy(base), adapter)), run(model)) < ROUNDING


def text_encoder() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8
    )
    torch.manual_seed(3)
    network: nn.Module = transformers.CLIPTextModel(config)
    return network.eval()


def test_one_network_of_several_is_read_by_its_prefix(tmp_path: Path, diffusers: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    base, words = unet(diffusers), text_encoder()
    model = adapted(base, r=4, lora_alpha=16)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], init_lora_weights=False)
    encoder = inject_adapter_in_model(config, copy.deepcopy(words))
    own = {n.replace(".default", ""): t for n, t in encoder.state_dict().items() if "lora_" in n}
    file = pipeline_file(
        diffusers, tmp_path, model, unet_lora_adapter_metadata=model.peft_config["default"].to_dict(),
        text_encoder_lora_layers=own, text_encoder_lora_adapter_metadata=config.to_dict(),
    )  # fmt: skip
    with pytest.raises(ConvLoRAError, match=r"of several networks, 'text_encoder', 'unet': prefix= reads one of them"):
        formats.read(file, layers=formats.specs_of(base))
    adapter = formats.read(file, layers=formats.specs_of(base), prefix="unet")
    assert distance(run(convlora.load(copy.deepcopy(base), adapter)), run(model)) < ROUNDING
    adapter = formats.read(file, layers=formats.specs_of(words), prefix="text_encoder")
    assert {layer.alpha / layer.rank for layer in adapter.layers.values()} == {3}
    tokens = torch.arange(7)[None]
    loaded = convlora.load(copy.deepcopy(words), adapter)
    with torch.no_grad():
        expected = encoder(tokens).last_hidden_state
        assert distance(loaded(tokens).last_hidden_state, expected) < ROUNDING
        assert distance(words(tokens).last_hidden_state, expected) > 1e-3
    with pytest.raises(ConvLoRAError, match=r"no name begins with prefix 'vae'; the file has 'text_encoder', 'unet'"):
        formats.read(file, prefix="vae")


def trained(base: nn.Module, factors: str, **options: Any) -> Adapter:
    model = convlora.inject(
        copy.deepcopy(base), **{"targets": ["*.conv1", "*.to_q"], "rank": 2, "alpha": 3, "factors": factors, **options}
    )
    randomise(model, std=0.2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_magnitude"):
                parameter.copy_(0.5 + torch.rand_like(parameter))
    return convlora.adapter(model)


WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "locon": ("locon", {"ranks": {"*.to_q": 3}, "alphas": {"*.conv1": 5}}),
    "rs": ("locon", {"rank_scaling": "sqrt"}),
    "convlora": ("convlora", {"rank": 1}),
    "bias": ("locon", {"targets": ["*.conv1", "*.to_out.0"], "bias": True}),
    "DoRA": ("dora", {}),
    "LoKr": ("lokr", {"rank": 1}),
    "LoKr, whole": ("lokr", {"rank": 9, "alpha": 2}),
    "LoHa": ("loha", {}),
    "dense": ("dense", {}),
}


@pytest.mark.parametrize("prefix", [None, "unet"])
@pytest.mark.parametrize("case", WRITTEN)
def test_written_files_give_their_output_in_diffusers(
    case: str, prefix: str | None, tmp_path: Path, diffusers: Any
) -> None:
    factors, options = WRITTEN[case]
    base = unet(diffusers)
    adapter = trained(base, factors, **options)
    formats.write(adapter, tmp_path / "rain.safetensors", "diffusers", prefix=prefix)
    expected = run(convlora.load(copy.deepcopy(base), adapter))
    model: Any = copy.deepcopy(base)
    with safe_open(tmp_path / "rain.safetensors", "pt") as file:
        stated = json.loads(file.metadata()[METADATA])  # as pipelines take it out of the file
    model.load_lora_adapter(load_file(tmp_path / "rain.safetensors"), prefix=prefix, metadata=stated)
    assert distance(run(model.double()), expected) < ROUNDING
    assert distance(expected, run(base)) > 0.005
    again = formats.read(tmp_path / "rain.safetensors", layers=formats.specs_of(base))
    assert again.config.factors == ("locon" if factors in ("dense", "convlora", "loha") else factors)
    assert distance(run(convlora.load(copy.deepcopy(base), again)), expected) < ROUNDING


def test_a_pipeline_loads_a_written_file(tmp_path: Path, diffusers: Any) -> None:
    base = unet(diffusers)
    adapter = trained(base, "locon", alphas={"*.conv1": 5})
    formats.write(adapter, tmp_path / FOLDER_FILE, "diffusers", prefix="unet")
    pipeline, loaded = diffusers.StableDiffusionPipeline, copy.deepcopy(base)
    state, alphas, metadata = pipeline.lora_state_dict(
        str(tmp_path), unet_config=base.config, return_lora_metadata=True
    )
    pipeline.load_lora_into_unet(state, network_alphas=alphas, unet=loaded, metadata=metadata)
    assert distance(run(loaded.double()), run(convlora.load(copy.deepcopy(base), adapter))) < ROUNDING


def test_what_diffusers_has_no_place_for_is_not_written(tmp_path: Path) -> None:
    base = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2))
    for factors, options, message in [
        ("locon", {"targets": "2"}, "no file of diffusers holds this one: '2' is a transposed convolution"),
        ("locon", {"modules_to_save": "1"}, "a diffusers file holds no copies of modules"),
        ("dora", {"bias": True}, "'0' has a bias delta, for which PEFT has no place beside dora factors"),
    ]:
        adapter = trained(base, factors, **{"targets": "0", **options})
        with pytest.raises(ConvLoRAError, match=message):
            formats.write(adapter, tmp_path / "rain.safetensors", "diffusers")
    with pytest.raises(
        ConvLoRAError, match=r"must end in \.safetensors: a file of diffusers has its config in metadata"
    ):
        formats.write(trained(base, "locon", targets="0"), tmp_path / "rain.pt", "diffusers")
    assert not list(tmp_path.iterdir())


METADATA_OF: dict[str, tuple[Any, str]] = {
    "no JSON": ("{", "lora_adapter_metadata is no JSON"),
    "a list": ([1], "lora_adapter_metadata is no JSON object"),
    "another method": ({"peft_type": "OFT"}, "lora_adapter_metadata: peft_type is 'OFT'; LORA, LOHA, LOKR are"),
    "another rank": ({"r": 5}, "PEFT: mismatched: a.lora_A (2, 3), lora_adapter_metadata has r=5"),
    "no rank": ({"r": None}, "'a' has r=None"),
    "an infinite alpha": ({"r": 2, "lora_alpha": float("inf")}, "lora_alpha=inf"),
    "an endless pattern": ({"r": 2, "alpha_pattern": {"(a+)+": 2}}, "repeats too much"),
    "a transposed base": ({"r": 2, "fan_in_fan_out": True}, "has fan_in_fan_out: its base weights are stored"),
    "DoRA without magnitudes": ({"r": 2, "peft_type": "LOHA"}, "has peft_type 'LOHA', and 'a' has locon factors"),
    "two networks": ({"unet.r": 2, "vae.r": 2}, "of several networks, 'unet', 'vae': prefix= reads one of them"),
    "another network": ({"unet.r": 2}, "no name begins with prefix 'unet'"),
}


@pytest.mark.parametrize("case", METADATA_OF)
def test_metadata_that_says_something_else_is_refused(case: str, tmp_path: Path) -> None:
    stated, message = METADATA_OF[case]
    text = stated if isinstance(stated, str) else json.dumps(stated)
    tensors = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "rain.safetensors", {METADATA: text})
    with pytest.raises(ConvLoRAError) as caught:
        formats.read(tmp_path / "rain.safetensors")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scale_that_is_stated_twice_is_refused(tmp_path: Path) -> None:
    tensors = {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2), "a.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "rain.safetensors", {METADATA: json.dumps({"r": 2, "lora_alpha": 4})})
    with pytest.raises(ConvLoRAError, match=r"'a\.alpha' and lora_adapter_metadata both state a scale"):
        formats.read(tmp_path / "rain.safetensors")
