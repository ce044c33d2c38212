"""PEFT directories: what peft writes is read here, what is written here loads in peft; outputs compared."""

from __future__ import annotations

import copy
import json
import pickle
import re
import warnings
from collections import OrderedDict
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
from convlora import ConvLoRAError, formats
from convlora.adapter.parts import BIAS_DELTA
from convlora.formats import peft as peft_format
from convlora.formats.patterns import LayerPatterns

PLAIN = ["1d", "2d", "3d"]  # PEFT refuses some grouped convolutions, and LoRA of the others is none of their weights
pytestmark = pytest.mark.filterwarnings("ignore:inject. the adapter has more parameters:convlora.ConvLoRAWarning")


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


def names(base: nn.Module) -> list[str]:
    return list(formats.specs_of(base))


def peft_model(peft: Any, base: nn.Module, **options: Any) -> Any:
    """A copy with random PEFT factors, in eval mode."""
    options = {"target_modules": names(base), "r": 2, "lora_alpha": 3, "init_lora_weights": False, **options}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.5)
    return model


def save(model: Any, folder: Path) -> Path:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Adapter 'default': . LoRA tensor")  # peft's, about its own bias of B
        model.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


# --- reading -----------------------------------------------------------------------------------------------------

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "lora_bias": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "patterns": {"rank_pattern": {"stem": 3, ".*em": 5, r"body\..*": 4}, "alpha_pattern": {"^head": 7, ".*oint": 9}},
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"conv": 5}, "alpha_pattern": {"b.*t": 0.5}},
    "regex targets": {"target_modules": r".*(stem|conv)"},
    "exclude_modules": {"exclude_modules": ["point", "head"]},
}


@pytest.mark.parametrize("case", OPTIONS)
def test_what_peft_saves_gives_its_output(case: str, tmp_path: Path, peft: Any) -> None:
    base, x = nets.build("2d")
    if case == "lora_bias":
        base.body.point = nn.Conv2d(6, 8, 1)  # type: ignore[union-attr]
    model = peft_model(peft, base, **OPTIONS[case])
    loaded = convlora.formats.read(save(model, tmp_path))
    with torch.no_grad():
        expected = model(x)
    assert distance(expected, base(x)) > 0.1
    assert distance(nets.output(base, loaded, x), expected) < 1e-6


@pytest.mark.parametrize("net", PLAIN)
def test_what_peft_saves_of_every_sort_of_layer_gives_its_output(net: str, tmp_path: Path, peft: Any) -> None:
    base, x = nets.build(net)
    model = peft_model(peft, base)
    loaded = convlora.formats.read(save(model, tmp_path), layers=formats.specs_of(base))
    assert {p: layer.spec for p, layer in loaded.layers.items()} == formats.specs_of(base)
    with torch.no_grad():
        assert distance(nets.output(base, loaded, x), model(x)) < 1e-6


def test_ranks_alphas_and_scaling_are_those_of_the_config(tmp_path: Path, peft: Any) -> None:
    base, _ = nets.build("2d")
    loaded = formats.read(save(peft_model(peft, base, **OPTIONS["patterns"]), tmp_path), name="rain")
    assert {p: (layer.rank, layer.alpha) for p, layer in loaded.layers.items()} == {
        "stem": (3, 3), "body.conv": (4, 3), "body.point": (4, 9), "head": (2, 7),
    }  # fmt: skip
    assert loaded.config.name == "rain"
    convlora.inject(copy.deepcopy(base), config=loaded.config)  # it says what it is


def test_patterns_match_as_those_of_peft(peft: Any) -> None:
    from peft.utils.other import get_pattern_key

    patterns = [
        "conv",
        "a.conv1",
        r"a\.conv1",
        "^a.conv",
        "conv1$",
        ".*",
        "b|conv",
        r"conv\d",
        "(a|b).conv",
        "v1",
        "",
        "a.c",
        "^x.a.con.1",
        "-",
    ]
    paths = [
        "conv",
        "conv1",
        "a.conv1",
        "a.conv",
        "x.a.conv1",
        "aconv",
        "b",
        "b.conv",
        "a.b",
        "xconv",
        "abc",
        "x-a.conv1",
    ]
    for path in paths:
        for first, second in zip(patterns, patterns[1:] + patterns[:1], strict=True):
            values = {first: 1, second: 2}
            expected = values.get(get_pattern_key(values.keys(), path), 0)
            found = LayerPatterns(values, "a file").values(path)
            assert [*found, 0][0] == expected, (path, first, second)


