"""The good files from which `mutate` makes hostile ones, and the network that they are for."""

from __future__ import annotations

import copy
import io
import json
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn

import convlora
from benchmarks.trust.mutate import Files, SafetensorsParts
from convlora import Adapter, formats
from convlora.adapter.file import checksum
from convlora.support.safetensors import to_safetensors

PLAIN = ["stem", "body.0", "head"]  # layers that every format holds
SAVED = ["norm", "classes"]  # modules that native files of version 2 and PEFT directories hold whole
ALPHA = 3.0


def network() -> nn.Sequential:
    """A convolution of each sort and a Linear; a norm with statistics, and a head."""
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 3, groups=2))
    layers = {"stem": nn.Conv2d(3, 4, 3), "body": body, "up": nn.ConvTranspose2d(4, 3, 2), "head": nn.Linear(5, 3)}
    layers |= {"norm": nn.BatchNorm2d(4), "classes": nn.Linear(3, 2)}
    return nn.Sequential(OrderedDict(layers)).eval()


def adapted(base: nn.Module, targets: Any, moved: bool = False, **options: Any) -> nn.Module:
    """A copy of the network with an adapter as if trained; `moved`: statistics of its own, too."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", convlora.ConvLoRAWarning)  # larger than its layers, which are tiny
        model = convlora.inject(copy.deepcopy(base), targets, **options)
    with torch.no_grad():
        for parameter in convlora.parameters(model):
            parameter.normal_()
        for name, buffer in model.named_buffers():
            if moved and ".convlora." in name and not name.endswith(("gain", "scale")):
                buffer.add_(2)
    return model


def seed_files(base: nn.Module) -> dict[str, list[tuple[str, Files]]]:
    """Format -> (name of the file or folder, its files), several of each format."""
    return {kind: list(make(base)) for kind, make in MAKERS.items()}


def _written(adapter: Adapter, kind: str, name: str, **options: Any) -> tuple[str, Files]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, name)
        formats.write(adapter, place, kind, **options)
        files = {f.name: f.read_bytes() for f in (place.iterdir() if place.is_dir() else [place])}
    return name, dict(sorted(files.items()))


def _native(base: nn.Module) -> Iterator[tuple[str, Files]]:
    for options in (
        {"targets": "*", "rank": 2, "bias": True},
        {"targets": PLAIN, "rank": 2, "factors": "locon", "rank_scaling": "sqrt", "alpha": 0.5, "name": "rain"},
        {"targets": "*", "ranks": {"stem": 1}, "alphas": {"head": 7}, "rank": 3},
        {"targets": "*", "rank": 2, "bias": True, "modules_to_save": SAVED, "moved": True},
        {"targets": "*", "rank": 2, "bias": True, "moved": True},
        {"targets": PLAIN, "rank": 1, "modules_to_save": "classes", "norm_statistics": "frozen"},
    ):
        adapter = convlora.adapter(adapted(base, **options))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield _written(adapter.to(dtype), "convlora", "rain.safetensors")


def _peft(base: nn.Module) -> Iterator[tuple[str, Files]]:
    for options, prefix in (
        ({"rank": 2, "alpha": ALPHA}, None),
        ({"rank": 2, "ranks": {"stem": 1}, "alphas": {"head": 7}, "rank_scaling": "sqrt"}, ""),
        ({"rank": 1, "bias": True}, None),
        ({"rank": 2, "alpha": ALPHA, "modules_to_save": SAVED, "moved": True}, None),
        ({"rank": 2, "modules_to_save": "classes"}, ""),
    ):
        adapter = convlora.adapter(adapted(base, PLAIN, factors="locon", **options))
        yield _written(adapter, "peft", "rain", prefix=prefix)
        name, files = _written(adapter.to(torch.bfloat16), "peft", "rain", prefix=prefix)
        tensors = load(files["adapter_model.safetensors"])
        yield name, {"adapter_config.json": files["adapter_config.json"], "adapter_model.bin": torch_file(tensors)}


def _peft_methods(base: nn.Module) -> Iterator[tuple[str, Files]]:
    for factors in ("dora", "loha", "lokr"):
        adapter = convlora.adapter(adapted(base, PLAIN, factors=factors, rank=2, alpha=ALPHA))
        yield _written(adapter, "peft", "rain")


def _diffusers(base: nn.Module) -> Iterator[tuple[str, Files]]:
    for factors, prefix in (("locon", None), ("locon", "unet"), ("dora", None), ("lokr", "unet")):
        options = {"ranks": {"stem": 1}, "alphas": {"head": 7}} if prefix is None else {"bias": factors == "locon"}
        adapter = convlora.adapter(adapted(base, PLAIN, factors=factors, rank=2, **options))
        yield _written(adapter, "diffusers", "rain.safetensors", prefix=prefix)
    name, files = _written(adapter.to(torch.bfloat16), "diffusers", "rain.safetensors")
    packed = SafetensorsParts.of(files[name])
    packed.metadata = [("format", "pt")]
    yield name, {name: packed.pack()}  # as older versions write it: nothing states the scale


def _locon(base: nn.Module) -> Iterator[tuple[str, Files]]:
    adapter = convlora.adapter(adapted(base, PLAIN, factors="locon", rank=2, alpha=ALPHA))
    name, files = _written(adapter, "locon", "rain.safetensors")
    yield name, files
    packed = SafetensorsParts.of(files[name])
    packed.metadata = [("format", "pt"), ("ss_network_module", "networks.lora")]
    yield name, {name: packed.pack()}  # as other libraries write it: nothing states the paths
    yield _written(adapter.to(torch.float16), "locon", "rain.pt", prefix="lora_unet")
    tucker = {
        "lycoris_stem.lora_down.weight": torch.randn(2, 3, 1, 1),
        "lycoris_stem.lora_mid.weight": torch.randn(2, 2, 3, 3),
        "lycoris_stem.lora_up.weight": torch.randn(4, 2, 1, 1), "lycoris_stem.alpha": torch.tensor(ALPHA),
    }  # fmt: skip
    yield name, {name: to_safetensors(tucker, {"format": "pt"})}
    for factors in ("dora", "dora_in", "loha", "lokr", "dense"):
        adapter = convlora.adapter(adapted(base, PLAIN, factors=factors, rank=2, alpha=ALPHA))
        yield _written(adapter, "locon", "rain.safetensors")
    mixed = {
        "diffusion_model.stem.lora_A.weight": torch.randn(2, 3, 3, 3), "diffusion_model.head.diff_b": torch.randn(3),
        "diffusion_model.stem.lora_B.weight": torch.randn(4, 2, 1, 1), "diffusion_model.stem.alpha": torch.tensor(3),
        "diffusion_model.head.hada_w1_a": torch.randn(3, 2), "diffusion_model.head.hada_w1_b": torch.randn(2, 5),
        "diffusion_model.head.hada_w2_a": torch.randn(3, 2), "diffusion_model.head.hada_w2_b": torch.randn(2, 5),
        "diffusion_model.body.0.diff": torch.randn(4, 4, 1, 1),
    }  # fmt: skip
    yield name, {name: to_safetensors(mixed, {"format": "pt"})}


def _loralib(base: nn.Module) -> Iterator[tuple[str, Files]]:
    adapter = convlora.adapter(adapted(base, [*PLAIN, "body.1"], rank=2, alpha=ALPHA))
    yield _written(adapter, "loralib", "rain.safetensors")
    yield _written(adapter, "loralib", "rain.pt")
    state = OrderedDict(
        (f"{path}.{name}", t) for path, layer in adapter.layers.items() for name, t in layer.tensors.items()
    )
    state |= base.state_dict()
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    yield "rain.pt", {"rain.pt": torch_file(state)}
    parameters = {name: nn.Parameter(t, t.is_floating_point()) for name, t in state.items()}
    yield "rain.pt", {"rain.pt": torch_file(parameters)}
    yield "rain.bin", {"rain.bin": torch_file(dict(state), _use_new_zipfile_serialization=False)}


def _every_peft(base: nn.Module) -> Iterator[tuple[str, Files]]:
    yield from _peft(base)
    yield from _peft_methods(base)


MAKERS = {"convlora": _native, "peft": _every_peft, "locon": _locon, "loralib": _loralib, "diffusers": _diffusers}


def torch_file(tensors: Any, **options: Any) -> bytes:
    """As `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(tensors, buffer, **options)
    return buffer.getvalue()


# --- large files -----------------------------------------------------------------------------------------------------


def native_file(
    tensors: dict[str, Tensor], layers: str, config: str = '{"targets":["*"],"rank":1}', modules: str = ""
) -> bytes:
    """A native file with a right checksum, whatever it holds."""
    version = "2" if modules else "1"
    metadata = {"format": "convlora", "convlora.format_version": version, "config": config, "layers": layers}
    metadata |= {"modules": modules} if modules else {}
    return to_safetensors(tensors, {**metadata, "checksum": checksum(tensors, metadata)})


def large_files() -> dict[str, Callable[[], tuple[str, str, Files]]]:
    """What makes format, name and files of what takes much memory or time where it is believed: megabytes, mostly."""
    few = {"stem.lora_A": torch.ones(3, 9), "stem.lora_B": torch.ones(12, 3)}
    one = '{"stem":[1,1,[4,3,3,3]]}'
    stem = {"stem.lora_A": torch.ones(3, 9), "stem.lora_B": torch.ones(4, 3)}
    pair = {"a.lora_down.weight": torch.ones(2, 3), "a.lora_up.weight": torch.ones(4, 2)}
    matrix = {"a.lora_A": torch.ones(2, 3), "a.lora_B": torch.ones(4, 2)}
    peft_pair = {
        f"base_model.model.a.lora_{x}.weight": t for x, t in (("A", torch.ones(2, 3)), ("B", torch.ones(4, 2)))
    }
    long = "x" * 1_000_000

    def native(tensors: dict[str, Tensor], layers: str = one, **options: str) -> tuple[str, str, Files]:
        return "convlora", "rain.safetensors", {"rain.safetensors": native_file(tensors, layers, **options)}

    def locon(tensors: dict[str, Tensor], **metadata: str) -> tuple[str, str, Files]:
        return "locon", "rain.safetensors", {"rain.safetensors": to_safetensors(tensors, metadata)}

    def loralib(tensors: dict[str, Tensor], **metadata: str) -> tuple[str, str, Files]:
        return "loralib", "rain.safetensors", {"rain.safetensors": to_safetensors(tensors, metadata)}

    def peft(tensors: dict[str, Tensor], **config: Any) -> tuple[str, str, Files]:
        text = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2, **config}).encode()
        return "peft", "rain", {"adapter_config.json": text, "adapter_model.safetensors": to_safetensors(tensors, {})}

    def diffusers(tensors: dict[str, Tensor], **config: Any) -> tuple[str, str, Files]:
        text = json.dumps({"r": 2, "lora_alpha": 2, **config})
        raw = to_safetensors(tensors, {"lora_adapter_metadata": text})
        return "diffusers", "rain.safetensors", {"rain.safetensors": raw}

    def four_megabytes(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        width = 500_000 // dtype.itemsize
        return {"a.lora_A": torch.ones(2, width).to(dtype), "a.lora_B": torch.ones(width, 2).to(dtype)}

    def of(dtype: torch.dtype) -> tuple[str, str, Files]:
        tensors = four_megabytes(dtype)
        return native(tensors, json.dumps({"a": [2, 2, [tensors["a.lora_A"].shape[1]] * 2]}))

    def numbers(count: int, name: str = "{}.lora_{}", letters: Sequence[str] = "AB") -> dict[str, Tensor]:
        return {name.format(i, x): torch.ones(1, 1) for i in range(count) for x in letters}

    under = "base_model.model.{}.lora_{}.weight"
    return {
        "2 MB of float64": lambda: of(torch.float64),
        "2 MB of float32": lambda: of(torch.float32),
        "2 MB of bfloat16": lambda: of(torch.bfloat16),
        "2 MB of float8": lambda: of(torch.float8_e5m2),
        "2 MB of loralib": lambda: loralib(four_megabytes()),
        "2 MB of loralib, a pickle": lambda: ("loralib", "rain.pt", {"rain.pt": torch_file(four_megabytes())}),
        "40,000 tensors of one number": lambda: native(
            numbers(20_000), json.dumps({str(i): [1, 1, [1, 1]] for i in range(20_000)})
        ),
        "40,000 tensors, no layers": lambda: native(numbers(20_000)),
        "20,000 layers without tensors": lambda: native(few, json.dumps({i: [1, 1, [1, 1]] for i in range(20_000)})),
        "a million lists": lambda: native(few, "[" + "[]," * 1_000_000 + "[]]"),
        "a million lists in the config": lambda: native(few, config='{"targets":[' + "[]," * 1_000_000 + "[]]}"),
        "a million targets": lambda: native(few, config='{"targets":[' + '"a",' * 1_000_000 + '"a"]}'),
        "a million dimensions": lambda: native(few, '{"stem":[1,1,[' + "2," * 1_000_000 + "2]]}"),
        "dimensions of a thousand digits": lambda: native(few, '{"stem":[1,1,[' + f"{'9' * 1000}," * 1000 + "2]]}"),
        "a rank of four thousand digits": lambda: native(few, '{"stem":[' + "9" * 4000 + ",1,[4,3,3,3]]}"),
        "a million aliases": lambda: native(few, '{"stem":[1,1,[4,3,3,3],1,0,[' + '"a",' * 1_000_000 + '"a"]]}'),
        "a million names of copies": lambda: native(few, modules='{"norm":[' + '"a",' * 1_000_000 + '"a"]}'),
        "a million lists of copies": lambda: native(few, modules='{"norm":[' + "[]," * 1_000_000 + "[]]}"),
        "20,000 modules without tensors": lambda: native(few, modules=json.dumps({i: ["a"] for i in range(20_000)})),
        "20,000 copies of one number": lambda: native(
            {**stem, **{f"{i}.a": torch.ones(1) for i in range(20_000)}},
            modules=json.dumps({i: ["a"] for i in range(20_000)}),
        ),
        "2 MB of copies": lambda: native(
            {**stem, "classes.weight": torch.ones(500_000), "norm.running_mean": torch.ones(4)},
            modules='{"classes":["weight"],"norm":["running_mean"]}',
        ),
        "a copy's name of a megabyte": lambda: native(
            {**stem, f"norm.{long}": torch.ones(1)}, modules=json.dumps({"norm": [long]})
        ),
        "a name of a megabyte": lambda: native({f"{long}.lora_A": torch.ones(1)}),
        "a layer of a megabyte": lambda: native(
            {name.replace("stem", "stem" * 250_000): t for name, t in few.items()},
            one.replace("stem", "stem" * 250_000),
        ),
        "an adapter's name of a megabyte": lambda: native(few, config='{"targets":["*"],"name":"' + long + '"}'),
        "Tucker factors of a huge kernel": lambda: locon(
            {
                "a.lora_down.weight": torch.ones(1, 10_000, 1, 1), "a.lora_up.weight": torch.ones(1, 1, 1, 1),
                "a.lora_mid.weight": torch.ones(1, 1, 100, 100),
            }
        ),
        "an alpha of a million numbers": lambda: locon({**pair, "a.alpha": torch.ones(1_000_000)}),
        "LoCon: a name of a megabyte": lambda: locon(
            {"lycoris_" + "stem_" * 200_000 + name.removeprefix("a"): t for name, t in pair.items()}
        ),
        "LoCon: 20,000 names": lambda: locon(numbers(10_000, "lycoris_{}.lora_{}.weight", ("down", "up"))),
        "LoCon: a million lists": lambda: locon(pair, **{"convlora.layers": "[" + "[]," * 1_000_000 + "[]]"}),
        "LoKr of a huge w1": lambda: locon(
            {
                "a.lokr_w1_a": torch.ones(30_000, 1), "a.lokr_w1_b": torch.ones(1, 30_000),
                "a.lokr_w2": torch.ones(2, 2),
            }
        ),
        "LoHa of a huge update beside another kind": lambda: locon(
            {
                **{f"a.hada_w{n}_a": torch.ones(30_000, 1) for n in (1, 2)},
                **{f"a.hada_w{n}_b": torch.ones(1, 30_000) for n in (1, 2)}, "b.diff": torch.ones(2, 2),
            }
        ),
        "LoHa of a huge Tucker core": lambda: locon(
            {
                **{f"a.hada_w{n}_{x}": torch.ones(2, 30_000) for n in (1, 2) for x in "ab"},
                **{f"a.hada_t{n}": torch.ones(2, 2, 200, 200) for n in (1, 2)},
            }
        ),
        "diffusers: a million lists": lambda: diffusers(peft_pair, rank_pattern=[[]] * 1_000_000),
        "diffusers: a million networks": lambda: diffusers(peft_pair, **{f"{i}.r": 1 for i in range(1_000_000)}),
        "diffusers: 1,500 expressions for 1,500 layers": lambda: diffusers(
            numbers(1500, "{}.lora_{}.weight"), r=1, alpha_pattern={f"{i}.?x": 1 for i in range(1500)}
        ),
        "loralib: a million layers": lambda: loralib(
            matrix, **{"convlora.layers": json.dumps({i: [] for i in range(1_000_000)})}
        ),
        "loralib: 20,000 records": lambda: ("loralib", "rain.pt", {"rain.pt": torch_file(numbers(10_000))}),
        "PEFT: 1,500 patterns for 1,500 layers": lambda: peft(
            numbers(1500, under), r=1, rank_pattern={f"^{i}": 1 for i in range(1500)},
            alpha_pattern={str(i): 1 for i in range(1500)},
        ),
        "PEFT: 1,500 expressions for 1,500 layers": lambda: peft(
            numbers(1500, under), r=1, alpha_pattern={f"{i}.?x": 1 for i in range(1500)}
        ),
        "PEFT: patterns for a long name": lambda: peft(
            {n.replace(".a.", "." + "a" * 100_000 + "."): t for n, t in peft_pair.items()},
            alpha_pattern={".*a.*b": 1, ".*b.*": 2},
        ),
        "PEFT: a million modules to save": lambda: peft(peft_pair, modules_to_save=["a"] * 1_000_000),
        "PEFT: 1,000 modules to save of 1,000 copies": lambda: peft(
            {**peft_pair, **{f"base_model.model.{i}.weight": torch.ones(1) for i in range(1000)}},
            modules_to_save=[str(i) for i in range(1000)],
        ),
        "PEFT: a million lists": lambda: peft(peft_pair, rank_pattern=[[]] * 1_000_000),
        "PEFT: a megabyte of one pattern": lambda: peft(peft_pair, alpha_pattern={long: 1}),
        "PEFT: a name of a megabyte": lambda: peft({".lora_A" * 150_000: torch.ones(1), **peft_pair}),
    }  # fmt: skip
