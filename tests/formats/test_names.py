"""The spellings of names and parts in files of one adapter; whose scale counts; one network of several."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import convlora
from convlora import ConvLoRAError, ConvLoRAWarning, formats
from convlora.adapter.parts import BIAS_DELTA
from convlora.formats.names import REFUSED, split_key, why_refused

pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")


def network() -> nn.Module:
    body = nn.Sequential(OrderedDict(conv=nn.Conv2d(8, 8, 3, padding=1), point=nn.Conv2d(8, 6, 1)))
    return nn.Sequential(OrderedDict(first=nn.Conv2d(3, 8, 3), body=body, head=nn.Linear(4, 5))).double()


SPECS = formats.specs_of(network())
RANK = 2


def factors() -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> down and up."""
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for path, spec in SPECS.items():
        down = torch.randn(RANK, *spec.shape[1:], generator=generator)
        pairs[path] = down, torch.randn(spec.shape[0], RANK, *[1] * len(spec.kernel), generator=generator)
    return pairs


def expected(path: str, scale: float) -> Tensor:
    down, up = (tensor.flatten(1).double() for tensor in factors()[path])
    return (up @ down).view(SPECS[path].shape) * scale


def check(adapter: convlora.Adapter, scale: float, paths: Any = SPECS) -> None:
    assert set(adapter.layers) == set(paths)
    for path in paths:
        torch.testing.assert_close(adapter.delta(path).double(), expected(path, scale), rtol=1e-5, atol=1e-5)


def written(folder: Path, name: str, down: str, up: str, **more: str) -> Path:
    """A file of all layers; `name` has `{}` for the path, flat where it is in braces twice."""
    tensors = {}
    for path, (a, b) in factors().items():
        stem = name.format(path, flat=path.replace(".", "_"))
        tensors |= {f"{stem}.{down}": a, f"{stem}.{up}": b}
        tensors |= {f"{stem}.{part}": torch.tensor(float(value)) for part, value in more.items()}
    save_file(tensors, folder / "rain.safetensors")
    return folder / "rain.safetensors"


PREFIXES = ["{}", "diffusion_model.{}", "model.diffusion_model.{}", "transformer.{}", "unet.{}", "my.own.{}",
            "base_model.model.{}", "lora_unet_{flat}", "lycoris_{flat}", "{flat}"]  # fmt: skip
PARTS = [
    ("lora_down.weight", "lora_up.weight"), ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), ("lora_A.weight", "lora_B.weight"),
    ("lora_A.default.weight", "lora_B.default.weight"),
]  # fmt: skip


@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: parts[0])
@pytest.mark.parametrize("name", PREFIXES)
def test_every_spelling_reads_alike(name: str, parts: tuple[str, str], tmp_path: Path) -> None:
    check(formats.read(written(tmp_path, name, *parts, alpha="3"), layers=SPECS), scale=1.5)
    file = written(tmp_path, name, *parts)
    check(formats.read(file, layers=SPECS, alpha=5), scale=2.5)
    if "_A" in parts[0]:
        assert formats.detect(file) == "diffusers"
        with pytest.raises(ConvLoRAError, match="has no scale: neither an alpha, nor lora_adapter_metadata"):
            formats.read(file, layers=SPECS)
    else:
        assert formats.detect(file) == "locon"
        check(formats.read(file, layers=SPECS), scale=1)


@pytest.mark.parametrize("name", ["{}", "base_model.model.{}"])
def test_dotted_names_are_the_paths_without_layers(name: str, tmp_path: Path) -> None:
    check(formats.read(written(tmp_path, name, *PARTS[0], alpha="3")), scale=1.5)