FORMS = ["adapter name in the keys", "no prefix", "adapter name, no prefix"]


@pytest.mark.parametrize("form", FORMS)
def test_keys_are_understood_in_every_form(form: str, tmp_path: Path, peft: Any) -> None:
    base, _ = nets.build("2d")
    model = peft_model(peft, base)
    expected = formats.read(save(model, tmp_path))
    keys = load_file(tmp_path / peft_format.WEIGHTS)
    if "name" in form:
        keys = {key: t.detach().contiguous() for key, t in model.state_dict().items() if "lora_" in key}
        assert all(".default.weight" in key for key in keys)
    if "prefix" in form:
        keys = {key.removeprefix("base_model.model."): tensor for key, tensor in keys.items()}
    save_file(keys, tmp_path / peft_format.WEIGHTS)
    loaded = formats.read(tmp_path / peft_format.CONFIG)  # either file stands for the folder
    assert list(loaded.layers) == list(expected.layers)
    assert all(torch.equal(loaded.delta(path), expected.delta(path)) for path in names(base))


# --- writing -----------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"alpha": 3},
    "ranks and alphas": {"ranks": {"stem": 1, "body.*": 3}, "alphas": {"*t": 0.5, "head": 4}},
    "rslora": {"rank_scaling": "sqrt", "alpha": 3, "ranks": {"stem": 3}},
    "convlora": {"factors": "convlora", "alpha": 3},
    "some layers": {"targets": ["stem", "point"]},
}


def from_pretrained(peft: Any, base: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(base, str(folder))


def load_adapter(peft: Any, base: nn.Module, folder: Path) -> Any:
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["stem", "0"], r=1), "other")
    result = model.load_adapter(str(folder), "rain")
    assert not result.unexpected_keys
    model.set_adapter("rain")
    return model


def inject(peft: Any, base: nn.Module, folder: Path) -> Any:
    model = peft.inject_adapter_in_model(peft.LoraConfig.from_pretrained(str(folder)), base)
    result = peft.set_peft_model_state_dict(model, load_file(folder / peft_format.WEIGHTS))
    assert not result.unexpected_keys
    assert not any("lora_" in key for key in result.missing_keys)
    return model


@pytest.mark.parametrize("load", [from_pretrained, load_adapter, inject])
@pytest.mark.parametrize("case", ADAPTERS)
def test_written_folders_give_their_output_in_peft(case: str, load: Any, tmp_path: Path, peft: Any) -> None:
    base, x = nets.build("2d")
    adapter = nets.adapter(base, **ADAPTERS[case])
    formats.write(adapter, tmp_path / "rain", "peft")
    model = load(peft, copy.deepcopy(base), tmp_path / "rain").eval()
    adapted = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    with torch.no_grad():
        expected = nets.output(base, adapter, x)
        assert distance(model(x), expected) < 1e-6
        assert distance(expected, base(x)) > 0.1
    assert adapted >= set(adapter.layers)
    assert load is load_adapter or adapted == set(adapter.layers)


@pytest.mark.parametrize("prefix", [None, ""])
@pytest.mark.parametrize("net", PLAIN)
def test_every_sort_of_layer_gives_its_output_in_peft_and_comes_back_bitwise(
    net: str, prefix: str | None, tmp_path: Path, peft: Any
) -> None:
    base, x = nets.build(net)
    adapter = nets.adapter(base, alpha=0.3)
    formats.write(adapter, tmp_path, "peft", prefix=prefix)
    with torch.no_grad():
        expected = nets.output(base, adapter, x)
        assert distance(inject(peft, copy.deepcopy(base), tmp_path).eval()(x), expected) < 1e-6
    again = formats.read(tmp_path)
    assert {p: (m.rank, m.alpha, m.spec) for p, m in again.layers.items()} == {
        p: (m.rank, m.alpha, m.spec) for p, m in adapter.layers.items()
    }
    assert all(torch.equal(again.delta(path), adapter.delta(path)) for path in adapter.layers)


