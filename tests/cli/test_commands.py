"""The command `convlora`: what it writes equals what the library computes, and what it says can be relied on."""

from __future__ import annotations

import configparser
import contextlib
import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spandrel import ModelLoader
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.NAFNet import NAFNet
from torch import Tensor, nn
from typer.testing import CliRunner

import convlora
from convlora import Adapter, formats
from convlora.cli import architecture
from convlora.cli.app import app, main

ROOT = Path(__file__).parents[2]
COMMANDS = ["info", "merge", "extract", "resize", "combine", "convert", "diff", "layers", "verify"]
RAIN, SNOW = ["model.1.sub.0.RDB1.*", "model.10"], ["model.3", "model.10"]


def esrgan(seed: int = 0) -> ESRGAN:
    torch.manual_seed(seed)
    return ESRGAN(num_filters=8, num_blocks=2)


def adapted(model: nn.Module, targets: list[str], seed: int, **options: Any) -> nn.Module:
    """With adapters as training leaves them: no factor is zero."""
    convlora.inject(model, targets, **options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in convlora.parameters(model, options.get("name")):
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return model


def real_esrgan_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names that Real-ESRGAN's files have for the layers of spandrel's ESRGAN."""
    names = {
        "0": "conv_first",
        "1.sub.2": "conv_body",
        "3": "conv_up1",
        "6": "conv_up2",
        "8": "conv_hr",
        "10": "conv_last",
    }
    renamed = {}
    for name, tensor in state.items():
        block = re.fullmatch(r"model\.1\.sub\.(\d)\.RDB(\d)\.conv(\d)\.0\.(\w+)", name)
        path, _, kind = name.removeprefix("model.").rpartition(".")
        renamed["body.{}.rdb{}.conv{}.{}".format(*block.groups()) if block else f"{names[path]}.{kind}"] = tensor
    return renamed


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of one small ESRGAN: checkpoints, and adapters of all kinds."""
    folder = tmp_path_factory.mktemp("template")
    state = esrgan().state_dict()
    save_file(state, folder / "span.safetensors", metadata={"author": "x"})
    torch.save({"params_ema": real_esrgan_names(state), "epoch": 3}, folder / "RealESRGAN_x4plus.pth")
    convlora.save(adapted(esrgan(), RAIN, 1, rank=2, bias=True), folder / "rain.safetensors")
    convlora.save(adapted(esrgan(), SNOW, 2, rank=2, alpha=1.5), folder / "snow.safetensors")
    thin = convlora.adapter(adapted(esrgan(), RAIN, 3, rank=2, factors="locon"))
    formats.write(thin, folder / "peft", "peft")
    formats.write(thin, folder / "locon.safetensors", "locon")
    save_file(load_file(folder / "locon.safetensors"), folder / "kohya.safetensors")  # without our metadata
    formats.write(convlora.adapter(adapted(esrgan(), SNOW, 4, rank=2)), folder / "loralib.pt", "loralib")
    trained = adapted(esrgan(), RAIN, 6, rank=2, alpha=3)
    torch.save({"epoch": 3, "state_dict": nn.DataParallel(trained).state_dict()}, folder / "last.ckpt")
    (folder / "config.json").write_text(convlora.adapters(trained)["default"].to_json())
    tuned = convlora.adapter(adapted(esrgan(), RAIN, 5, rank=2)).apply_to(state)
    save_file(tuned, folder / "tuned.safetensors")
    return folder


@pytest.fixture
def folder(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the files, as the working directory."""
    copy = tmp_path / "files"
    shutil.copytree(template, copy)
    monkeypatch.chdir(copy)
    return copy


def run(*args: str) -> Any:
    return CliRunner().invoke(app, list(args), catch_exceptions=False, prog_name="convlora")


def out(*args: str) -> str:
    """Stdout of a command that works without a warning."""
    result = run(*args)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def report(*args: str) -> dict[str, Any]:
    return json.loads(out(*args, "--json"))


def fails(*args: str) -> str:
    """The one line of a command that fails, without its mark; nothing is written then."""
    before = snapshot()
    result = run(*args)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert snapshot() == before
    return result.stderr.removeprefix("error: ").rstrip("\n")


def snapshot() -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    pairs = zip(one.items(), other.items(), strict=True)
    return all(a == b and x.dtype == y.dtype and torch.equal(x, y) for (a, x), (b, y) in pairs)


def same_adapter(one: Adapter, other: Adapter) -> bool:
    def tensors(adapter: Adapter) -> dict[str, Tensor]:
        pairs = ((path, name) for path, layer in adapter.layers.items() for name in sorted(layer.tensors))
        return {f"{path}.{name}": adapter.layers[path].tensors[name] for path, name in pairs}

    return one.config == other.config and same(tensors(one), tensors(other))


# --- merge -------------------------------------------------------------------------------------------------------


def test_merge_gives_what_spandrel_loads_and_convlora_merges_bitwise(folder: Path) -> None:
    out("merge", "span.safetensors", "rain.safetensors", "-o", "rainy.safetensors")
    live = convlora.merge(convlora.load(esrgan(), "rain.safetensors"))
    loaded = ModelLoader().load_from_file("rainy.safetensors").model
    assert same(loaded.state_dict(), convlora.remove(convlora.merge(live)).state_dict())
    assert not same(loaded.state_dict(), esrgan().state_dict())
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(image), live.eval()(image))
    with safe_open("rainy.safetensors", "pt") as file:
        assert file.metadata() == {"author": "x"}


def test_merge_finds_the_layers_under_the_names_of_the_file(folder: Path) -> None:
    done = report("merge", "RealESRGAN_x4plus.pth", "rain.safetensors", "-o", "rainy.pth")
    assert done["adapters"] == [{"file": "rain.safetensors", "strength": 1.0, "layers": 6, "same_base": True}]
    live = convlora.remove(convlora.merge(convlora.load(esrgan(), "rain.safetensors")))
    assert same(ModelLoader().load_from_file("rainy.pth").model.state_dict(), live.state_dict())
    written = torch.load("rainy.pth", weights_only=True)
    assert list(written) == ["params_ema", "epoch"]
    assert same(written["params_ema"], real_esrgan_names(live.state_dict()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_of_two_adapters_rounds_as_a_live_model_does(dtype: torch.dtype, folder: Path) -> None:
    model = esrgan().to(dtype)
    torch.save(model.state_dict(), "base.pth")
    run("merge", "base.pth", "rain.safetensors", "snow.safetensors", "-s", "0.7", "-s", "-1.3", "-o", "both.pth")
    warns = pytest.warns(convlora.ConvLoRAWarning) if dtype == torch.bfloat16 else contextlib.nullcontext()
    with warns:  # of another precision of the base
        convlora.load(model, "rain.safetensors", name="rain")
        convlora.load(model, "snow.safetensors", name="snow")
    convlora.activate(model, {"rain": 0.7, "snow": -1.3})
    expected = convlora.remove(convlora.merge(model)).state_dict()
    assert same(torch.load("both.pth", weights_only=True), expected)


def test_one_strength_is_for_all_adapters(folder: Path) -> None:
    files = ["rain.safetensors", "snow.safetensors"]
    out("merge", "span.safetensors", *files, "-o", "one.safetensors", "--strength", "0.5")
    out("merge", "span.safetensors", *files, "-o", "each.safetensors", "--strength", "0.5", "--strength", "0.5")
    assert Path("one.safetensors").read_bytes() == Path("each.safetensors").read_bytes()


@pytest.mark.parametrize("file", ["peft", "locon.safetensors", "kohya.safetensors"])
def test_merge_takes_adapters_of_other_formats(file: str, folder: Path) -> None:
    out("merge", "span.safetensors", file, "-o", "out.safetensors")
    expected = convlora.adapter(adapted(esrgan(), RAIN, 3, rank=2, factors="locon")).apply_to(esrgan().state_dict())
    assert same(dict(sorted(load_file("out.safetensors").items())), dict(sorted(expected.items())))


def test_merge_onto_another_base_warns_in_one_line(folder: Path) -> None:
    save_file(esrgan(seed=9).state_dict(), "other.safetensors")
    result = run("merge", "other.safetensors", "rain.safetensors", "-o", "out.safetensors")
    assert result.exit_code == 0
    assert re.fullmatch(
        r"warning: merge: 'rain\.safetensors' was trained on another base of the same shapes"
        r" \(relative difference [\d.]+\)\n",
        result.stderr,
    )
    assert Path("out.safetensors").exists()


def test_a_base_in_another_precision_is_said_to_be_one(folder: Path) -> None:
    half = {name: tensor.half() for name, tensor in esrgan().state_dict().items()}
    save_file(half, "half.safetensors")
    save_file({name: tensor.float() for name, tensor in half.items()}, "widened.safetensors")
    for file in ("half.safetensors", "widened.safetensors"):
        result = run("merge", file, "rain.safetensors", "-o", f"of-{file}", "--json")
        said = f"'{file}' is the base that was adapted, with values of float16 here and of float32 there"
        assert said in result.stderr
        assert json.loads(result.stdout)["adapters"][0]["same_base"] is True
        check = report("verify", "rain.safetensors", "--base", file)["checks"]["fingerprint"]
        assert check["ok"] is True
        assert said in check["what"]


def test_a_base_that_is_equal_up_to_rounding_alarms_nobody(folder: Path) -> None:
    drifted = {name: tensor * 3 / 3 for name, tensor in esrgan().state_dict().items()}
    assert not same(drifted, esrgan().state_dict())
    save_file(drifted, "drifted.safetensors")
    out("merge", "drifted.safetensors", "rain.safetensors", "-o", "out.safetensors")
    check = report("verify", "rain.safetensors", "--base", "drifted.safetensors")["checks"]["fingerprint"]
    assert check["ok"] is True
    assert "up to rounding (relative difference" in check["what"]


def test_a_base_read_in_float32_is_the_base_in_half_precision_that_is_stored(folder: Path) -> None:
    half = esrgan().half()
    torch.save(half.state_dict(), "half.pth")
    convlora.save(adapted(half.float(), RAIN, 1, rank=1), "rain.safetensors")
    assert report("merge", "half.pth", "rain.safetensors", "-o", "out.pth")["adapters"][0]["same_base"] is True
    assert {t.dtype for t in torch.load("out.pth", weights_only=True).values()} == {torch.float16}


def test_merge_says_which_state_dict_it_leaves(folder: Path) -> None:
    state = esrgan().state_dict()
    torch.save({"params": state, "params_ema": {n: t.clone() for n, t in state.items()}}, "two.pth")
    result = run("merge", "two.pth", "rain.safetensors", "-o", "out.pth")
    assert result.stderr == "warning: merge: 'params_ema' is adapted; params beside it stays as it was\n"
    assert same(torch.load("out.pth", weights_only=True)["params"], state)


ST = ".safetensors"
MERGE_ERRORS = {  # arguments -> how the error begins; % is .safetensors
    "span% gone% -o out%": "read: no file 'gone%'",
    "gone.pth rain% -o out.pth": "read: 'gone.pth' cannot be read (No such file or directory)",
    "rain% rain% -o out%": "merge: 'rain%' does not fit 'rain%': missing: model.1.sub.0.RDB1.conv1.0.bias, ",
    "span% span% -o out%": "read: 'span%' is no adapter of a known format",
    "span% rain% -o out.onnx": "merge: 'out.onnx' must end in % or .pth",
    "span% rain% -o gone/out.pth": "merge: 'gone/out.pth' cannot be written; there is no folder 'gone'",
    "span% rain% -o snow%": "merge: 'snow%' exists; --force overwrites it",
    "span% rain% -o peft.pth": "merge: 'peft.pth' exists; --force overwrites it",
    "RealESRGAN_x4plus.pth rain% -o peft.pth --force": "write: 'peft.pth' cannot be written (it is a folder",
    "span% rain% -o span% --force": "merge: 'span%' is an input",
    "span% rain% -o ./rain% --force": "merge: 'rain%' is an input",
    "span% rain% -o out.pth -s 1 -s 2": "merge: 2 times --strength for 1 adapters",
    "span% rain% -o out.pth -s nan": "merge: strength (=nan) must be a finite number",
    "half% rain% -o out.pth -s 1e17": "merge: non-finite: ",
    "two.pth both% -o out.pth": "merge: the names of 'both%' fit 'two.pth' in several ways, with 'one.' before them, ",
    "RealESRGAN_x4plus.pth strange% -o out.pth": "merge: 'strange%' does not fit 'RealESRGAN_x4plus.pth': missing: "
    "conv_lst.weight; nearest: 'conv_last.weight'",
    "span% altered% -o out.pth": "read: 'altered%' was altered: its checksum does not match",
}


@pytest.mark.parametrize("line", MERGE_ERRORS)
def test_merge_errors(line: str, folder: Path) -> None:
    raw = bytearray(Path("rain.safetensors").read_bytes())
    raw[-1] ^= 1
    Path("altered.safetensors").write_bytes(raw)
    Path("peft.pth").mkdir()
    state = esrgan().state_dict()
    save_file({name: tensor.half() for name, tensor in state.items()}, "half.safetensors")
    for name in ("conv_lst", "both"):
        other = nn.Sequential()
        other.add_module(name, nn.Conv2d(8, 3, 3))
        convlora.save(adapted(other, [name], 1, rank=1), f"{name}.safetensors")
    Path("conv_lst.safetensors").rename("strange.safetensors")
    torch.save({f"{prefix}.both.weight": torch.zeros(3, 8, 3, 3) for prefix in ("one", "two")}, "two.pth")
    assert fails("merge", *line.replace("%", ST).split()).startswith(MERGE_ERRORS[line].replace("%", ST))


def test_a_link_to_an_input_is_the_input(folder: Path) -> None:
    Path("link.safetensors").symlink_to("span.safetensors")
    args = ["merge", "span.safetensors", "rain.safetensors", "-o", "link.safetensors", "--force"]
    assert "is an input" in fails(*args)


def test_force_overwrites_and_a_failed_write_keeps_the_old_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("out.safetensors").write_text("old")
    args = ["merge", "span.safetensors", "rain.safetensors", "-o", "out.safetensors", "--force"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        assert fails(*args) == "write: 'out.safetensors' cannot be written (disk full)"
    out(*args)
    assert len(load_file("out.safetensors")) == 72


# --- extract, resize, combine, convert ---------------------------------------------------------------------------


def test_extract_equals_the_library(folder: Path) -> None:
    done = report("extract", "span.safetensors", "tuned.safetensors", "-o", "out.safetensors", "--rank", "1")
    base, tuned = (load_file(name) for name in ("span.safetensors", "tuned.safetensors"))
    expected = Adapter.extract(base, tuned, rank=1)
    assert same_adapter(Adapter.read("out.safetensors"), expected)
    assert {path: layer["error"] for path, layer in done["layers"].items()} == expected.errors
    assert done["largest_error"] == max(expected.errors.values()) > 0.01
    done = report(
        "extract", "span.safetensors", "tuned.safetensors", "-o", "full.safetensors", "--energy", "1",
        "--factors", "locon", "--name", "rain",
    )  # fmt: skip
    assert (done["factors"], Adapter.read("full.safetensors").config.name) == ("locon", "rain")
    out("merge", "span.safetensors", "full.safetensors", "-o", "again.safetensors")
    again = load_file("again.safetensors")
    assert all(torch.allclose(again[name], tuned[name], atol=1e-6) for name in tuned)


def test_extract_asks_the_architecture_for_groups(folder: Path) -> None:
    base = NAFNet(width=8, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])
    tuned = {
        n: t + 0.1 * torch.randn_like(t) if n.endswith("conv2.weight") else t for n, t in base.state_dict().items()
    }
    torch.save(base.state_dict(), "base.pth")
    torch.save(tuned, "tuned.pth")
    out("extract", "base.pth", "tuned.pth", "-o", "out.safetensors", "--energy", "1")
    assert {layer.spec.groups for layer in Adapter.read("out.safetensors").layers.values()} == {16, 32, 64}
    merged = convlora.remove(convlora.merge(convlora.load(base, "out.safetensors"))).state_dict()
    assert all(torch.allclose(merged[name], tuned[name], atol=1e-6) for name in tuned)


def test_extract_warns_of_what_it_cannot_express(folder: Path) -> None:
    tuned = load_file("tuned.safetensors")
    save_file({**tuned, "norm.weight": torch.ones(3)}, "more.safetensors")
    result = run("extract", "span.safetensors", "more.safetensors", "-o", "out.safetensors", "--rank", "1")
    assert result.exit_code == 0
    assert result.stderr == "warning: extract: these differ, and an adapter cannot express it: norm.weight\n"


def test_resize_equals_the_library(folder: Path) -> None:
    rain = Adapter.read("rain.safetensors")
    for option, expected in (("--rank", rain.resize(rank=1)), ("--energy", rain.resize(energy=0.8))):
        value = "1" if option == "--rank" else "0.8"
        done = report("resize", "rain.safetensors", "-o", "out.safetensors", option, value, "--force")
        assert same_adapter(Adapter.read("out.safetensors"), expected)
        assert {path: layer["error"] for path, layer in done["layers"].items()} == expected.errors


def test_combine_equals_the_library(folder: Path) -> None:
    out(
        "combine",
        "rain.safetensors",
        "snow.safetensors",
        "-o",
        "out.safetensors",
        "-w",
        "0.7",
        "-w",
        "-0.3",
        "--name",
        "mix",
    )
    parts = [Adapter.read("rain.safetensors"), Adapter.read("snow.safetensors")]
    combined = Adapter.combine(parts, [0.7, -0.3])
    written = Adapter.read("out.safetensors")
    assert written.config.name == "mix"
    assert same_adapter(written, Adapter(combined.config.replace(name="mix"), combined.layers, combined.fingerprint))


def test_combine_brings_all_to_one_factorization(folder: Path) -> None:
    message = fails("combine", "rain.safetensors", "peft", "-o", "out.safetensors")
    assert message == "combine: the factorizations differ (convlora, locon); --factors brings all to one"
    out("combine", "rain.safetensors", "peft", "-o", "out.safetensors", "--factors", "locon")
    sums = {
        p: sum(formats.read(file).delta(p) for file in ("rain.safetensors", "peft"))
        for p in formats.read("peft").layers
    }
    written = Adapter.read("out.safetensors")
    assert all(torch.allclose(written.delta(path), total, atol=1e-6) for path, total in sums.items())


@pytest.mark.parametrize(("to", "name"), [("peft", "there"), ("locon", "there.safetensors"), ("loralib", "there.pt")])
def test_convert_there_and_back_keeps_the_update(to: str, name: str, folder: Path) -> None:
    out("convert", "snow.safetensors", "--to", to, "-o", name)
    assert formats.detect(name) == to
    facts = ["--alpha", "1.5", "--base", "span.safetensors"] if to == "loralib" else []
    out("convert", name, "--to", "convlora", "--factors", "convlora", "-o", "back.safetensors", *facts)
    assert report("diff", "snow.safetensors", "back.safetensors")["largest_distance"] < 1e-6


def test_convert_writes_what_the_library_writes(folder: Path) -> None:
    out("convert", "snow.safetensors", "--to", "locon", "-o", "out.safetensors", "--prefix", "lora_unet")
    formats.write(Adapter.read("snow.safetensors"), "expected.safetensors", "locon", prefix="lora_unet")
    assert Path("out.safetensors").read_bytes() == Path("expected.safetensors").read_bytes()


def test_convert_takes_an_adapter_out_of_a_training_checkpoint(folder: Path) -> None:
    trained = adapted(esrgan(), RAIN, 6, rank=2, alpha=3)
    convlora.save(trained, "saved.safetensors")
    out("convert", "last.ckpt", "--config", "config.json", "--to", "convlora", "-o", "last.safetensors")
    assert Path("last.safetensors").read_bytes() == Path("saved.safetensors").read_bytes()
    for file, place in (("last.ckpt", "one"), ("saved.safetensors", "other")):
        config = ["--config", "saved.safetensors"] if file == "last.ckpt" else []
        out("convert", file, *config, "--to", "peft", "-o", place)
    assert same_adapter(formats.read("one"), formats.read("other"))
    assert report("verify", "last.safetensors", "--base", "span.safetensors")["ok"] is True
    save_file(trained.state_dict(), "all.safetensors")
    assert "is a checkpoint of a model with adapters" in fails("info", "all.safetensors")
    out("convert", "all.safetensors", "--config", "config.json", "--to", "convlora", "-o", "again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("saved.safetensors").read_bytes()


def test_convert_says_what_does_not_fit_a_training_checkpoint(folder: Path) -> None:
    wanted = ["--to", "convlora", "-o", "last.safetensors", "--config"]
    cases = {
        ("last.ckpt", *wanted, "none.json"): "'none.json' cannot be read",
        ("last.ckpt", *wanted, "config.json", "--name", "snow"): "no adapter 'snow' in the state dict; it has",
        ("last.ckpt", *wanted, "config.json", "--rank", "3"): "--rank is for loralib files",
        ("span.safetensors", *wanted, "config.json"): "convert: no key is '<layer>.convlora.<adapter>.<tensor>'",
    }
    for args, message in cases.items():
        assert message in fails("convert", *args)


def test_convert_changes_dtype_and_factorization(folder: Path) -> None:
    args = ["--to", "convlora", "--factors", "locon", "--dtype", "float16", "-o", "out.safetensors"]
    done = report("convert", "snow.safetensors", *args)
    written = Adapter.read("out.safetensors")
    assert same_adapter(written, Adapter.read("snow.safetensors").refactor("locon").to(torch.float16))
    assert done["bytes"] == Path("out.safetensors").stat().st_size


def test_convert_reads_a_bare_locon_file_by_its_base(folder: Path) -> None:
    out("convert", "kohya.safetensors", "--to", "convlora", "--base", "RealESRGAN_x4plus.pth", "-o", "out.safetensors")
    assert set(Adapter.read("out.safetensors").layers) == set(formats.read("peft").layers)
    result = run("info", "kohya.safetensors")
    assert result.exit_code == 0
    assert result.stderr.endswith("where the dots of its layer paths are; --base does\n")


ERRORS = {  # likewise
    "extract span% tuned% -o out%": "extract: give either --rank or --energy",
    "extract span% tuned% -o out.pth --rank 1": "extract: 'out.pth' must end in %",
    "extract span% span% -o out% --rank 1": "extract: no weight of two or more",
    "extract span% real.pth -o out% --rank 1": "extract: 'span%' and 'real.pth' have no name in common",
    "resize rain% -o out% --rank 1 --energy 0.5": "resize: give either --rank or --energy",
    "resize rain% -o out% --rank 0": "resize: rank (=0) must be an integer of at least 1",
    "resize rain% -o out% --energy 1.5": "resize: energy (=1.5) must be a share",
    "resize rain% -o rain% --rank 1 --force": "resize: 'rain%' is an input",
    "resize loralib.pt -o out% --rank 1": "read: 'loralib.pt': a loralib file does not state lora_alpha; give --alpha ",
    "combine rain% -o out% -w 1 -w 2": "combine: 2 times --weight for 1 adapters",
    "convert rain% --to peft -o peft": "convert: 'peft' exists; --force overwrites it",
    "convert peft --to convlora -o peft/new%": "convert: 'peft/new%' is an input ('peft'); write to another place",
    "convert peft/adapter_config.json --to peft -o peft --force": "convert: 'peft' is an input ('peft/adapter_config",
    "convert rain% --to peft -o out --factors convlora": "convert: peft files hold 'locon' and 'dora' and",
    "convert rain% --to locon -o out%": "write: no LoCon file holds this adapter: ",
    "convert snow% --to locon -o out% --alpha 2": "write: --alpha is for loralib files",
    "convert snow% --to convlora -o out% --prefix x": "write: prefix (='x') must be a string, for peft, locon",
    "convert snow% --to convlora -o out% --rank 2": "read: --rank and --alpha are for files that do not state",
    "diff rain% gone%": "read: no file 'gone%'",
    "info span%": "read: 'span%' is no adapter of a known format",
    "info .": "read: the folder '.' has no adapter_config.json",
    "info loralib.pt --base span%": "read: 'loralib.pt': a loralib file does not state lora_alpha; give --alpha ",
    "layers span% conv_frst": "layers: target 'conv_frst' selects no layer; 36 can be adapted, nearest: ",
    "layers span% re:(": "layers: 're:(' is no regular expression",
    "layers span% * --exclude gone": "layers: --exclude 'gone' selects no layer; nearest: ",
    "layers span% model.0 --exclude model.0": "layers: exclude leaves no layer",
    "layers rain.txt": "read: 'rain.txt' is no checkpoint by its name",
}


@pytest.mark.parametrize("line", ERRORS)
def test_errors(line: str, folder: Path) -> None:
    Path("RealESRGAN_x4plus.pth").rename("real.pth")
    assert fails(*line.replace("%", ST).split()).startswith(ERRORS[line].replace("%", ST))


def test_a_loralib_file_goes_through_convert(folder: Path) -> None:
    assert fails("info", "loralib.pt").endswith("; `convlora convert` takes --alpha, --rank and --base")
    facts = ["--alpha", "2", "--base", "span.safetensors"]
    out("convert", "loralib.pt", "--to", "convlora", "-o", "out.safetensors", *facts)
    expected = convlora.adapter(adapted(esrgan(), SNOW, 4, rank=2))
    assert all(torch.equal(Adapter.read("out.safetensors").delta(p), expected.delta(p)) for p in expected.layers)


# --- info, diff, layers, verify ----------------------------------------------------------------------------------


def test_info_reports_what_the_library_knows(folder: Path) -> None:
    found, rain = report("info", "rain.safetensors"), Adapter.read("rain.safetensors")
    assert (found["format"], found["checksum"], found["fingerprint"]) == ("convlora", "ok", rain.fingerprint)
    assert found["config"] == json.loads(rain.config.to_json())
    assert found["bytes"] == Path("rain.safetensors").stat().st_size
    assert found["parameters"] == sum(t.numel() for f in rain.layers.values() for t in f.tensors.values())
    for path, layer in rain.layers.items():
        shown = found["layers"][path]
        assert (shown["rank"], shown["alpha"], tuple(shown["shape"])) == (layer.rank, layer.alpha, layer.spec.shape)
        assert shown["norm"] == pytest.approx(float(rain.delta(path).norm()), rel=1e-5)
        assert shown["bias_norm"] == pytest.approx(float(layer.tensors["lora_bias"].norm()), rel=1e-5)


def test_info_prints_one_row_per_layer(folder: Path) -> None:
    text = out("info", "snow.safetensors")
    assert re.search(r"^model\.10 +3×8×3×3 +2 +1\.5 +0\.75 +\d+ +[\d.]+$", text, re.MULTILINE)
    assert "checksum ok" in text
    assert text.endswith(" parameters\n")


def test_the_commands_of_the_page_run(folder: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs" / "files.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines() if line.startswith("convlora ")]
    assert len(lines) >= 6
    shutil.copy("snow.safetensors", "night.safetensors")
    for name in ("span", "tuned"):
        torch.save(load_file(f"{name}.safetensors"), f"{name}.pth")
    Path("tuned.safetensors").unlink()
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        result = run(*words)
        assert result.exit_code == 0, (line, result.output)
        if "-o" in words:
            assert Path(words[words.index("-o") + 1]).exists()
        else:
            assert result.stdout


def test_names_in_a_file_cannot_steer_the_terminal(folder: Path) -> None:
    model = nn.ModuleDict({"conv\x1b[2J\x1b]0;gone\x07": nn.Conv2d(3, 4, 1)})
    convlora.save(convlora.inject(model, "*", rank=1), "hostile.safetensors")
    text = out("info", "hostile.safetensors")
    assert "conv\\x1b[2J\\x1b]0;gone\\x07" in text
    failed = run("merge", "span.safetensors", "hostile.safetensors", "-o", "merged.safetensors")
    assert failed.exit_code == 1
    assert "conv\\x1b[2J" in failed.output
    assert "\x1b" not in text + failed.output


@pytest.mark.parametrize("file", ["peft", "locon.safetensors"])
def test_info_reads_other_formats(file: str, folder: Path) -> None:
    found = report("info", file)
    assert (found["format"], found["factors"], found["checksum"]) == (file.partition(".")[0], "locon", None)
    assert [layer["rank"] for layer in found["layers"].values()] == [2] * 6


def test_diff_measures_the_distance_of_the_updates(folder: Path) -> None:
    assert report("diff", "rain.safetensors", "rain.safetensors")["largest_distance"] == 0
    found = report("diff", "rain.safetensors", "snow.safetensors")
    rain, snow = Adapter.read("rain.safetensors"), Adapter.read("snow.safetensors")
    assert found["same_layers"] is False
    assert found["only_a"] == [path for path in rain.layers if path != "model.10"]
    assert found["only_b"] == ["model.3"]
    one, other = rain.delta("model.10").double(), snow.delta("model.10").double()
    expected = float((one - other).norm() / max(one.norm(), other.norm()))
    assert found["layers"]["model.10"]["rank"] == [2, 2]
    assert found["layers"]["model.10"]["distance"]["weight"] == pytest.approx(expected, rel=1e-5)
    assert found["layers"]["model.10"]["distance"]["bias"] == 1
    text = out("diff", "rain.safetensors", "snow.safetensors")
    assert "only in B: model.3\n" in text


def test_diff_names_layers_of_other_weights(folder: Path) -> None:
    for name, width in (("a", 4), ("b", 8)):
        convlora.save(adapted(nn.Sequential(nn.Conv2d(3, width, 3)), ["0"], 1, rank=1), f"{name}.safetensors")
    found = report("diff", "a.safetensors", "b.safetensors")
    assert (found["other_weights"], found["same_layers"], found["layers"]) == (["0"], False, {})
    assert out("diff", "a.safetensors", "b.safetensors") == "other weights: 0\n0 layers in both\n"


def test_an_adapter_whose_update_depends_on_the_base_is_looked_at_with_it(folder: Path) -> None:
    base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
    save_file(base.state_dict(), "base.safetensors")
    for seed, name in enumerate(("one", "two")):
        convlora.save(adapted(copy.deepcopy(base), ["0", "1"], seed, rank=1, factors="dora"), f"{name}.safetensors")
    one, two = Adapter.read("one.safetensors"), Adapter.read("two.safetensors")
    found = report("info", "one.safetensors")
    assert (found["factors"], found["layers"]["0"]["norm"]) == ("dora", None)
    assert re.search(r"^0 +8×3×3×3 .* –$", out("info", "one.safetensors"), re.MULTILINE)
    known = report("info", "one.safetensors", "--base", "base.safetensors")["layers"]["0"]
    change = one.delta("0", base[0].weight.detach())
    assert known["norm"] == pytest.approx(float(change.norm()), rel=1e-5)
    assert "diff without --base: the update of 'dora' factors" in fails("diff", "one.safetensors", "two.safetensors")
    compared = report("diff", "one.safetensors", "two.safetensors", "--base", "base.safetensors")["layers"]["0"]
    other = two.delta("0", base[0].weight.detach())
    expected = float((change - other).norm() / max(change.norm(), other.norm()))
    assert compared["distance"]["weight"] == pytest.approx(expected, rel=1e-5)
    out("merge", "base.safetensors", "one.safetensors", "-o", "merged.safetensors")
    assert same(load_file("merged.safetensors"), one.apply_to(load_file("base.safetensors")))
    assert "depends on the base" in fails("resize", "one.safetensors", "--rank", "1", "-o", "out.safetensors")
    out(
        "extract",
        "base.safetensors",
        "merged.safetensors",
        "--factors",
        "dense",
        "--energy",
        "1",
        "-o",
        "whole.safetensors",
    )
    whole = Adapter.read("whole.safetensors")
    torch.testing.assert_close(whole.delta("0"), change, rtol=1e-4, atol=1e-6)


def test_layers_shows_what_inject_would_select(folder: Path) -> None:
    patterns = ["*.conv[12].0", "model.10"]
    found = report("layers", "RealESRGAN_x4plus.pth", *patterns, "--exclude", "*.RDB3.*")
    model = convlora.inject(esrgan(), patterns, exclude=["*.RDB3.*"], rank=1)
    assert found["architecture"] == "ESRGAN"
    assert list(found["layers"]) == [layer.name for layer in convlora.summary(model).layers]
    assert (found["selected"], found["adaptable"]) == (len(found["layers"]), 36)
    assert found["layers"]["model.10"] == {"type": "Conv2d", "shape": [3, 8, 3, 3], "groups": 1, "transposed": False}


def test_layers_of_a_network_that_is_unknown(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ConvTranspose2d(8, 4, 2), nn.Linear(4, 2))
    torch.save(nn.DataParallel(net).state_dict(), "own.pth")
    found = report("layers", "own.pth")
    assert found["architecture"] is None
    assert {path: layer["transposed"] for path, layer in found["layers"].items()} == {"0": False, "2": True, "3": False}
    assert list(report("layers", "own.pth", "re:[02]", "--exclude", "2")["layers"]) == ["0"]
    assert "nearest: " in fails("layers", "own.pth", "5")
    assert "--exclude leaves no layer" in fails("layers", "own.pth", "0", "--exclude", "0")
    monkeypatch.setattr(architecture.importlib.util, "find_spec", lambda *_: None)
    assert report("layers", "span.safetensors")["architecture"] is None
    save_file({"steps": torch.ones(1)}, "bare.safetensors")
    assert fails("layers", "bare.safetensors") == "layers: 'bare.safetensors' has no layer that can be adapted"


def test_verify_passes_a_sound_adapter(folder: Path) -> None:
    assert report("verify", "rain.safetensors") == {
        "file": "rain.safetensors", "base": None, "ok": True,
        "checks": {"file": {"ok": True, "what": "6 layers, checksum right, all values finite"}},
    }  # fmt: skip
    checks = report("verify", "rain.safetensors", "--base", "RealESRGAN_x4plus.pth")["checks"]
    assert {name: check["ok"] for name, check in checks.items()} == {"file": True, "fits": True, "fingerprint": True}
    checks = report("verify", "kohya.safetensors", "--base", "span.safetensors")["checks"]
    assert {name: check["ok"] for name, check in checks.items()} == {"file": True, "fits": True, "fingerprint": None}


def test_verify_fails_with_a_report(folder: Path) -> None:
    raw = bytearray(Path("rain.safetensors").read_bytes())
    raw[-1] ^= 1
    Path("altered.safetensors").write_bytes(raw)
    save_file(esrgan(seed=9).state_dict(), "other.safetensors")
    cases = {
        "altered.safetensors": ("span.safetensors", "file", "was altered: its checksum does not match"),
        "snow.safetensors": ("other.safetensors", "fingerprint", "was trained on another base"),
        "rain.safetensors": ("snow.safetensors", "fits", "missing: model.1.sub.0.RDB1.conv1.0.bias"),
    }
    for file, (base, check, message) in cases.items():
        result = run("verify", file, "--base", base, "--json")
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: verify: '{file}' ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
        found = json.loads(result.stdout)
        assert found["ok"] is False
        assert [name for name, each in found["checks"].items() if not each["ok"]] == [check]
    text = run("verify", "snow.safetensors", "--base", "other.safetensors").stdout
    assert re.search(r"^fingerprint +FAILED ", text, re.MULTILINE)


# --- the interface -----------------------------------------------------------------------------------------------


def examples(command: str) -> list[list[str]]:
    text = run(command, "--help").stdout
    return [shlex.split(line.partition(" | ")[0])[1:] for line in re.findall(r"^ +(convlora .*)$", text, re.MULTILINE)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_that_runs(command: str, folder: Path) -> None:
    lines = examples(command)
    assert lines
    extra = {"rain-small.safetensors": "snow.safetensors", "rain-locon.safetensors": "locon.safetensors"}
    for name, source in extra.items():
        shutil.copy(source, name)
    shutil.copy("snow.safetensors", "rain.safetensors")  # LoCon files hold no bias
    Path("night.json").write_text('{"*": 1.0, "model.10": 0.4}')
    for args in lines:
        assert args[0] == command
        out(*args, *(["--force"] if "-o" in args else []))


def test_the_list_of_commands_is_that_of_the_app() -> None:
    listed = re.findall(r"^  (\w+)  ", run("--help").stdout.partition("Commands:")[2], re.MULTILINE)
    assert listed == COMMANDS
    assert "..." not in run("--help").stdout.partition("Commands:")[2]
    assert run("--version").stdout == f"convlora {convlora.__version__}\n"


def test_every_command_reports_as_json_in_a_stable_order(folder: Path) -> None:
    lines = {
        "info rain.safetensors": "file format bytes checksum fingerprint name factors config dtypes parameters layers"
        " modules",
        "merge span.safetensors rain.safetensors -o 1.pth --force": "output bytes base tensors changed adapters",
        "extract span.safetensors tuned.safetensors -o 2.safetensors --rank 1 --force": WRITTEN,
        "resize rain.safetensors -o 3.safetensors --rank 1 --force": WRITTEN,
        "combine rain.safetensors -o 4.safetensors --force": WRITTEN,
        "convert rain.safetensors --to peft -o 5 --force": WRITTEN,
        "diff rain.safetensors snow.safetensors": "a b same_layers only_a only_b other_weights largest_distance layers"
        " modules",
        "layers span.safetensors": "checkpoint architecture adaptable selected weights layers",
        "verify rain.safetensors": "file base ok checks",
    }
    for line, keys in lines.items():
        results = [run(*line.split(), "--json").stdout for _ in range(2)]
        assert results[0] == results[1]
        assert list(json.loads(results[0])) == keys.split()
    assert [line.split()[0] for line in lines] == COMMANDS


WRITTEN = "output bytes format factors parameters largest_error layers"


def test_wrong_usage_exits_2_without_boxes() -> None:
    for args in (["merge"], ["nonsense"], ["info", "a", "--nonsense"], ["convert", "a", "--to", "x", "-o", "b"], []):
        result = run(*args)
        assert result.exit_code == 2
        assert "Usage: convlora" in result.stderr + result.stdout
        assert not re.search("[╭│╰\x1b]|Traceback", result.stderr + result.stdout)


def shell(*args: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE) -> Any:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "FORCE_COLOR": "1"}
    environment["PYTHONIOENCODING"] = "ascii"  # the poorest of locales
    command = [sys.executable, "-m", "convlora", *args]
    return subprocess.run(command, env=environment, stdout=stdout, stderr=stderr, check=False)


def test_as_a_process_without_terminal(folder: Path) -> None:
    args = ["merge", "span.safetensors", "rain.safetensors", "-o", "out.safetensors"]
    done, again, wrong = shell(*args), shell(*args), shell("merge", "span.safetensors")
    size = Path("span.safetensors").stat().st_size
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == f"out.safetensors: 12 of 72 tensors adapted, {size:,} bytes\n"
    assert (again.returncode, again.stdout) == (1, b"")
    assert again.stderr == b"error: merge: 'out.safetensors' exists; --force overwrites it\n"
    assert (wrong.returncode, wrong.stdout) == (2, b"")
    assert b"\x1b" not in wrong.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_on_a_terminal_progress_goes_to_stderr_alone(folder: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    done = shell("resize", "rain.safetensors", "-o", "out.safetensors", "--rank", "1", "--json", stderr=theirs)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "resizing" in shown
    assert done.returncode == 0
    assert json.loads(done.stdout)["output"] == "out.safetensors"


def test_a_reader_that_leaves_early_gets_no_traceback(folder: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = shell("info", "rain.safetensors", stdout=writer)
    os.close(writer)
    assert b"Traceback" not in done.stderr


def test_the_entry_point_is_this_app() -> None:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    assert settings["options.entry_points"]["console_scripts"].strip() == f"convlora = {main.__module__}:main"


def test_combine_by_a_sparse_method_equals_the_library(folder: Path) -> None:
    command = ("combine", "rain.safetensors", "peft", "-o", "out.safetensors")
    out(*command, "--method", "ties", "--density", "0.3")
    parts = [Adapter.read("rain.safetensors"), formats.read("peft")]
    expected = Adapter.combine(parts, [1, 1], method="ties", density=0.3)
    written = Adapter.read("out.safetensors")
    assert written.config.factors == "dense"
    assert all(torch.equal(written.delta(path), expected.delta(path)) for path in expected.layers)
    assert "density (=None)" in fails(*command, "--method", "dare", "--force")
