"""What of a training is in the adapter's file: a new head, the norms, their statistics; and does the base come back?

    python benchmarks/travels.py

A torchvision ResNet-18 for 32×32 images gets a new head, then adapters from each library, and trains for 20 steps in
train mode. Its file goes onto a fresh copy of the base. A part has travelled if the fresh network has, bitwise, what
the trained one computes with; the base is back if, once the adapters are off, its outputs in eval mode are, bitwise,
what they were.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, Section, facts_of_run, write_results
from torch import Tensor, nn
from torchvision.models import resnet18

import convlora

STEPS = 20


@dataclass(frozen=True)
class Outcome:
    """Two networks to compare, the trained one and the fresh one with its file; and a forward with the adapters off."""

    live: nn.Module
    loaded: nn.Module
    switched_off: Callable[[Tensor], Tensor]
    warnings: int
    bytes: int


def base() -> nn.Module:
    """With a new head: what it had before is of no use for the task."""
    torch.manual_seed(0)
    network = resnet18(num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    network.maxpool = nn.Identity()
    network.fc = nn.Linear(512, 4)
    return network.eval()


def train(network: nn.Module, parameters: list[nn.Parameter]) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    network.train()
    for _ in range(STEPS):
        images = torch.randn(16, 3, 32, 32, generator=generator) * 2 + 1
        loss = nn.functional.cross_entropy(network(images), torch.randint(4, (16,), generator=generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    network.eval()


def by_convlora(folder: Path, **options: Any) -> Outcome:
    network = convlora.inject(base(), "*", exclude="fc", rank=4, factors="locon", **options)
    if not options:  # as somebody would who knows of no modules_to_save
        network.fc.requires_grad_(True)
    train(network, [p for p in network.parameters() if p.requires_grad])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        convlora.save(network, folder / "adapter.safetensors")
    loaded = convlora.load(base(), folder / "adapter.safetensors").eval()
    off = convlora.activate(copy.deepcopy(network), [])
    return Outcome(network, loaded, off, len(seen), size(folder))


def by_peft(folder: Path, saved: list[str]) -> Outcome:
    import peft

    # peft adapts what target_modules names, also below what it saves
    layers = [n for n, m in base().named_modules() if isinstance(m, nn.Conv2d)]
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=layers, modules_to_save=saved or None)
    network = peft.get_peft_model(base(), config)
    if not saved:
        network.base_model.model.fc.requires_grad_(True)
    train(network, [p for p in network.parameters() if p.requires_grad])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        network.save_pretrained(folder)
    loaded = peft.PeftModel.from_pretrained(base(), folder).eval()

    def off(x: Tensor) -> Tensor:
        with network.disable_adapter():
            return network(x)  # type: ignore[no-any-return]

    told = [w for w in seen if any(word in str(w.message) for word in ("fc", "statistic", "trainable", "bn1"))]
    return Outcome(network.base_model.model, loaded.base_model.model, off, len(told), size(folder))


def by_lycoris(folder: Path) -> Outcome:
    from lycoris import create_lycoris, create_lycoris_from_weights

    network = base().requires_grad_(False)
    adapter = create_lycoris(network, 1.0, linear_dim=4, linear_alpha=4, conv_dim=4, conv_alpha=4, algo="lora")
    adapter.apply_to()
    network.fc.requires_grad_(True)
    train(network, [*adapter.parameters(), *network.fc.parameters()])
    file = folder / "adapter.safetensors"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        adapter.save_weights(str(file), torch.float32, {})
    loaded = base()
    restored, _ = create_lycoris_from_weights(1.0, str(file), loaded)
    restored.apply_to()
    adapter.restore()
    off = copy.deepcopy(network)
    adapter.apply_to()
    return Outcome(network, loaded.eval(), off, len(seen), size(folder))


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


CASES: dict[str, Callable[[Path], Outcome]] = {
    "convlora, modules_to_save=['fc']": lambda folder: by_convlora(folder, modules_to_save="fc"),
    "convlora, modules_to_save=['fc', nn.BatchNorm2d]": lambda folder: by_convlora(
        folder, modules_to_save=["fc", nn.BatchNorm2d]
    ),
    "convlora, head unfrozen by hand": lambda folder: by_convlora(folder),
    "PEFT, modules_to_save=['fc']": lambda folder: by_peft(folder, ["fc"]),
    "PEFT, modules_to_save=['fc', 'bn1', …]": lambda folder: by_peft(
        folder, ["fc", *(name for name, m in base().named_modules() if isinstance(m, nn.BatchNorm2d))]
    ),
    "PEFT, head unfrozen by hand": lambda folder: by_peft(folder, []),
    "LyCORIS, head unfrozen by hand": by_lycoris,
}


def read(network: nn.Module, module: str, name: str) -> Tensor:
    """A tensor that a network computes with, through PEFT's wrapper around a module that it saves."""
    found = network.get_submodule(module)
    if hasattr(found, "modules_to_save"):
        found = found.modules_to_save["default"]
    return getattr(found, name).detach()  # type: ignore[no-any-return]


def measure() -> Section:
    section = Section(
        "What travels in the file",
        f"ResNet-18, rank 4 on all convolutions, a new head, {STEPS} steps in train mode. Head, norms (weight and bias"
        " of bn1), statistics (of bn1): what the fresh network has is bitwise the trained one's; '(not trained)'"
        " where it is the base's in both. Base back: outputs in eval mode with the adapters off. Warned: where"
        " something trained is not in the file.",
        ("", "head", "norms", "statistics", "file gives the output", "base back", "warned", "file (kB)"),
    )
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    plain = base()
    with torch.no_grad():
        before = plain(x)
    for case, run in CASES.items():
        with tempfile.TemporaryDirectory() as folder, torch.no_grad(), torch.enable_grad():
            outcome = run(Path(folder))
        parts = {"head": ("fc", "weight"), "norms": ("bn1", "weight"), "statistics": ("bn1", "running_mean")}
        row: dict[str, Any] = {"case": case}
        for part, (module, name) in parts.items():
            live, loaded = (read(network, module, name) for network in (outcome.live, outcome.loaded))
            trained = not torch.equal(live, read(plain, module, name))
            row[part] = ("yes" if torch.equal(live, loaded) else "lost") if trained else "(not trained)"
        with torch.no_grad():
            row["error"] = float((outcome.live(x) - outcome.loaded(x)).abs().max() / outcome.live(x).abs().max())
            row["base back"] = torch.equal(outcome.switched_off(x), before)
        row["warnings"], row["bytes"] = outcome.warnings, outcome.bytes
        lost = "lost" in (row["head"], row["norms"], row["statistics"])
        same = (
            "bitwise" if row["error"] == 0 else "to rounding" if row["error"] < 1e-5 else f"off by {row['error']:.0%}"
        )
        warned = "yes" if outcome.warnings else "no" if lost else "–"
        cells = (row["head"], row["norms"], row["statistics"], same, "yes" if row["base back"] else "no", warned)
        section.rows.append((case, *cells, f"{outcome.bytes / 1000:.0f}"))
        section.data.append(row)
    return section


def main(out: Annotated[Path, typer.Option(help="JSON file of the results.")] = RESULTS / "travels.json") -> None:
    """Train, save and load with each library; see what has travelled."""
    torch.set_num_threads(1)
    facts = facts_of_run("torch", "torchvision", "convlora", "peft", "lycoris-lora")
    section = measure()
    section.show()
    write_results(out, "python benchmarks/travels.py", facts, [section])


if __name__ == "__main__":
    typer.run(main)