@pytest.mark.filterwarnings("ignore:torch.meshgrid:UserWarning")
@pytest.mark.parametrize("network", ["RCAN", "SwinIR"])
def test_adapters_of_real_networks_give_their_output_in_peft(network: str, tmp_path: Path, peft: Any) -> None:
    base, inputs = zoo.build(network)
    base.eval()
    stock = lambda name, module: zoo.adaptable(name, module) and type(module) in (nn.Conv2d, nn.Linear)  # noqa: E731
    adapter = nets.adapter(base, targets=stock, factors="convlora", rank=1)  # PEFT cannot adapt RCAN's MeanShift
    formats.write(adapter, tmp_path, "peft")
    with torch.no_grad():
        [expected] = zoo.run(convlora.load(copy.deepcopy(base), adapter), inputs)
        [found] = zoo.run(from_pretrained(peft, copy.deepcopy(base), tmp_path).eval(), inputs)
        [plain] = zoo.run(base, inputs)
    assert distance(found, expected) < 1e-4
    assert distance(expected, plain) > 0.01


def test_layers_whose_names_end_alike_are_told_apart(tmp_path: Path, peft: Any) -> None:
    base = nn.Sequential()
    base.add_module("conv", nn.Conv2d(3, 8, 3))
    base.add_module("a", nn.Sequential())
    base.a.add_module("conv", nn.Conv2d(8, 8, 3))  # type: ignore[union-attr]
    base.add_module("aconv", nn.Conv2d(8, 8, 3))
    adapter = nets.adapter(base, targets=["re:conv", "aconv"], ranks={"re:conv": 3}, alphas={"aconv": 5})
    formats.write(adapter, tmp_path, "peft")
    model = from_pretrained(peft, copy.deepcopy(base), tmp_path)
    adapted = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {"conv", "aconv"}
    full = formats.read(tmp_path)
    assert {p: (layer.rank, layer.alpha) for p, layer in full.layers.items()} == {"conv": (3, 3), "aconv": (2, 5)}


@pytest.mark.filterwarnings("ignore:.lora_bias=True. was passed but the targeted layer:UserWarning")
def test_bias_deltas_give_their_output_in_peft_and_come_back(tmp_path: Path, peft: Any) -> None:
    base, x = nets.build("2d")  # one layer has no bias
    adapter = nets.adapter(base, bias=True, alpha=3)
    formats.write(adapter, tmp_path, "peft")
    with torch.no_grad():
        expected = nets.output(base, adapter, x)
        assert distance(from_pretrained(peft, copy.deepcopy(base), tmp_path).eval()(x), expected) < 1e-6
    again = formats.read(tmp_path)
    assert BIAS_DELTA not in again.layers["body.point"].tensors
    assert distance(nets.output(base, again, x), expected) < 1e-6


def test_a_folder_that_exists_keeps_its_other_files_and_no_temporary_ones(tmp_path: Path) -> None:
    base, _ = nets.build("2d")
    (tmp_path / "README.md").write_text("rain")
    for rank in (2, 3):
        formats.write(nets.adapter(base, rank=rank), tmp_path, "peft")
        assert formats.read(tmp_path).config.rank == rank
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", peft_format.CONFIG, peft_format.WEIGHTS]
    with pytest.raises(ConvLoRAError, match="exists; overwrite=True replaces it"):
        formats.write(nets.adapter(base), tmp_path, "peft", overwrite=False)


