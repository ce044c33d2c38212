"""Adapt a small super-resolution network to the photos of a cheap camera, in two minutes on a CPU.

    python examples/span.py

The network, a SPAN of 26 channels, has only seen clean bicubic input. Real input is blurred, noisy
and compressed. A ConvLoRA adapter on every convolution learns that from five photographs and is
judged on three others. The script then merges the adapter, saves and reloads it, hands the merged
network to other programs and removes the adapter, checking each time that the outputs are what
they should be; it exits with 1 if they are not.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from spandrel import ModelLoader
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
from sr.models import SPAN_TARGETS, SPAN_WEIGHTS, load_span, predict, save_span, upscale
from sr.report import (
    Row,
    device_name,
    make_row,
    one_line_errors,
    quality_table,
    save_comparison,
    save_curve,
    training_bar,
)
from sr.training import Schedule, make_accelerator, train

import convlora

HELD_OUT_SEED = 10**9  # held-out photos suffer degradations that training never sees
HELD_OUT_DRAWS = 4
PROMISED_GAIN = 0.3  # dB over the base, in the default run
CLOSE = 1e-5  # of full scale: what another order of summation may change

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
console = Console()


def option(panel: str, text: str, **more: Any) -> Any:
    """A command-line option with its help text, in a panel of --help."""
    return typer.Option(help=text, rich_help_panel=panel, **more)


NET, ADAPTER, TRAINING, OUTPUT = "Network and photos", "Adapter", "Training", "Machine and output"


@app.command()
@one_line_errors
def main(
    context: typer.Context,
    base: Annotated[Path, option(NET, "SPAN checkpoint, in train form or collapsed.")] = SPAN_WEIGHTS,
    photos: Annotated[Path | None, option(NET, "Folder to train on, else five photos of dependencies.")] = None,
    held_out: Annotated[
        Path | None,
        option(NET, "Folder to judge by, else every fourth of --photos or three of dependencies."),
    ] = None,
    degradation: Annotated[
        Literal["camera", "night", "clean"], option(NET, "What photos suffer; clean is bicubic reduction alone.")
    ] = "camera",
    draws: Annotated[int, option(NET, "Degradations of each training photo.", min=1)] = 8,
    targets: Annotated[list[str], option(ADAPTER, "Layers to adapt, a name pattern; may be repeated.")] = SPAN_TARGETS,
    rank: Annotated[int, option(ADAPTER, "Rank of each update.", min=1)] = 1,
    alpha: Annotated[float | None, option(ADAPTER, "Update scale times rank, else rank.")] = None,
    factors: Annotated[Literal["convlora", "locon"], option(ADAPTER, "Factorization.")] = "convlora",
    bias: Annotated[bool, option(ADAPTER, "Adapt the biases, too.")] = False,
    steps: Annotated[int, option(TRAINING, "Steps at most.", min=1)] = 300,
    minutes: Annotated[float, option(TRAINING, "Minutes at most; the schedule then shrinks to fit.", min=0.01)] = 3.0,
    lr: Annotated[float, option(TRAINING, "Highest rate; 2e-3 for convlora of rank 2, 1e-2 for locon.", min=0)] = 5e-3,
    warmup: Annotated[int, option(TRAINING, "Steps up to the highest rate.", min=0)] = 20,
    batch: Annotated[int, option(TRAINING, "Patches in a step.", min=1)] = 8,
    patch: Annotated[int, option(TRAINING, "Side of a low-resolution patch, pixels.", min=8)] = 48,
    seed: Annotated[int, option(TRAINING, "Of adapter, patches and degradations.", min=0)] = 0,
    device: Annotated[Literal["auto", "cpu", "cuda"], option(OUTPUT, "Where to compute.")] = "auto",
    threads: Annotated[int | None, option(OUTPUT, "CPU threads, else all.", min=1)] = None,
    out: Annotated[Path, option(OUTPUT, "Folder for what the run writes.")] = Path("runs/span"),
) -> None:
    """Adapt a SPAN super-resolution network to degraded photos with ConvLoRA.

    Without options it takes the weights in examples/weights and photographs that come with
    scikit-image and scikit-learn, and two minutes on two CPU cores. It writes the adapter, the
    merged network for spandrel (chaiNNer, ComfyUI), a picture, a training curve and results.json.
    """
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    accelerator = make_accelerator(device)
    out.mkdir(parents=True, exist_ok=True)

    # 1. The network and the photos, each as (low, high): what the camera gives, what was there.
    model, scale = load_span(base)
    model.to(accelerator.device)
    training, judging = choose_photos(photos, held_out)
    training = prepare(training, scale, least=patch * scale)
    judging = prepare(judging, scale, least=64)
    degrade = DEGRADATIONS[degradation]
    pairs = degraded_pairs(training, degrade, scale=scale, draws=draws, seed=seed * 10**5)
    tests = degraded_pairs(judging, degrade, scale=scale, draws=HELD_OUT_DRAWS, seed=HELD_OUT_SEED)
    highs = [test.high for test in tests]

    def row(name: str, outputs: list[torch.Tensor], same: Row | None = None) -> Row:
        return make_row(name, outputs, highs, scale, same)

    def outputs(network: torch.nn.Module) -> list[torch.Tensor]:
        return [predict(network, test.low) for test in tests]

    bicubic = row("bicubic", [to_tensor(enlarge(test.low, scale)) for test in tests])
    base_row = row("base", outputs(model))
    base_state = {key: value.clone() for key, value in model.state_dict().items()}

    # 2. Adapters on every layer that the patterns select; everything else is frozen.
    convlora.inject(model, targets=targets, rank=rank, alpha=alpha, factors=factors, bias=bias)
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
            Patches(pairs, patch=patch, batch=batch, seed=seed),
            Schedule(steps=steps, seconds=60 * minutes, rate=lr, warmup=warmup),
            accelerator,
            measure=held_out_psnr,
            on_step=on_step,
        )
    adapted = row("adapted", outputs(model))

    # 4. Merged: one fused weight a layer. Other programs get it as a plain SPAN.
    convlora.merge(model)
    merged = row("merged", outputs(model), same=adapted)
    plain = convlora.remove(copy.deepcopy(model))
    save_span(plain, out / "span_merged.safetensors")
    foreign = ModelLoader(accelerator.device).load_from_file(out / "span_merged.safetensors").model
    elsewhere = row("in spandrel", outputs(foreign), same=adapted)
    convlora.unmerge(model)

    # 5. Saved, and loaded into a network that has never seen an adapter.
    convlora.save(model, out / "adapter.safetensors")
    fresh = load_span(base)[0].to(accelerator.device)
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
    title = f"{len(judging)} held-out photos, {HELD_OUT_DRAWS} draws of '{degradation}' each"
    console.print(quality_table(rows, base_row, title))
    console.print(
        f"{len(trained.losses)} steps in {trained.seconds:.0f} s; "
        f"adapter file {file_size:,} bytes, {file_size / base.stat().st_size:.1%} of the base's"
    )
    pictures = [
        (shown.name, [to_image(output) for output in shown.outputs[::HELD_OUT_DRAWS]])
        for shown in (bicubic, base_row, adapted)
    ]
    save_comparison(out / "span.png", [(t.name, t.high) for t in firsts], pictures, shave=scale)
    save_curve(out / "span_curve.png", trained, "held-out PSNR-Y (dB)")
    results = {
        "options": {n: v.name if isinstance(v, Path) else v for n, v in context.params.items()},
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
    if is_default_run(context):
        checks[f"adapted gains {PROMISED_GAIN} dB over the base"] = gain >= PROMISED_GAIN
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


def is_default_run(context: typer.Context) -> bool:
    """Whether no option was given that changes what is learned."""
    free = {"seed", "device", "threads", "out"}
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return all(name in free or source is None or source.name == "DEFAULT" for name, source in sources.items())


if __name__ == "__main__":
    app()