def test_names_of_old_attention_processors_are_those_of_its_layers(tmp_path: Path) -> None:
    layers = {f"down.0.attn1.{name}": formats.WeightSpec((4, 4)) for name in ("to_q", "to_out.0")}
    tensors = {}
    for name in ("to_q", "to_out"):
        for way, shape in (("down", (2, 4)), ("up", (4, 2))):
            tensors[f"unet.down.0.attn1.processor.{name}_lora.{way}.weight"] = torch.randn(shape)
    save_file(tensors, tmp_path / "rain.safetensors")
    adapter = formats.read(tmp_path / "rain.safetensors", layers=layers)
    assert set(adapter.layers) == set(layers)
    assert {layer.alpha for layer in adapter.layers.values()} == {2}


def test_a_path_that_is_right_as_it_is_needs_no_prefix(tmp_path: Path) -> None:
    layers = dict.fromkeys(["unet.conv", "conv"], formats.WeightSpec((4, 4)))
    tensors = {"unet.conv.lora_down.weight": torch.randn(2, 4), "unet.conv.lora_up.weight": torch.randn(4, 2)}
    save_file(tensors, tmp_path / "rain.safetensors")
    assert list(formats.read(tmp_path / "rain.safetensors", layers=layers).layers) == ["unet.conv"]
    assert list(formats.read(tmp_path / "rain.safetensors", layers=layers, prefix="unet").layers) == ["conv"]


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.int32, torch.int16, torch.uint8, torch.float16, torch.bfloat16, torch.float64]
)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_an_alpha_is_a_number_of_any_dtype(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    down, up = factors()["head"]
    tensors = {
        "head.lora_down.weight": down,
        "head.lora_up.weight": up,
        "head.alpha": torch.full(shape, 3, dtype=dtype),
    }
    save_file(tensors, tmp_path / "rain.safetensors")
    check(formats.read(tmp_path / "rain.safetensors"), scale=1.5, paths=["head"])


def test_alpha_fills_in_where_some_layers_state_none(tmp_path: Path) -> None:
    tensors = {}
    for path, (down, up) in factors().items():
        tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    save_file({**tensors, "head.alpha": torch.tensor(4.0)}, tmp_path / "rain.safetensors")
    adapter = formats.read(tmp_path / "rain.safetensors", alpha=3)
    assert {path: layer.alpha for path, layer in adapter.layers.items()} == {
        "first": 3, "body.conv": 3, "body.point": 3, "head": 4,
    }  # fmt: skip
    for bad in (float("nan"), float("inf"), "3", True):
        with pytest.raises(ConvLoRAError, match=r"alpha \(=.*\) must be a finite number"):
            formats.read(tmp_path / "rain.safetensors", alpha=bad)
    stating = written(tmp_path, "{}", *PARTS[0], alpha="3")
    with pytest.raises(ConvLoRAError, match="rank= and alpha= are for files that do not state them"):
        formats.read(stating, alpha=3)


# --- several networks ------------------------------------------------------------------------------------------------

KOHYA = ["lora_unet_{flat}", "lora_te_{flat}", "lora_te1_{flat}"]
DOTTED = ["unet.{}", "text_encoder.{}", "diffusion_model.{}"]


@pytest.mark.parametrize("names", [KOHYA, DOTTED, ["lora_unet_{flat}", "text_encoder.{}"]], ids=lambda names: names[1])
def test_one_of_several_networks_is_read(names: list[str], tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        for path, (down, up) in factors().items():
            if number and path != "head":
                continue
            stem = name.format(path, flat=path.replace(".", "_"))
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(2.0 * (number + 1))
    tensors[f"{names[1].format('mlp', flat='mlp')}.oft_blocks"] = torch.ones(2, 2)  # it does not hurt the other
    save_file(tensors, tmp_path / "rain.safetensors")
    first, second = (name.split("{")[0] for name in names[:2])
    for prefix in (first, first.rstrip("._")):
        check(formats.read(tmp_path / "rain.safetensors", layers=SPECS, prefix=prefix), scale=1)
    with pytest.raises(ConvLoRAError, match=r"'mlp\.oft_blocks': OFT rotates the weight"):
        formats.read(tmp_path / "rain.safetensors", layers=SPECS, prefix=second)
    del tensors[f"{names[1].format('mlp', flat='mlp')}.oft_blocks"]
    save_file(tensors, tmp_path / "rain.safetensors")
    for layers in (SPECS, None):
        with pytest.raises(ConvLoRAError, match=r"several networks, .*: prefix= reads one of them"):
            formats.read(tmp_path / "rain.safetensors", layers=layers)
    adapter = formats.read(tmp_path / "rain.safetensors", prefix=second)
    check(adapter, scale=2, paths=["head"])
    with pytest.raises(ConvLoRAError, match="no name begins with prefix 'lora_text'; the file has "):
        formats.read(tmp_path / "rain.safetensors", prefix="lora_text")


# --- biases and whole differences --------------------------------------------------------------------------------


def test_a_change_of_the_bias_beside_factors_is_the_bias_delta(tmp_path: Path) -> None:
    base, x = network(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    down, up = factors()["body.conv"]
    bias = torch.randn(8)
    tensors = {
        "lora_unet_body_conv.lora_down.weight": down, "lora_unet_body_conv.lora_up.weight": up,
        "lora_unet_body_conv.alpha": torch.tensor(1), "lora_unet_body_conv.diff_b": bias,
        "lora_unet_first.diff_b": -bias,
    }  # fmt: skip
    save_file(tensors, tmp_path / "rain.safetensors")
    adapter = formats.read(tmp_path / "rain.safetensors", layers=SPECS)
    assert adapter.layers["body.conv"].tensors[BIAS_DELTA].equal(bias)  # no scale is on it
    assert adapter.config.bias
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.body.conv.weight += expected("body.conv", 0.5)  # type: ignore[union-attr, operator]
        changed.body.conv.bias += bias  # type: ignore[union-attr, operator]
        changed.first.bias -= bias  # type: ignore[union-attr, operator]
        inner = nn.Sequential(changed.first, changed.body)(x)  # type: ignore[arg-type]
        live = convlora.load(copy.deepcopy(base), adapter)
        torch.testing.assert_close(nn.Sequential(live.first, live.body)(x), inner, rtol=1e-5, atol=1e-5)  # type: ignore[arg-type]
    del tensors["lora_unet_first.diff_b"]
    save_file({**tensors, "lora_unet_body_conv.diff_b": torch.ones(7)}, tmp_path / "rain.safetensors")
    with pytest.raises(ConvLoRAError, match=r"'lora_unet_body_conv' has a bias \(7,\) for 8 channels"):
        formats.read(tmp_path / "rain.safetensors", layers=SPECS)


def test_a_bias_alone_needs_the_layers_of_the_base(tmp_path: Path) -> None:
    save_file({"first.diff_b": torch.ones(8)}, tmp_path / "rain.safetensors")
    with pytest.raises(ConvLoRAError, match="'first' has a bias and no update of its weight: layers= of the base"):
        formats.read(tmp_path / "rain.safetensors")
    adapter = formats.read(tmp_path / "rain.safetensors", layers=SPECS)
    assert adapter.delta("first").count_nonzero() == 0


def test_whole_differences_are_read_beside_factors(tmp_path: Path) -> None:
    down, up = factors()["body.conv"]
    diff = torch.randn(8, 3, 3, 3)
    tensors = {
        "diffusion_model.body.conv.lora_down.weight": down, "diffusion_model.body.conv.lora_up.weight": up,
        "diffusion_model.first.diff": diff, "diffusion_model.first.diff_b": torch.ones(8),
        "diffusion_model.body.point.diff": torch.ones(6, 8),
    }  # fmt: skip
    save_file(tensors, tmp_path / "rain.safetensors")
    adapter = formats.read(tmp_path / "rain.safetensors", layers=SPECS)
    assert (adapter.config.factors, adapter.layers["body.conv"].rank) == ("locon", RANK)
    assert adapter.delta("first").equal(diff)
    assert adapter.delta("body.point").equal(torch.ones(6, 8, 1, 1))
    assert adapter.layers["first"].tensors[BIAS_DELTA].equal(torch.ones(8))
    save_file({"norm.diff": torch.ones(8)}, tmp_path / "rain.safetensors")
    with pytest.raises(ConvLoRAError, match=r"'norm\.diff' has the shape \(8,\), as that of a norm"):
        formats.read(tmp_path / "rain.safetensors")


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", REFUSED)
def test_what_no_factorization_expresses_is_refused_by_its_key(end: str, tmp_path: Path) -> None:
    tensors = {f"lora_unet_conv.{end}": torch.ones(2, 2), "lora_unet_conv.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "rain.safetensors")
    assert formats.detect(tmp_path / "rain.safetensors") == "locon"
    with pytest.raises(ConvLoRAError) as caught:
        formats.read(tmp_path / "rain.safetensors")
    assert f"'lora_unet_conv.{end}': {REFUSED[end]}, which no factorization here expresses" in str(caught.value)


@pytest.mark.parametrize(
    "key", ["weight", "alpha", "conv.weight", "conv.alpha", "lora_down.weight", ".diff", "diff", ""]
)
def test_what_is_no_part_of_a_layer_is_none(key: str) -> None:
    assert why_refused(key) is None
    assert key == "conv.alpha" or split_key(key) in (None, ("", "diff"))


def test_a_plain_checkpoint_is_no_adapter_whatever_its_layers_are_called(tmp_path: Path) -> None:
    layers = nn.ModuleDict({name: nn.Conv2d(2, 2, 1) for name in ("a1", "a2", "b1", "p_layer", "alpha")})
    save_file(nn.ModuleDict({"body": layers}).state_dict(), tmp_path / "base.safetensors")
    with pytest.raises(ConvLoRAError, match="is no adapter of a known format") as caught:
        formats.read(tmp_path / "base.safetensors")
    assert "\n" not in str(caught.value)


MALFORMED: dict[str, tuple[dict[str, Tensor], str]] = {
    "half of LoHa": ({"a.hada_w1_a": torch.ones(4, 2)}, "missing: a.hada_w1_b, a.hada_w2_a, a.hada_w2_b"),
    "half of LoKr": ({"a.lokr_w1": torch.ones(2, 2)}, "missing: a.lokr_w2"),
    "a quarter of LoKr": ({"a.lokr_w1": torch.ones(2, 2), "a.lokr_w2_a": torch.ones(2, 1)}, "missing: a.lokr_w2_b"),
    "half of lora_B": ({"x.a.lora_B.weight": torch.ones(4, 2)}, "missing: x.a.lora_A.weight"),
    "an alpha alone": ({"a.alpha": torch.tensor(1.0), "b.diff": torch.ones(2, 2)}, "unexpected: a.alpha alone"),
    "a mid alone": ({"a.lora_mid.weight": torch.ones(2, 2, 3, 3)}, "missing: a.lora_down.weight, a.lora_up.weight"),
    "a magnitude alone": ({"a.dora_scale": torch.ones(4), "b.diff": torch.ones(2, 2)}, "a.dora_scale alone"),
    "two kinds": (
        {"a.lokr_w1": torch.ones(2, 2), "a.lokr_w2": torch.ones(2, 2), "a.diff": torch.ones(4, 4)},
        "'a' has parts of several kinds: dense, lokr",
    ),
    "a part twice": (
        {"a.lora_down.weight": torch.ones(2, 3), "a.lora.down.weight": torch.ones(2, 3)},
        "which has one already",
    ),
    "LoHa ranks": (
        {f"a.hada_w{n}_{x}": torch.ones(s) for n, r in ((1, 2), (2, 3)) for x, s in (("a", (4, r)), ("b", (r, 5)))},
        "which do not fit together",
    ),
    "LoHa of one dimension": (
        {f"a.hada_w{n}_{x}": torch.ones(4) for n in (1, 2) for x in "ab"}, "which do not fit together"
    ),
    "an empty LoHa": (
        {f"a.hada_w{n}_{x}": torch.ones(0, 0) for n in (1, 2) for x in "ab"}, "which do not fit together"
    ),
    "a scalar LoKr": ({"a.lokr_w1": torch.tensor(1.0), "a.lokr_w2": torch.ones(2, 2)}, "which do not fit together"),
    "a flat LoKr": ({"a.lokr_w1": torch.ones(2, 2), "a.lokr_w2": torch.ones(2)}, "which do not fit together"),
    "LoKr halves": (
        {"a.lokr_w1": torch.ones(2, 2), "a.lokr_w2_a": torch.ones(2, 1), "a.lokr_w2_b": torch.ones(2, 2)},
        "which do not fit together",
    ),
    "LoKr w1 halves": (
        {"a.lokr_w1_a": torch.ones(2, 1), "a.lokr_w1_b": torch.ones(2, 2), "a.lokr_w2": torch.ones(2, 2)},
        "which do not fit together",
    ),
    "a Tucker core": (
        {"a.hada_t1": torch.ones(2, 3, 3, 3), "a.hada_t2": torch.ones(2, 2, 3, 3),
         **{f"a.hada_w{n}_{x}": torch.ones(2, 4) for n in (1, 2) for x in "ab"}},
        "'a' has a mid (2, 3, 3, 3)",
    ),
    "one Tucker core": (
        {"a.hada_t1": torch.ones(2, 2, 3, 3), **{f"a.hada_w{n}_{x}": torch.ones(2, 4) for n in (1, 2) for x in "ab"}},
        "missing: a.hada_t2",
    ),
    "magnitudes": (
        {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2), "a.dora_scale": torch.ones(5, 1)},
        "'a' has magnitudes (5, 1) for a weight (4, 3)",
    ),
    "NaN": (
        {"a.lokr_w1": torch.full((2, 2), torch.nan), "a.lokr_w2": torch.ones(2, 2)}, "non-finite: a.lokr_w1"
    ),
    "an infinite diff": ({"a.diff": torch.full((2, 2), torch.inf)}, "non-finite: a.diff"),
    "an empty diff": ({"a.diff": torch.ones(0, 2)}, "no weight has shape (0, 2)"),
    "a diff of six dimensions": ({"a.diff": torch.ones(1, 1, 1, 1, 1, 1)}, "no weight has shape"),
    "integers": ({"a.diff": torch.ones(2, 2, dtype=torch.int8)}, "int8 instead of floating point"),
    "a huge w1": (
        {"a.lokr_w1_a": torch.ones(9000, 1), "a.lokr_w1_b": torch.ones(1, 9000), "a.lokr_w2": torch.ones(1, 1)},
        "'a' has a lokr_w1 of more than 64 times the size of its factors",
    ),
    "LoHa beside another, huge": (
        {**{f"a.hada_w{n}_a": torch.ones(30_000, 1) for n in (1, 2)}, **{f"a.hada_w{n}_b": torch.ones(1, 30_000)
         for n in (1, 2)}, "b.diff": torch.ones(2, 2)},
        "'a' has an update that has to be formed, of more than 64 times the size of its factors",
    ),
    "DoRA of a huge LoHa": (
        {**{f"a.hada_w{n}_a": torch.ones(30_000, 1) for n in (1, 2)}, **{f"a.hada_w{n}_b": torch.ones(1, 30_000)
         for n in (1, 2)}, "a.dora_scale": torch.ones(30_000)},
        "'a' has an update that has to be formed, of more than 64 times the size of its factors",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_one_error(case: str, tmp_path: Path) -> None:
    tensors, message = MALFORMED[case]
    save_file(tensors, tmp_path / "rain.safetensors")
    with pytest.raises(ConvLoRAError) as caught:
        formats.read(tmp_path / "rain.safetensors", alpha=1 if "lora_B" in str(list(tensors)) else None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_warning_says_where_flat_names_lose_their_dots(tmp_path: Path) -> None:
    with pytest.warns(ConvLoRAWarning, match="does not say where the dots"):
        formats.read(written(tmp_path, "lora_unet_{flat}", *PARTS[0]), prefix="lora_unet")