def test_a_write_that_fails_leaves_the_old_adapter(tmp_path: Path) -> None:
    base, _ = nets.build("2d")
    formats.write(nets.adapter(base), tmp_path / "rain", "peft")
    before = (tmp_path / "rain" / peft_format.WEIGHTS).read_bytes()
    (tmp_path / "rain" / peft_format.CONFIG).unlink()
    (tmp_path / "rain" / peft_format.CONFIG).mkdir()
    with pytest.raises(ConvLoRAError, match="cannot be written"):
        formats.write(nets.adapter(base, rank=3), tmp_path / "rain", "peft")
    assert (tmp_path / "rain" / peft_format.WEIGHTS).read_bytes() == before
    with pytest.raises(ConvLoRAError, match="cannot be written"):
        formats.write(nets.adapter(base), tmp_path / "no" / "rain", "peft")
    with pytest.raises(ConvLoRAError, match="is a file, and this format is a folder"):
        formats.write(nets.adapter(base), tmp_path / "rain" / peft_format.WEIGHTS, "peft")
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(["rain", peft_format.CONFIG, peft_format.WEIGHTS])


# --- refused -----------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One module at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 3)
        self.b = self.a


UNWRITABLE: dict[str, tuple[Any, str]] = {
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2)), "'0' is a grouped convolution"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3)), "'0' is a transposed convolution"),
    "twice": (Twice, "'a' is one module with 'b'"),
    "root": (lambda: nn.Conv2d(4, 8, 3), "'' is the model itself"),
}


@pytest.mark.parametrize("case", UNWRITABLE)
def test_what_peft_cannot_express_is_not_written(case: str, tmp_path: Path) -> None:
    make, message = UNWRITABLE[case]
    with pytest.raises(ConvLoRAError, match=message):
        formats.write(nets.adapter(make()), tmp_path / "rain", "peft")
    assert not list(tmp_path.iterdir())


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "LOHA"}, "has peft_type 'LOHA', and 'body.conv' has locon factors"),
    "modules_to_save": ({"modules_to_save": "head"}, "modules_to_save is no list of names"),
    "another type": ({"peft_type": "IA3"}, "peft_type is 'IA3'; LORA, LOHA, LOKR are"),
    "no type": ({"peft_type": None}, "peft_type is None"),
    "trained biases": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base's weights"),
    "transposed base": ({"fan_in_fan_out": True}, "fan_in_fan_out: its base weights are stored transposed"),
    "another rank": ({"r": 5}, "adapter_config.json has r=5"),
    "no rank": ({"r": 0}, "has r=0"),
    "a fraction": ({"r": 2.0}, "has r=2.0"),
    "an infinite alpha": ({"lora_alpha": float("inf")}, "lora_alpha=inf"),
    "a pattern": ({"rank_pattern": {"(": 2}}, "is no regular expression"),
    "an endless pattern": ({"alpha_pattern": {"(a+)+": 2}}, "repeats too much"),
    "a list of patterns": ({"alpha_pattern": ["a"]}, "alpha_pattern is no JSON object"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_that_means_something_else_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = CONFIGS[case]
    base, _ = nets.build("2d")
    formats.write(nets.adapter(base), tmp_path, "peft")
    config = json.loads((tmp_path / peft_format.CONFIG).read_text())
    (tmp_path / peft_format.CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConvLoRAError, match=re.escape(message)) as caught:
        formats.read(tmp_path)
    assert "\n" not in str(caught.value)


KEYS: dict[str, tuple[str, Tensor, str]] = {
    "dora of one layer": ("stem.lora_magnitude_vector", torch.ones(8), "'stem' is DoRA (dora) and 'head' is locon"),
    "magnitudes of another layer": ("stem.lora_magnitude_vector", torch.ones(6), "has magnitudes (6,) for a weight"),
    "embedding": ("stem.lora_embedding_A", torch.ones(2, 3), "embeddings are no convolutions"),
    "base layer": ("stem.base_layer.weight", torch.ones(8, 3, 3, 3), "unexpected: base_model.model.stem.base_layer"),
    "bias of A": ("stem.lora_A.bias", torch.ones(2), "unexpected"),
    "half": ("tail.lora_A.weight", torch.ones(2, 3), "missing: tail.lora_B"),
    "two adapters": ("stem.lora_A.snow.weight", torch.ones(2, 3, 3, 3), "several adapters: None, snow"),
    "flat": ("stem.lora_B.weight", torch.ones(8), "'stem' has factors"),
    "grouped": ("stem.lora_B.weight", torch.ones(8, 1, 1, 1), "'stem' is a grouped convolution"),
    "empty": ("stem.lora_B.weight", torch.ones(0, 2, 1, 1), "'stem' has factors"),
    "NaN": ("stem.lora_B.weight", torch.full((8, 2, 1, 1), torch.nan), "non-finite: stem.lora_B"),
    "integers": ("stem.lora_B.weight", torch.ones(8, 2, 1, 1, dtype=torch.int32), "int32 instead of floating point"),
}


@pytest.mark.parametrize("case", KEYS)
def test_tensors_that_mean_something_else_are_refused(case: str, tmp_path: Path) -> None:
    name, tensor, message = KEYS[case]
    base, _ = nets.build("2d")
    formats.write(nets.adapter(base), tmp_path, "peft")
    tensors = load_file(tmp_path / peft_format.WEIGHTS)
    save_file({**tensors, f"base_model.model.{name}": tensor}, tmp_path / peft_format.WEIGHTS)
    with pytest.raises(ConvLoRAError, match=re.escape(message)):
        formats.read(tmp_path)


def test_grouped_convolutions_of_peft_are_refused(tmp_path: Path, peft: Any) -> None:
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft_model(peft, base)
    with pytest.raises(ConvLoRAError, match="'0' is a grouped convolution"):
        formats.read(save(model, tmp_path))


class Bomb:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("bomb"),)


