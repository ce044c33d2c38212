"""The whole life of an adapter on one network: trained, merged, handed on, reloaded, removed, and checked each time."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import typer
from rich.console import Console
from spandrel import ModelLoader

import convlora
from sr.data import (
    InputError,
    Patches,
    Photo,
    bundled_photos,
    degraded_pairs,
    prepare,
    read_folder,
    to_image,
    to_tensor,
)
from sr.degradations import DEGRADATIONS, enlarge
from sr.metrics import quality
from sr.models import predict, upscale
from sr.networks import Network
from sr.report import (
    Row,
    device_name,
    make_row,
    quality_table,
    save_comparison,
    save_curve,
    training_bar,
)
from sr.training import Schedule, make_accelerator, train

if TYPE_CHECKING:
    from sr.command import Options

HELD_OUT_SEED = 10**9  # held-out photos suffer degradations that training never sees
HELD_OUT_DRAWS = 4
CLOSE = 1e-5  # of full scale: what another order of summation may change


def demonstrate(network: Network, chosen: Options, promised: float | None, console: Console) -> None:
    """Adapt the network as the options say, show what came out and write it to `chosen.out`.

    Raises:
        typer.Exit: an output is not what it should be, or the gain over the base is below `promised` (dB).
    """
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    torch.manual_seed(chosen.seed)
    accelerator = make_accelerator(chosen.device)
    out, stem = chosen.out, network.stem
    out.mkdir(parents=True, exist_ok=True)

    # 1. The network and the photos, each as (low, high): what the camera gives, what was there.
    model, scale = network.load(chosen.base)
    model.to(accelerator.device)
    training, judging = choose_photos(chosen.photos, chosen.held_out)
    training = prepare(training, scale, least=chosen.patch * scale)
    judging = prepare(judging, scale, least=64)
    degrade = DEGRADATIONS[chosen.degradation]
    pairs = degraded_pairs(training, degrade, scale=scale, draws=chosen.draws, seed=chosen.seed * 10**5)
    tests = degraded_pairs(judging, degrade, scale=scale, draws=HELD_OUT_DRAWS, seed=HELD_OUT_SEED)
    highs = [test.high for test in tests]

    def row(name: str, outputs: list[torch.Tensor], same: Row | None = None) -> Row:
        return make_row(name, outputs, highs, scale, same)

    def outputs(model: torch.nn.Module) -> list[torch.Tensor]:
        return [predict(model, test.low) for test in tests]

    bicubic = row("bicubic", [to_tensor(enlarge(test.low, scale)) for test in tests])
    base_row = row("base", outputs(model))
    base_state = {key: value.clone() for key, value in model.state_dict().items()}

    # 2. Adapters on every layer that the patterns select; everything else is frozen.
    convlora.inject(
        model,
        targets=chosen.targets,
        rank=chosen.rank,
        alpha=chosen.alpha,
        factors=chosen.factors,
        bias=chosen.bias,
    )
    size = convlora.summary(model)
    console.print(
        f"[bold]{len(size.layers)}[/] layers adapted, [bold]{size.trainable:,}[/] parameters to "
        f"train beside {size.base:,} frozen ({size.trainable / size.base:.1%}); "
        f"{len(training)} photos to train on, {len(judging)} held out; "
        f"{device_name(accelerator.device)}"
    )

    # 3. Training: L1 between the enlarged low and high.
    firsts = tests[::HELD_OUT_DRAWS]  # one degradation of each held-out photo, for the curve

    def held_out_psnr() -> float:
        return quality([upscale(model, t.low) for t in firsts], [t.high for t in firsts], scale).psnr

    with training_bar(console) as on_step:
        trained = train(
            model,
            convlora.parameters(model),
            Patches(pairs, patch=chosen.patch, batch=chosen.batch, seed=chosen.seed),
            Schedule(steps=chosen.steps, seconds=60 * chosen.minutes, rate=chosen.lr, warmup=chosen.warmup),
            accelerator,
            measure=held_out_psnr,
            on_step=on_step,
        )
    adapted = row("adapted", outputs(model))

    # 4. Merged: one fused weight a layer. Other programs get it as a plain network.
    convlora.merge(model)
    merged = row("merged", outputs(model), same=adapted)
    plain = convlora.remove(copy.deepcopy(model))
    network.save(plain, out / f"{stem}_merged.safetensors")
    foreign = ModelLoader(accelerator.device).load_from_file(out / f"{stem}_merged.safetensors").model
    elsewhere = row("in spandrel", outputs(foreign), same=adapted)
    convlora.unmerge(model)

    # 5. Saved, and loaded into a network that has never seen an adapter.
    convlora.save(model, out / "adapter.safetensors")
    fresh = network.load(chosen.base)[0].to(accelerator.device)
    convlora.load(fresh, out / "adapter.safetensors")
    reloaded = row("reloaded", outputs(fresh), same=adapted)

    # 6. Removed: the base again.
    convlora.remove(model)
    removed = row("removed", outputs(model), same=base_row)
    state = model.state_dict()
    restored = list(state) == list(base_state) and all(
        torch.equal(state[key], value) for key, value in base_state.items()
    )

    # 7. What came out.
    rows = [bicubic, base_row, adapted, merged, elsewhere, reloaded, removed]
    gain = adapted.quality.psnr - base_row.quality.psnr
    file_size = (out / "adapter.safetensors").stat().st_size
    title = f"{len(judging)} held-out photos, {HELD_OUT_DRAWS} draws of '{chosen.degradation}' each"
    console.print(quality_table(rows, base_row, title))
    console.print(
        f"{len(trained.losses)} steps in {trained.seconds:.0f} s; "
        f"adapter file {file_size:,} bytes, {file_size / chosen.base.stat().st_size:.1%} of the base's"
    )
    pictures = [
        (shown.name, [to_image(output) for output in shown.outputs[::HELD_OUT_DRAWS]])
        for shown in (bicubic, base_row, adapted)
    ]
    save_comparison(out / f"{stem}.png", [(t.name, t.high) for t in firsts], pictures, shave=scale)
    save_curve(out / f"{stem}_curve.png", trained, "held-out PSNR-Y (dB)")
    results = {
        "options": {name: value.name if isinstance(value, Path) else value for name, value in asdict(chosen).items()},
        "device": device_name(accelerator.device),
        "versions": {"torch": torch.__version__, "convlora": convlora.__version__},
        "training_photos": [photo.name for photo in training],
        "held_out_photos": [test.name for test in tests],  # in the order of each row's figures
        "layers": len(size.layers),
        "trained_parameters": size.trainable,
        "base_parameters": size.base,
        "steps": len(trained.losses),
        "training_seconds": round(trained.seconds, 1),
        "adapter_bytes": file_size,
        "gain_db": gain,
        "rows": [line.as_json() for line in rows],
        "curve": trained.measured,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"wrote {', '.join(sorted(path.name for path in out.iterdir()))} to {out}")

    # 8. What an adapter promises.
    checks = {
        f"merged equals adapted to {CLOSE}": merged.difference <= CLOSE,
        f"merged in spandrel equals adapted to {CLOSE}": elsewhere.difference <= CLOSE,
        "reloaded equals adapted bitwise": reloaded.difference == 0,
        "removal gives the base's outputs and weights bitwise": removed.difference == 0 and restored,
    }
    if promised is not None:
        checks[f"adapted gains {promised} dB over the base"] = gain >= promised
    broken = [check for check, holds in checks.items() if not holds]
    if broken:
        typer.echo(f"failed: {'; '.join(broken)}", err=True)
        raise typer.Exit(1)
    console.print(f"[green]{len(checks)} checks hold[/]: {'; '.join(checks)}")


def choose_photos(photos: Path | None, held_out: Path | None) -> tuple[list[Photo], list[Photo]]:
    """(training, held-out) photos, as the two options say."""
    training = bundled_photos()[0] if photos is None else read_folder(photos)
    if held_out is not None:
        return training, read_folder(held_out)
    if photos is None:
        return training, bundled_photos()[1]
    if len(training) < 2:
        raise InputError(f"photos {photos}: one photo only; give others by --held-out")
    return [photo for index, photo in enumerate(training) if index % 4 != 1], training[1::4]
