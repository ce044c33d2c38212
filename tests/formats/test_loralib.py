"""loralib state dicts: what loralib saves is read here, what is written here loads in loralib; outputs compared."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from nets import distance
from safetensors.torch import save_file
from torch import Tensor, nn

from convlora import ConvLoRAError, ConvLoRAWarning, formats
from convlora.factors.base import WeightSpec

pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")


@pytest.fixture(scope="module")
def loralib() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("loralib")


def rebuilt(loralib: Any, base: nn.Module, r: int | dict[str, int], alpha: float) -> nn.Module:
    """A copy whose layers are loralib's, with the weights of the base and random factors; it never merges them."""
    model = copy.deepcopy(base)
    for path, layer in list(model.named_modules()):
        parent = model.get_submodule(path.rpartition(".")[0])
        rank = r if isinstance(r, int) else r.get(path, 0)
        if not rank:
            continue
        options = dict(r=rank, lora_alpha=alpha, merge_weights=False)
        if isinstance(layer, nn.Linear):
            new = loralib.Linear(layer.in_features, layer.out_features, **options)
            new.load_state_dict(layer.state_dict(), strict=False)
        elif isinstance(layer, nn.Conv2d):
            size, padding = layer.kernel_size[0], layer.padding
            channels = layer.in_channels, layer.out_channels
            new = loralib.Conv2d(*channels, size, padding=padding, groups=layer.groups, **options)
            new.conv.load_state_dict(layer.state_dict())
        else:
            continue
        nn.init.normal_(new.lora_A, std=0.5)
        nn.init.normal_(new.lora_B, std=0.5)
        setattr(parent, path.rpartition(".")[2], new)
    return model.eval()


def save(loralib: Any, model: nn.Module, file: Path, whole: bool = False) -> Path:
    state = model.state_dict() if whole else loralib.lora_state_dict(model)
    if file.suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)
    return file


@pytest.mark.parametrize("name", ["rain.pt", "rain.safetensors"])
@pytest.mark.parametrize("of", [formats.specs_of, lambda base: formats.specs_from_checkpoint(base.state_dict())])
def test_what_loralib_saves_gives_its_output(of: Any, name: str, tmp_path: Path, loralib: Any) -> None:
    base, x = nets.build("square")
    model = rebuilt(loralib, base, {"stem": 3, "body.0": 2, "body.2": 1, "head": 4}, alpha=5)
    loaded = formats.read(save(loralib, model, tmp_path / name), layers=of(base), alpha=5)
    assert {p: layer.rank for p, layer in loaded.layers.items()} == {"stem": 3, "body.0": 2, "body.2": 1, "head": 4}
    assert {p: layer.spec for p, layer in loaded.layers.items()} == formats.specs_of(base)  # groups, too
    with torch.no_grad():
        expected = model(x)
        assert distance(expected, base(x)) > 0.1
    assert distance(nets.output(base, loaded, x), expected) < 1e-6


def test_a_whole_state_dict_says_what_the_layers_are(tmp_path: Path, loralib: Any) -> None:
    base, x = nets.build("square")
    model = rebuilt(loralib, base, {"stem": 3, "body.0": 2, "body.2": 1, "head": 4}, alpha=5)
    with pytest.warns(ConvLoRAWarning, match=r"8 tensors beside the factors \(biases, base weights\)"):
        loaded = formats.read(save(loralib, model, tmp_path / "rain.pt", whole=True), alpha=5)
    assert {p: layer.spec for p, layer in loaded.layers.items()} == formats.specs_of(base)
    with torch.no_grad():
        assert distance(nets.output(base, loaded, x), model(x)) < 1e-6


def test_without_layers_the_rank_tells_convolutions_from_linear_layers(tmp_path: Path, loralib: Any) -> None:
    base, _ = nets.build("square")
    model = rebuilt(loralib, base, {"stem": 2, "head": 2}, alpha=5)
    file = save(loralib, model, tmp_path / "rain.pt")
    loaded = formats.read(file, rank=2, alpha=5)
    assert {p: m.spec.shape for p, m in loaded.layers.items()} == {"stem": (8, 3, 3, 3), "head": (5, 8)}
    assert list(formats.read(file, rank=2, alpha=5, layers=formats.specs_of(base)).layers) == ["stem", "head"]
    for options, message in [
        ({"rank": 2}, "does not state lora_alpha; give alpha="),
        ({"alpha": 5}, "whether 'stem' is a Linear or a Conv2d; give rank=, or layers="),
        ({"alpha": 5, "rank": 4}, "not of rank 4"),
        ({"alpha": 5, "rank": 0}, "rank (=0) must be an integer"),
        ({"alpha": float("nan"), "rank": 2}, "alpha (=nan) must be a finite number"),
        ({"alpha": 5, "rank": 4, "layers": formats.specs_of(base)}, "has rank 2, not 4"),
        ({"alpha": 5, "layers": {"stem": WeightSpec((8, 3, 3, 3))}}, "unexpected: head"),
        ({"alpha": 5, "layers": {"stem": WeightSpec((8, 3, 5, 5)), "head": WeightSpec((5, 8))}}, "not of a weight"),
        ({"alpha": 5, "layers": {"stem": WeightSpec((8, 3, 9)), "head": WeightSpec((5, 8))}}, "square kernels"),
    ]:
        with pytest.raises(ConvLoRAError, match=re.escape(message)):
            formats.read(file, **options)