def test_a_pickle_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, _ = nets.build("2d")
    formats.write(nets.adapter(base), tmp_path, "peft")
    (tmp_path / peft_format.WEIGHTS).unlink()
    (tmp_path / peft_format.PICKLE).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ConvLoRAError, match=r"adapter_model\.bin is a pickle, which can run code"):
        formats.read(tmp_path)
    assert not (tmp_path / "bomb").exists()


def test_a_folder_of_several_adapters_names_them(tmp_path: Path, peft: Any) -> None:
    base, _ = nets.build("2d")
    model = peft_model(peft, base)
    model.add_adapter("rain", peft.LoraConfig(target_modules=["stem"], r=1))
    model.save_pretrained(str(tmp_path), save_embedding_layers=False, selected_adapters=["rain"])
    with pytest.raises(ConvLoRAError, match="those in it do: rain"):
        formats.read(tmp_path)
    assert list(formats.read(tmp_path / "rain").layers) == ["stem"]


# --- copies of whole modules -----------------------------------------------------------------------------------------


class Tasked(nn.Module):
    """A net with everything that `modules_to_save` is used for: a nested head, a norm with statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.bn(self.body(x)).mean((2, 3)))  # type: ignore[no-any-return]


def trained(model: nn.Module, parameters: Any) -> nn.Module:
    """After some steps in train mode, in eval mode."""
    optimizer = torch.optim.SGD(parameters, lr=0.3)
    model.train()
    for _ in range(5):
        loss = (model(torch.randn(8, 3, 6, 6) * 2 + 1) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("wrapped", [True, False])
def test_modules_that_peft_saves_are_read(wrapped: bool, tmp_path: Path, peft: Any) -> None:
    base, x = Tasked(), torch.randn(2, 3, 6, 6)
    config = peft.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head", "bn"])
    model = peft.get_peft_model(copy.deepcopy(base), config)
    trained(model, [p for p in model.parameters() if p.requires_grad])
    model.save_pretrained(tmp_path)
    if not wrapped:  # as the names are in what `inject_adapter_in_model` made
        file = tmp_path / "adapter_model.safetensors"
        save_file({n.removeprefix("base_model.model."): t for n, t in load_file(file).items()}, file)
    adapter = formats.read(tmp_path)
    assert sorted(adapter.modules) == ["bn", "head.0", "head.2"]
    loaded = convlora.load(copy.deepcopy(base), adapter).eval()
    torch.testing.assert_close(loaded(x), model(x))
    with convlora.disabled(loaded):
        assert torch.equal(loaded(x), base.eval()(x))
    plain = copy.deepcopy(base)
    plain.load_state_dict(adapter.apply_to(base.state_dict()))
    torch.testing.assert_close(plain.eval()(x), model(x))


def test_modules_that_are_saved_here_load_in_peft(tmp_path: Path, peft: Any) -> None:
    base, x = Tasked(), torch.randn(2, 3, 6, 6)
    model = convlora.inject(copy.deepcopy(base), "body", rank=2, factors="locon", modules_to_save=["head"])
    trained(model, convlora.parameters(model))
    adapter = convlora.adapter(model)
    assert sorted(adapter.modules) == ["bn", "head.0", "head.2"]  # the statistics have moved
    with pytest.raises(ConvLoRAError, match="PEFT saves whole modules, and of 1 \\(first: 'bn'\\)"):
        formats.write(adapter, tmp_path / "rain", "peft")
    formats.write(adapter, tmp_path / "rain", "peft", base=base.state_dict())
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "rain").eval()
    torch.testing.assert_close(loaded(x), model(x))
    again = formats.read(tmp_path / "rain")
    for path, tensors in adapter.modules.items():
        assert all(torch.equal(again.modules[path][name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["locon", "loralib"])
def test_formats_without_copies_refuse_them(kind: str, tmp_path: Path) -> None:
    model = convlora.inject(Tasked(), "body", rank=2, factors="locon", modules_to_save=["head"])
    with pytest.raises(ConvLoRAError, match="holds no copies of modules"):
        formats.write(convlora.adapter(model), tmp_path / "rain.safetensors", kind)
    assert not list(tmp_path.iterdir())


# --- attention ---------------------------------------------------------------------------------------------------


class Attending(nn.Module):
    """An attention that holds its input projection itself, and a Linear."""

    def __init__(self, bias: bool = True, **options: Any) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(16, 2, bias=bias, batch_first=True, **options)
        self.mlp = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.attn(x, x, x, need_weights=False)[0])  # type: ignore[no-any-return]


class Deep(nn.Module):
    """Two of them in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Attending(), Attending(bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)  # type: ignore[no-any-return]


