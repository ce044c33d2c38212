"""ConvLoRA's own paper in minutes on a CPU: a U-Net meets a second microscope, none of whose images has a label.

    python examples/segment.py

Aleem, Dietlmeier, Arazo and Little, "ConvLoRA and AdaBN based Domain Adaptation via Self-Training"
(arXiv 2402.04964), in the three stages of its Figure 1:

(a) a U-Net learns to segment images of the source domain, with labels;
(b) an early segmentation head learns the same from what the first blocks of the frozen encoder give;
(c) on images of the target domain, without labels, the head, now frozen, has to agree with the network's final
    output: cross-entropy of the head's prediction, with the output as pseudo-label. What learns is ConvLoRA of
    rank 2 in the encoder below the head. AdaBN gives every BatchNorm the statistics of the target domain.

As in the paper's code pseudo-labels are probabilities, not thresholded; no gradient goes through them here.

Side by side: AdaBN alone, ConvLoRA alone, both, the same with every weight below the head in place of ConvLoRA,
and how far labels would lead. The adapters sit on one base, switched by name. Each seed has images, a base and a
head of its own. Learning rates and numbers of steps were chosen with `--judge validation`: target images that
are neither learned from nor held out. The script exits with 1 if an output is not what it should be.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from promises import check_promises, is_default_run
from segmentation.cells import SOURCE, TARGET, draw
from segmentation.report import Comparison, Method, report
from segmentation.training import segment, train
from segmentation.unet import EARLY, EarlyHead, UNet, save_network
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.optim.swa_utils import update_bn

import convlora

ENCODER = [f"encoder.{block}.*" for block in range(EARLY + 1)]  # below the head
GAIN, MARGIN = 0.10, 0.03  # mean Dice that the default run promises of both: over the base, over AdaBN alone
# The first convolution, 12x1x3x3, has fewer weights than an adapter of it. The paper adapts it, and so does this.
warnings.filterwarnings("ignore", "inject: the adapter has more parameters", convlora.ConvLoRAWarning)


def compare(
    seed: int, *, images: int, judge: str, base_steps: int, head_steps: int, steps: int, out: Path
) -> Comparison:
    """Train a base, adapt it in every way, and see what an adapter promises."""
    torch.manual_seed(seed)
    source = draw(SOURCE, images, seed=10 * seed)
    target = draw(TARGET, images, seed=10 * seed + 1)
    batches = target.images.split(16)
    chosen = 10 * seed + (2 if judge == "validation" else 3)
    judged, same_tissue = draw(TARGET, 24, seed=chosen), draw(SOURCE, 24, seed=chosen)
    methods: list[Method] = []

    def evaluate(name: str, model: nn.Module, file: Path | None = None, trained: Iterable[Tensor] = ()) -> Tensor:
        logits = segment(model, judged.images)
        methods.append(Method(name, logits, judged.masks, sum(p.numel() for p in trained), file))
        return logits

    # (a) The base: source images, with labels.
    model = UNet()
    train(
        model.parameters(),
        lambda batch, masks: cross_entropy(model(batch), masks),
        *(source.images, source.masks), steps=base_steps, rate=1e-2, seed=seed,
    )  # fmt: skip
    methods.append(Method("base, source images", segment(model, same_tissue.images), judged.masks))
    base_state = copy.deepcopy(model.state_dict())
    save_network(model, out / f"base_{seed}.safetensors")
    base = evaluate("base", model, out / f"base_{seed}.safetensors", model.parameters())

    # (b) The early head: likewise, from features of the frozen encoder.
    head = EarlyHead(model.early_features(source.images[:1]).shape[1])
    model.requires_grad_(False)
    train(
        head.parameters(),
        lambda batch, masks: cross_entropy(head(model.early_features(batch)), masks),
        *(source.images, source.masks), steps=head_steps, rate=1e-2, seed=seed,
    )  # fmt: skip

    # (c) with AdaBN alone: an adapter whose update stays zero, with statistics of its own for every BatchNorm.
    convlora.inject(model, ENCODER, rank=1, name="adabn")
    update_bn(batches, model)
    convlora.save(model, out / f"adabn_{seed}.safetensors")
    evaluate("AdaBN", model, out / f"adabn_{seed}.safetensors")

    # (c) with ConvLoRA alone: BatchNorm goes on with the base's statistics.
    convlora.inject(model, ENCODER, rank=2, name="convlora", norm_statistics="frozen")
    convlora.activate(model, "convlora")
    parameters = convlora.parameters(model, "convlora")
    self_train(model, head, target.images, parameters, steps=steps, rate=3e-5, seed=seed)
    convlora.save(model, out / f"convlora_{seed}.safetensors", name="convlora")
    evaluate("ConvLoRA", model, out / f"convlora_{seed}.safetensors", parameters)

    # (c) with both: in training BatchNorm normalises by the batch, then by the statistics of all target images.
    convlora.inject(model, ENCODER, rank=2, name="both")
    convlora.activate(model, "both")
    parameters = convlora.parameters(model, "both")
    self_train(model, head, target.images, parameters, steps=steps, rate=2.5e-3, seed=seed)
    update_bn(batches, model)
    convlora.save(model, out / f"both_{seed}.safetensors", name="both")
    both = evaluate("ConvLoRA + AdaBN", model, out / f"both_{seed}.safetensors", parameters)

    # (c) with every weight that the loss reaches: those of the encoder below the head.
    whole = UNet()
    whole.load_state_dict(base_state)
    tuned = list(whole.encoder[: EARLY + 1].parameters())
    self_train(whole, head, target.images, tuned, steps=steps, rate=2e-3, seed=seed)
    update_bn(batches, whole)
    save_network(whole, out / f"all_weights_{seed}.safetensors")
    evaluate("all weights + AdaBN", whole, out / f"all_weights_{seed}.safetensors", tuned)

    # What nobody has: labels of the target images.
    labelled = UNet()
    labelled.load_state_dict(base_state)
    train(
        labelled.train().parameters(),
        lambda batch, masks: cross_entropy(labelled(batch), masks),
        *(target.images, target.masks), steps=steps, rate=3e-3, seed=seed,
    )  # fmt: skip
    update_bn(batches, labelled)
    evaluate("with target labels", labelled)

    # The file of a ConvLoRA with its statistics, on a network that has never seen an adapter; then merged for good.
    fresh = UNet()
    fresh.load_state_dict(base_state)
    convlora.load(fresh, out / f"both_{seed}.safetensors")
    reloaded = segment(fresh, judged.images)
    plain = convlora.remove(convlora.merge(fresh))
    merged = segment(plain, judged.images)

    # All adapters off, and all removed: the base, its statistics included.
    switched_off = segment(convlora.activate(model, []), judged.images)
    removed = segment(convlora.remove(model), judged.images)
    state = model.state_dict()
    promises = {
        "the file loaded into a fresh base gives the adapted output bitwise": torch.equal(reloaded, both),
        "merged equals adapted bitwise": torch.equal(merged, both),
        "with all adapters off the output is the base's bitwise": torch.equal(switched_off, base),
        "removal gives the base's output and state dict bitwise": torch.equal(removed, base)
        and list(state) == list(base_state)
        and all(torch.equal(state[name], value) for name, value in base_state.items()),
    }
    return Comparison(seed, same_tissue.images, judged, methods, promises)


def self_train(
    model: UNet,
    head: EarlyHead,
    images: Tensor,
    parameters: Iterable[nn.Parameter],
    *,
    steps: int,
    rate: float,
    seed: int,
) -> None:
    """Stage (c): the frozen head learns to say what the network says, by what changes below it."""

    def disagreement(batch: Tensor) -> Tensor:
        features, logits = model.features_and_logits(batch)
        return cross_entropy(head(features), torch.sigmoid(logits).detach())

    model.train()
    head.requires_grad_(False).eval()
    train(parameters, disagreement, images, steps=steps, rate=rate, seed=seed)


def main(
    context: typer.Context,
    seeds: Annotated[int, typer.Option(help="How often, from the images on.", min=1)] = 3,
    images: Annotated[int, typer.Option(help="Source images, and target images, to learn from.", min=8)] = 64,
    judge: Annotated[Literal["held-out", "validation"], typer.Option(help="Images that figures are of.")] = "held-out",
    base_steps: Annotated[int, typer.Option(help="Steps of the U-Net on the source.", min=1)] = 400,
    head_steps: Annotated[int, typer.Option(help="Steps of the early head.", min=1)] = 600,
    steps: Annotated[int, typer.Option(help="Steps of each adaptation.", min=1)] = 150,
    threads: Annotated[int, typer.Option(help="CPU threads; layers this small gain little by more.", min=1)] = 1,
    out: Annotated[Path, typer.Option(help="Folder for what the run writes.")] = Path("runs/segment"),
) -> None:
    """Adapt a U-Net to a second microscope without labels, as ConvLoRA's paper does.

    The images are drawn by the script; two to three minutes on a CPU. It writes bases and
    adapters, a picture and results.json.
    """
    torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    options = dict(images=images, judge=judge, base_steps=base_steps, head_steps=head_steps, steps=steps)
    began = time.perf_counter()
    comparisons = [compare(seed, **options, out=out) for seed in range(seeds)]
    rows = report(comparisons, options, time.perf_counter() - began, out)
    promises = {name: all(c.promises[name] for c in comparisons) for name in comparisons[0].promises}
    if is_default_run(context, ("threads", "out")):
        adapted = rows["ConvLoRA + AdaBN"]
        promises[f"both gain {GAIN} Dice over the base"] = adapted - rows["base"] >= GAIN
        promises[f"both gain {MARGIN} Dice over AdaBN alone"] = adapted - rows["AdaBN"] >= MARGIN
    check_promises(promises)


app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)
app.command()(main)

if __name__ == "__main__":
    app()
