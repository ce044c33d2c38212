"""Names that differ by a prefix, one network of several, and strengths by layer, from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import NET_LAYERS, bytes_of, net, randomise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import convlora
from convlora import Adapter, formats
from convlora.cli.app import app

State = dict[str, Tensor]


def base(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return net().eval()


def around(inner: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({"net": inner})


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{name}": tensor.clone() for name, tensor in state.items()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    state = base().state_dict()
    save_file(state, "bare.safetensors")
    torch.save({"state_dict": prefixed(state, "net."), "epoch": 3}, "whole.ckpt")
    torch.save({"generator": base(1).state_dict(), "generator_ema": state, "iter": 5}, "gan.pth")
    flat = {**prefixed(base(1).state_dict(), "generator."), **prefixed(state, "generator_ema."), "step": torch.ones(1)}
    torch.save({"state_dict": flat, "meta": {"a": 1}}, "flat.pth")
    for factors in ("convlora", "locon"):
        options: dict[str, Any] = dict(rank=1, alpha=3, bias=factors == "convlora", factors=factors)
        part = convlora.adapter(randomise(convlora.inject(base(), NET_LAYERS, **options)))
        part.write(f"part-{factors}.safetensors")
        inside = randomise(convlora.inject(around(base()), "*", norm_statistics="frozen", **options))
        convlora.adapter(inside).write(f"inside-{factors}.safetensors")
    return tmp_path


def run(*args: str) -> str:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False, prog_name="convlora")
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    return result.stdout


def fails(*args: str) -> str:
    before = sorted(path.name for path in Path().iterdir())
    result = CliRunner().invoke(app, list(args), catch_exceptions=False, prog_name="convlora")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == before
    return str(result.stderr.removeprefix("error: ").rstrip("\n"))


def same(one: Any, other: Any) -> bool:
    return list(one) == list(other) and all(bytes_of(one[n]) == bytes_of(other[n]) for n in one)


def applied(adapter: Adapter, **options: Any) -> dict[str, Any]:
    return adapter.apply_to(base().state_dict(), **options)


# --- prefixes


@pytest.mark.parametrize("given", [[], ["--prefix", "net."]])
@pytest.mark.parametrize("factors", ["convlora", "locon"])
def test_merge_adds_and_takes_away_the_prefix_of_names(factors: str, given: list[str], folder: Path) -> None:
    part, inside = (Adapter.read(f"{kind}-{factors}.safetensors") for kind in ("part", "inside"))
    run("merge", "whole.ckpt", f"part-{factors}.safetensors", "-o", "out.ckpt", *given)
    written = torch.load("out.ckpt", weights_only=True)
    assert written["epoch"] == 3
    assert same(written["state_dict"], prefixed(applied(part), "net."))
    run("merge", "bare.safetensors", f"inside-{factors}.safetensors", "-o", "out.safetensors", *given)
    written, expected = load_file("out.safetensors"), applied(inside.rename({"net": ""}))
    assert same({name: written[name] for name in expected}, expected)
    both = ["merge", "whole.ckpt", f"part-{factors}.safetensors", f"inside-{factors}.safetensors", "-o", "both.ckpt"]
    report = json.loads(run(*both, "--json", *given))  # one of them needs it
    assert [each["same_base"] for each in report["adapters"]] == [True, True]


@pytest.mark.parametrize("given", [[], ["--prefix", "net"]])
def test_verify_and_diff_take_prefixes(given: list[str], folder: Path) -> None:
    checks = json.loads(run("verify", "part-convlora.safetensors", "--base", "whole.ckpt", "--json", *given))["checks"]
    assert [check["ok"] for check in checks.values()] == [True, True, True]
    run("verify", "inside-locon.safetensors", "--base", "bare.safetensors", *given)
    Adapter.read("part-convlora.safetensors").rename({"": "net"}).write("again.safetensors")
    for pair in (["part-convlora", "again"], ["again", "part-convlora"]):
        report = json.loads(run("diff", *(f"{name}.safetensors" for name in pair), "--json", *given))
        assert report["same_layers"]
        assert report["largest_distance"] == 0


def test_a_bare_locon_file_reads_by_names_without_the_prefix(folder: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 3, 3))
    adapter = convlora.adapter(randomise(convlora.inject(model, "*", rank=1, factors="locon")))
    state = convlora.remove(model).state_dict()
    for names in ({"": "body"}, {"": "net.body"}):
        formats.write(adapter.rename(names), "own.safetensors", "locon")
        save_file(load_file("own.safetensors"), "kohya.safetensors")  # without our metadata
        torch.save(prefixed(state, "body." if "." in names[""] else "net.body."), "base.pth")
        for given in ([], ["--prefix", "net."]):
            run("merge", "base.pth", "kohya.safetensors", "-o", "out.pth", "--force", *given)
            merged = torch.load("out.pth", weights_only=True)
            assert [bytes_of(t) for t in merged.values()] == [bytes_of(t) for t in adapter.apply_to(state).values()]


PREFIX_ERRORS = {
    "merge flat.pth part-convlora% -o out.pth": "merge: the names of 'part-convlora%' fit 'flat.pth' in several ways, "
    "with 'generator.' before them, with 'generator_ema.' before them; --prefix or --network says which",
    "merge bare% inside-convlora% -o out.pth --prefix gone": "merge: 'inside-convlora%' does not fit 'bare%' with names"
    " that 'gone' is added to or taken from: missing: net.0.bias",
    "diff part-convlora% inside-convlora% --prefix gone": "diff: the names of 'part-convlora%' and 'inside-convlora%'"
    " do not differ by 'gone'",
}


@pytest.mark.parametrize("line", PREFIX_ERRORS)
def test_prefixes_that_do_not_say_which(line: str, folder: Path) -> None:
    expected = PREFIX_ERRORS[line].replace("%", ".safetensors")
    assert fails(*line.replace("%", ".safetensors").split()).startswith(expected)


# --- one network of several


def test_network_chooses_one_of_several_and_leaves_the_others(folder: Path) -> None:
    expected = applied(Adapter.read("part-convlora.safetensors"))
    arguments = ["part-convlora.safetensors", "-o", "out.pth", "--force", "--network", "generator_ema"]
    result = CliRunner().invoke(app, ["merge", "gan.pth", *arguments], catch_exceptions=False)
    assert result.stderr == "warning: merge: 'generator_ema' is adapted; generator beside it stays as it was\n"
    written = torch.load("out.pth", weights_only=True)
    assert same(written["generator_ema"], expected)
    assert same(written["generator"], base(1).state_dict())
    run("merge", "flat.pth", *arguments)
    written = torch.load("out.pth", weights_only=True)["state_dict"]
    assert same(
        {n: t for n, t in written.items() if n.startswith("generator_ema.")}, prefixed(expected, "generator_ema.")
    )
    untouched = {n: t for n, t in written.items() if n.startswith("generator.")}
    assert same(untouched, prefixed(base(1).state_dict(), "generator."))


def test_every_command_with_a_checkpoint_takes_a_network(folder: Path) -> None:
    network = ["--network", "generator_ema"]
    run("verify", "part-convlora.safetensors", "--base", "gan.pth", *network)
    assert "0 " in run("layers", "gan.pth", *network)
    run("info", "part-locon.safetensors", "--base", "gan.pth", *network)
    run("diff", "part-locon.safetensors", "part-locon.safetensors", "--base", "gan.pth", *network)
    for command in ("resize", "convert", "combine"):
        more = {"resize": ["--rank", "1"], "convert": ["--to", "convlora"], "combine": []}[command]
        run(command, "part-locon.safetensors", "-o", f"{command}.safetensors", "--base", "gan.pth", *more, *network)
    torch.save({"generator_ema": applied(Adapter.read("part-locon.safetensors"))}, "tuned.pth")
    run("extract", "gan.pth", "tuned.pth", "-o", "extracted.safetensors", "--energy", "1", *network)
    message = "read: 'gan.pth' holds generator, generator_ema; say which by --network"
    for line in (
        "verify part-locon.safetensors --base gan.pth",
        "layers gan.pth",
        "extract gan.pth tuned.pth -o x.safetensors --rank 1",
    ):
        assert fails(*line.split()) == message
    assert fails("layers", "gan.pth", "--network", "ema") == (
        "read: 'gan.pth' holds no network 'ema'; it has generator, generator_ema"
    )


# --- strengths by layer


def strength_file(content: Any, name: str = "strength.json") -> str:
    Path(name).write_text(content if isinstance(content, str) else json.dumps(content))
    return name


def test_merge_takes_strengths_by_layer_from_a_file(folder: Path) -> None:
    strength = {"*": 0.5, "[34]": -1, "4": 0.0}
    adapter = Adapter.read("part-convlora.safetensors")
    arguments = [
        "merge",
        "bare.safetensors",
        "part-convlora.safetensors",
        "-o",
        "out.pth",
        "-s",
        strength_file(strength),
    ]
    report = json.loads(run(*arguments, "--json"))
    written = torch.load("out.pth", weights_only=True)
    assert report["adapters"][0]["strength"] == strength
    assert report["changed"] == 6  # of four layers, three with weight and bias
    model = convlora.activate(convlora.load(base(), adapter), {"default": strength})
    expected = convlora.merged_state_dict(model)
    assert {n: bytes_of(t) for n, t in written.items()} == {n: bytes_of(t) for n, t in expected.items()}


def test_strengths_are_given_in_turn_or_for_all(folder: Path) -> None:
    one, two = Adapter.read("part-convlora.safetensors"), Adapter.read("part-locon.safetensors")
    two.refactor("convlora").write("two.safetensors")
    two = Adapter.read("two.safetensors")
    strength = {"0": 0.25}
    files = ["merge", "bare.safetensors", "part-convlora.safetensors", "two.safetensors", "--force", "-o", "out.pth"]
    model = convlora.load(convlora.load(base(), one, name="one"), two, name="two")
    for given, expected in (
        (["-s", strength_file(strength), "-s", "0.5"], {"one": strength, "two": 0.5}),
        (["-s", "strength.json"], {"one": strength, "two": strength}),
    ):
        run(*files, *given)
        state = convlora.merged_state_dict(model, expected)
        assert {n: bytes_of(t) for n, t in torch.load("out.pth", weights_only=True).items()} == {
            n: bytes_of(t) for n, t in state.items()
        }
    run(
        "combine",
        "part-convlora.safetensors",
        "two.safetensors",
        "-w",
        "strength.json",
        "-w",
        "2",
        "-o",
        "both.safetensors",
    )
    combined = Adapter.read("both.safetensors")
    for path in NET_LAYERS:
        wanted = (0.25 if path == "0" else 1.0) * one.delta(path) + 2 * two.delta(path)
        torch.testing.assert_close(combined.delta(path), wanted, rtol=1e-5, atol=1e-6)


STRENGTH_ERRORS: dict[str, tuple[Any, str]] = {
    "no layer": ({"body.*": 0.4}, "merge: strength pattern 'body.*' matches none of the layers; nearest: '"),
    "no number": ({"*": "much"}, "merge: 'strength.json' must hold {pattern: number}"),
    "of several adapters": ({"default": {"*": 0.5}}, "merge: 'strength.json' must hold {pattern: number}"),
    "a list": ([0.4], "merge: 'strength.json' must hold {pattern: number}"),
    "no JSON": ("{", "merge: 'strength.json' cannot be read ("),
}


@pytest.mark.parametrize("case", STRENGTH_ERRORS)
def test_files_without_strengths_are_one_clear_error(case: str, folder: Path) -> None:
    content, message = STRENGTH_ERRORS[case]
    file = strength_file(content)
    assert fails("merge", "bare.safetensors", "part-convlora.safetensors", "-o", "out.pth", "-s", file).startswith(
        message
    )


def test_a_strength_that_is_neither_number_nor_file(folder: Path) -> None:
    arguments = ["merge", "bare.safetensors", "part-convlora.safetensors", "-o", "out.pth", "-s"]
    assert fails(*arguments, "gone.json") == "merge: 'gone.json' cannot be read (No such file or directory)"
    result = CliRunner().invoke(app, [*arguments, "much"], catch_exceptions=False)
    assert result.exit_code == 2
    assert "'much' is neither a number nor a .json file" in result.stderr