TOKENS = (2, 5, 16)
ATTENTIONS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (Attending, {}),
    "with others": (Attending, {"target_modules": ["attn", "mlp"]}),
    "without bias": (lambda: Attending(bias=False), {}),
    "rslora": (Attending, {"use_rslora": True}),
    "lora_bias": (Attending, {"lora_bias": True, "target_modules": ["attn", "mlp"]}),
    "patterns": (
        Deep,
        {"rank_pattern": {r"blocks\.0\.attn": 3, "mlp": 1}, "alpha_pattern": {"^blocks.1.attn": 5},
         "target_modules": ["attn", "mlp"]},
    ),
}  # fmt: skip


def attending(make: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return make().eval(), torch.randn(TOKENS)


@pytest.mark.parametrize("case", ATTENTIONS)
def test_an_attention_of_peft_gives_its_output(case: str, tmp_path: Path, peft: Any) -> None:
    make, options = ATTENTIONS[case]
    base, x = attending(make)
    model = peft_model(peft, base, **{"target_modules": ["attn"], **options})
    loaded = formats.read(save(model, tmp_path), layers=formats.specs_of(base))
    places = {p: spec for p, spec in formats.specs_of(base).items() if "attn" in p or "mlp" in str(options)}
    assert {p: layer.spec for p, layer in loaded.layers.items()} == places
    assert all(layer.spec.in_parent == path.endswith("in_proj") for path, layer in loaded.layers.items())
    with torch.no_grad():
        expected = model(x)
        assert distance(expected, base(x)) > 0.1
        assert distance(nets.output(base, loaded, x), expected) < 2e-6
        assert distance(nets.output(base, loaded, x), model.merge_and_unload()(x)) < 2e-6


@pytest.mark.parametrize("case", ["plain", "with others", "patterns"])
def test_an_attention_of_peft_comes_back_to_it_bitwise(case: str, tmp_path: Path, peft: Any) -> None:
    make, options = ATTENTIONS[case]
    base, x = attending(make)
    model = peft_model(peft, base, **{"target_modules": ["attn"], **options})
    formats.write(formats.read(save(model, tmp_path / "theirs")), tmp_path / "ours", "peft")
    theirs, ours = (load_file(tmp_path / place / peft_format.WEIGHTS) for place in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(ours[key], tensor) for key, tensor in theirs.items())
    with torch.no_grad():
        assert distance(from_pretrained(peft, copy.deepcopy(base), tmp_path / "ours").eval()(x), model(x)) < 2e-6


@pytest.mark.parametrize("load", [from_pretrained, inject])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factors": "convlora", "rank_scaling": "sqrt", "alpha": 3.0},
        {"ranks": {"out_proj": 4}, "alphas": {"out_proj": 7.0}},
        {"ranks": {"in_proj": 3}, "alphas": {"in_proj": 0.5, "mlp": 2.0}},
        {"targets": "in_proj"},
        {"targets": ["out_proj", "mlp"]},
        {"alphas": {"in_proj": 0.0}},
    ],
    ids=["one rank", "rslora", "more rank outside", "more rank inside", "inside alone", "outside alone", "alpha 0"],
)
def test_attentions_that_are_written_give_their_output_in_peft(
    options: dict[str, Any], load: Any, tmp_path: Path, peft: Any
) -> None:
    base, x = attending(Attending)
    adapter = nets.adapter(base, **options)
    formats.write(adapter, tmp_path, "peft", base=base.state_dict())
    model = load(peft, copy.deepcopy(base), tmp_path).eval()
    with torch.no_grad():
        expected = model(x)
    assert distance(nets.output(base, adapter, x), expected) < 2e-6
    again = formats.read(tmp_path, layers=formats.specs_of(base))
    assert distance(nets.output(base, again, x), expected) < 2e-6


