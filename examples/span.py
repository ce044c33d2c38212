"""Adapt a small super-resolution network to the photos of a cheap camera, in two minutes on a CPU.

    python examples/span.py

The network, a SPAN of 26 channels, has only seen clean bicubic input. Real input is blurred, noisy
and compressed. A ConvLoRA adapter on every convolution learns that from five photographs and is
judged on three others. `adapt` is the adapter's whole life, top to bottom: inject, parameters, save,
merge, remove. Each time it checks that the outputs are what they should be; the script exits with 1
if they are not. Options and their defaults are in sr/command.py; swinir.py and rrdb.py call `adapt`
with other networks.
"""

from __future__ import annotations

import copy

from promises import check_promises
from spandrel import ModelLoader
from sr.command import Options, make_app
from sr.data import Patches, choose_photos, degraded_pairs
from sr.degradations import DEGRADATIONS
from sr.evaluation import TOLERANCE, HeldOutSet
from sr.models import equal_states
from sr.networks import NETWORKS, Network
from sr.report import report_run, show_sizes, training_bar
from sr.training import Schedule, set_up_run, train

import convlora

HELD_OUT_SEED, HELD_OUT_DRAWS = 10**9, 4  # held-out photos suffer degradations that training never sees


def adapt(network: Network, options: Options, promised: float | None) -> None:
    """Adapt a network as the options say, show what came out and write it to `options.out`.

    Raises:
        typer.Exit: an output is not what it should be, or the gain over the base is below `promised` (dB).
    """
    accelerator = set_up_run(options.out, device=options.device, seed=options.seed, threads=options.threads)
    device = accelerator.device
    adapter_file = options.out / "adapter.safetensors"
    merged_file = options.out / f"{network.stem}_merged.safetensors"

    # 0. The base network; and photos, each as a pair: what the camera gives (low), what was there (high).
    model, scale = network.load(options.base)
    model.to(device)
    degrade = DEGRADATIONS[options.degradation]
    photos, others = choose_photos(options.photos, options.held_out)
    pairs = degraded_pairs(
        photos, degrade, scale=scale, draws=options.draws, seed=options.seed * 10**5, least=options.patch * scale
    )
    other_pairs = degraded_pairs(others, degrade, scale=scale, draws=HELD_OUT_DRAWS, seed=HELD_OUT_SEED)
    held_out = HeldOutSet(other_pairs, scale, HELD_OUT_DRAWS)
    bicubic = held_out.evaluate_bicubic()
    base = held_out.evaluate("base", model)
    base_state = copy.deepcopy(model.state_dict())

    # 1. Inject: adapters, in place, on every layer that the targets (name patterns) select; all else is frozen.
    convlora.inject(
        model, options.targets, rank=options.rank, alpha=options.alpha, factors=options.factors, bias=options.bias
    )
    sizes = show_sizes(model, f"{len(photos)} photos to train on, {len(others)} held out", device)

    # 2. Parameters: those of the adapters, for the optimizer. The loss is L1 between the enlarged low and high.
    with training_bar() as on_step:
        trained = train(
            model,
            convlora.parameters(model),
            Patches(pairs, patch=options.patch, batch=options.batch, seed=options.seed),
            Schedule(steps=options.steps, seconds=60 * options.minutes, rate=options.lr, warmup=options.warmup),
            accelerator,
            measure=lambda: held_out.psnr(model),
            on_step=on_step,
        )
    adapted = held_out.evaluate("adapted", model)

    # 3. Save: the adapter alone, some kilobytes. It loads into a network that has never seen one.
    convlora.save(model, adapter_file)
    fresh = network.load(options.base)[0].to(device)
    convlora.load(fresh, adapter_file)
    reloaded = held_out.evaluate("reloaded", fresh, same=adapted)

    # 4. Merge: one fused weight a layer. Without its adapter that is a plain network, which other programs load.
    convlora.merge(model)
    merged = held_out.evaluate("merged", model, same=adapted)
    plain = convlora.remove(copy.deepcopy(model))
    network.save(plain, merged_file)
    foreign = ModelLoader(device).load_from_file(merged_file).model
    in_spandrel = held_out.evaluate("in spandrel", foreign, same=adapted)

    # 5. Remove, not merged: the base again, bit by bit.
    convlora.unmerge(model)
    convlora.remove(model)
    removed = held_out.evaluate("removed", model, same=base)
    restored = equal_states(model.state_dict(), base_state)

    # What came out, and what an adapter promises.
    rows = [bicubic, base, adapted, merged, in_spandrel, reloaded, removed]
    report_run(network.stem, options, device, sizes, photos, held_out, trained, rows)
    promises = {
        f"merged equals adapted to {TOLERANCE}": merged.difference <= TOLERANCE,
        f"merged in spandrel equals adapted to {TOLERANCE}": in_spandrel.difference <= TOLERANCE,
        "reloaded equals adapted bitwise": reloaded.difference == 0,
        "removal gives the base's outputs and weights bitwise": removed.difference == 0 and restored,
    }
    if promised is not None:
        promises[f"adapted gains {promised} dB over the base"] = adapted.gain_over(base) >= promised
    check_promises(promises)


app = make_app(adapt, NETWORKS["span"])

if __name__ == "__main__":
    app()