ADAPTERS: dict[str, tuple[dict[str, Any], float | None]] = {
    "plain": ({"alpha": 3}, None),
    "another alpha": ({"alpha": 3}, 7),
    "ranks and alphas": ({"ranks": {"stem": 3}, "alphas": {"head": 0.5}}, 2),
    "rslora": ({"rank_scaling": "sqrt", "alpha": 3}, None),
    "locon": ({"factors": "locon", "rank": 1}, 4),
    "alpha 0": ({"alphas": {"head": 0}}, 2),
}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("case", ADAPTERS)
def test_written_files_give_their_output_in_loralib(case: str, suffix: str, tmp_path: Path, loralib: Any) -> None:
    base, x = nets.build("square")
    options, alpha = ADAPTERS[case]
    adapter = nets.adapter(base, **{"factors": "convlora", **options})
    formats.write(adapter, tmp_path / f"rain.{suffix}", "loralib", alpha=alpha)
    if alpha is None:
        alpha = 3 * 2**0.5 if case == "rslora" else 3
    ranks = {p: layer.rank for p, layer in adapter.refactor("convlora").layers.items()}
    model = rebuilt(loralib, base, ranks, alpha)
    again = formats.read(tmp_path / f"rain.{suffix}", layers=formats.specs_of(base), alpha=alpha)
    state = {f"{p}.{n}": t for p, layer in again.layers.items() for n, t in layer.tensors.items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    with torch.no_grad():
        expected = nets.output(base, adapter, x)
        assert distance(model(x), expected) < 1e-6
        assert distance(expected, base(x)) > 0.05
    if suffix == "safetensors":  # it says itself what it is
        stated = formats.read(tmp_path / "rain.safetensors")
        assert {p: (m.spec, m.rank) for p, m in stated.layers.items()} == {
            p: (m.spec, m.rank) for p, m in adapter.refactor("convlora").layers.items()
        }
        assert distance(nets.output(base, stated, x), expected) < 1e-6
    else:
        assert torch.load(tmp_path / "rain.pt", weights_only=True).keys() == state.keys()


def test_there_and_back_is_bitwise(tmp_path: Path, loralib: Any) -> None:
    base, _ = nets.build("square")
    model = rebuilt(loralib, base, 2, alpha=5)
    file = save(loralib, model, tmp_path / "rain.pt")
    formats.write(formats.read(file, layers=formats.specs_of(base), alpha=5), tmp_path / "again.pt", "loralib")
    before, after = (torch.load(f, weights_only=True) for f in (file, tmp_path / "again.pt"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_several_alphas_need_one(tmp_path: Path) -> None:
    base, _ = nets.build("square")
    adapter = nets.adapter(base, factors="convlora", ranks={"stem": 3})
    with pytest.raises(ConvLoRAError, match=r"the layers have alphas 2, 3, and .* alpha= rescales all to one"):
        formats.write(adapter, tmp_path / "rain.pt", "loralib")
    for alpha in (0, float("inf"), "2"):
        with pytest.raises(ConvLoRAError, match="must be a finite number other than 0"):
            formats.write(adapter, tmp_path / "rain.pt", "loralib", alpha=alpha)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


UNWRITABLE: dict[str, tuple[Any, dict[str, Any], str]] = {
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3)), {}, "'0' is a transposed convolution"),
    "1d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3)), {}, "'0' has a kernel (3,)"),
    "not square": (lambda: nn.Sequential(nn.Conv2d(4, 8, (1, 3))), {}, "'0' has a kernel (1, 3)"),
    "bias": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3)), {"bias": True}, "'0' has a bias delta"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_loralib_cannot_express_is_not_written(case: str, tmp_path: Path) -> None:
    make, options, message = UNWRITABLE[case]
    with pytest.raises(ConvLoRAError, match=re.escape(message)):
        formats.write(nets.adapter(make(), **options), tmp_path / "rain.pt", "loralib")
    assert not list(tmp_path.iterdir())


def test_merged_linear_and_embedding_are_refused(tmp_path: Path, loralib: Any) -> None:
    merged = loralib.MergedLinear(6, 9, r=2, enable_lora=[True, False, True])
    with pytest.raises(ConvLoRAError, match="a MergedLinear's are no product"):
        formats.read(save(loralib, nn.Sequential(merged), tmp_path / "rain.pt"), rank=2, alpha=1)
    embedding = nn.Sequential(loralib.Embedding(7, 6, r=2))
    with (
        pytest.warns(ConvLoRAWarning, match="1 tensors beside"),
        pytest.raises(ConvLoRAError, match="'0' is an Embedding or has fan_in_fan_out"),
    ):
        formats.read(save(loralib, embedding, tmp_path / "rain.pt", whole=True), alpha=1)


MALFORMED: dict[str, tuple[dict[str, Tensor], str]] = {
    "half": ({"a.lora_A": torch.ones(2, 3)}, "missing: a.lora_B"),
    "a vector": ({"a.lora_A": torch.ones(2)}, "a.lora_A (2,) torch.float32 instead of a matrix"),
    "empty": ({"a.lora_A": torch.ones(0, 3), "a.lora_B": torch.ones(4, 0)}, "instead of a matrix"),
    "integers": ({"a.lora_A": torch.ones(2, 3).int()}, "torch.int32 instead of a matrix"),
    "no product": ({"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(4, 3)}, "they are no product"),
    "NaN": ({"a.lora_A": torch.ones(2, 3) * torch.nan, "a.lora_B": torch.ones(4, 2)}, "non-finite: a.lora_A"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_files_are_one_error(case: str, tmp_path: Path) -> None:
    tensors, message = MALFORMED[case]
    torch.save(tensors, tmp_path / "rain.pt")
    with pytest.raises(ConvLoRAError, match=re.escape(message)) as caught:
        formats.read(tmp_path / "rain.pt", rank=2, alpha=1)
    assert "\n" not in str(caught.value)