def test_biases_of_an_attention_s_output_travel_to_peft(tmp_path: Path, peft: Any) -> None:
    base, x = attending(Attending)
    adapter = nets.adapter(base, targets=["out_proj", "mlp"], bias=True)
    formats.write(adapter, tmp_path, "peft", base=base.state_dict())
    with torch.no_grad():
        expected = from_pretrained(peft, copy.deepcopy(base), tmp_path).eval()(x)
    assert distance(nets.output(base, adapter, x), expected) < 2e-6


ATTENTIONS_REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "separate": (lambda: Attending(kdim=8, vdim=8), {}, "'attn.q_proj' is a projection of an attention with separate"),
    "bias": (Attending, {"bias": True}, "'attn.in_proj' has a bias delta, which PEFT leaves out"),
    "root": (lambda: nn.MultiheadAttention(16, 2), {"targets": "in_proj"}, "'in_proj' is of the model itself"),
}


@pytest.mark.parametrize("case", ATTENTIONS_REFUSED)
def test_attentions_that_peft_cannot_express_are_not_written(case: str, tmp_path: Path) -> None:
    make, options, message = ATTENTIONS_REFUSED[case]
    with pytest.raises(ConvLoRAError, match=message):
        formats.write(nets.adapter(make(), **options), tmp_path / "rain", "peft")
    assert not list(tmp_path.iterdir())


def test_a_linear_that_is_called_as_a_projection_stays_one(tmp_path: Path, peft: Any) -> None:
    base = nn.Sequential(OrderedDict(in_proj=nn.Linear(16, 48), act=nn.SiLU(), out_proj=nn.Linear(48, 16))).eval()
    adapter, x = nets.adapter(nn.Sequential(OrderedDict(mixer=base))), torch.randn(TOKENS)
    formats.write(adapter, tmp_path, "peft")
    model = from_pretrained(peft, nn.Sequential(OrderedDict(mixer=copy.deepcopy(base))), tmp_path).eval()
    with torch.no_grad():
        assert distance(nets.output(nn.Sequential(OrderedDict(mixer=base)), adapter, x), model(x)) < 1e-6


def test_an_attention_beside_a_layer_of_its_name_is_refused(tmp_path: Path) -> None:
    base, _ = attending(Attending)
    formats.write(nets.adapter(base), tmp_path, "peft")
    tensors = load_file(tmp_path / peft_format.WEIGHTS)
    for name in [name for name in tensors if ".base_layer." in name]:
        tensors[name.replace(".base_layer.", ".")] = tensors[name].clone()
    save_file(tensors, tmp_path / peft_format.WEIGHTS)
    with pytest.raises(ConvLoRAError, match=r"'attn.out_proj' has factors of its own and, of 'attn"):
        formats.read(tmp_path)
