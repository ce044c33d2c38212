"""What a training step costs with adapters, counted: operations, memory kept for backward, optimizer, kernels.

    python benchmarks/cost.py

Nothing is timed and nothing computed: networks and inputs are on the meta device, where every layer takes the path that
it takes on every device but the CPU. So networks of gigabytes are counted on any machine, in minutes, and the figures
are the same on each. A step is forward and backward to what is trained and to the input; the frozen network is what it
costs without any adapter.

Attention is counted as plain matrix products, as the meta device has it: kernels like flash attention keep less, in all
columns alike.
"""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import RESULTS, Section, console, facts_of_run, write_results
from contestants import floor, full, lora, lycoris, ours, peft
from counting import StepCost, count_step
from spandrel.architectures.ESRGAN import ESRGAN
from spandrel.architectures.SwinIR import SwinIR
from sr.models import new_span
from torch import Tensor, nn
from torchvision.models import resnet50

Layers = (nn.Conv2d, nn.Linear)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CONTESTANTS: dict[str, Callable[[nn.Module, list[str], int], nn.Module]] = {
    "frozen": floor,
    "full": full,
    "PEFT": peft,
    "LyCORIS": lycoris,
    "loralib": lora,
    "convlora, LoCon factors": ours("locon"),
    "convlora, ConvLoRA factors": ours("convlora"),
}
OWN = ("frozen", "full", "convlora, LoCon factors", "convlora, ConvLoRA factors")  # which may not fail


@dataclass(frozen=True)
class Net:
    """A network, the shapes of its inputs (the first needs a gradient), and the rank of its adapters."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    rank: int
    call: Callable[..., Tensor] = lambda model, x: model(x)
    quick: bool = False


class Chain(nn.Module):
    """Eight layers of a kind, one after the other."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(8))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def sdxl() -> nn.Module:
    """The UNet of Stable Diffusion XL, 2.6 billion parameters, by its published configuration."""
    from diffusers import UNet2DConditionModel
    from diffusers.utils.logging import set_verbosity_error

    set_verbosity_error()
    return UNet2DConditionModel(
        sample_size=128,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(320, 640, 1280),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def denoise(model: Any, latents: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    """A step of diffusion at the size of the original, (batch, 4, height, width) to the same."""
    batch = latents.shape[0]
    when = torch.zeros(batch, device=latents.device)
    beside = {"text_embeds": pooled, "time_ids": torch.zeros(batch, 6, device=latents.device, dtype=latents.dtype)}
    return model(latents, when, encoder_hidden_states=text, added_cond_kwargs=beside).sample


def vit() -> nn.Module:
    from timm import create_model

    return create_model("vit_large_patch16_224")


def swinir() -> nn.Module:
    with torch.device("cpu"):  # it reads what it computes for its own setup
        return SwinIR(
            img_size=48, embed_dim=180, depths=[6] * 6, num_heads=[6] * 6, window_size=8, mlp_ratio=2.0, upscale=4,
            upsampler="pixelshuffle",
        )  # fmt: skip


NETS = {
    "8 convolutions 1280→1280, 3×3": Net(
        lambda: Chain(lambda: nn.Conv2d(1280, 1280, 3, padding=1)), ((2, 1280, 16, 16),), 16, quick=True
    ),
    "8 Linear 4096→4096": Net(lambda: Chain(lambda: nn.Linear(4096, 4096)), ((512, 4096),), 16, quick=True),
    "8 convolutions 64→64, 3×3": Net(
        lambda: Chain(lambda: nn.Conv2d(64, 64, 3, padding=1)), ((16, 64, 64, 64),), 16, quick=True
    ),
    "SDXL UNet": Net(sdxl, ((2, 4, 64, 64), (2, 77, 2048), (2, 1280)), 16, denoise),
    "ViT-L/16": Net(vit, ((8, 3, 224, 224),), 16),
    "ResNet-50": Net(resnet50, ((16, 3, 224, 224),), 16),
    "SwinIR-M": Net(swinir, ((4, 3, 48, 48),), 4),
    "RRDB, 23 blocks (ESRGAN)": Net(lambda: ESRGAN(num_filters=64, num_blocks=23), ((4, 3, 32, 32),), 4),
    "SPAN-48": Net(lambda: new_span(48), ((4, 3, 48, 48),), 4, quick=True),
}


def build(net: Net, dtype: torch.dtype) -> nn.Module:
    """The network on the meta device, in eval mode, and without random parts."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # spandrel's SwinIR calls meshgrid the old way
        with torch.device("meta"):
            model = net.make()
    for module in model.modules():
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return model.to("meta").to(dtype).eval()


def cost_of(net: Net, contestant: str, dtype: torch.dtype) -> StepCost:
    """What a step of a network costs with all its convolutions and Linear layers trained in a way."""
    model = build(net, dtype)
    names = [name for name, module in model.named_modules() if isinstance(module, Layers)]
    with torch.device("meta"):
        model = CONTESTANTS[contestant](model, names, net.rank).to("meta")
    model.eval()
    if contestant == "loralib":  # its layers have the weight's dtype, and are merged in eval mode
        model.to(dtype)
        for layer in model.modules():
            layer.train(type(layer).__module__.startswith("loralib"))
    first, *others = (torch.empty(shape, dtype=dtype, device="meta") for shape in net.shapes)
    first.requires_grad_()

    def loss() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return net.call(model, first.clone(), *others).square().mean()

    return count_step(model, loss)


def table(dtype: str, names: Sequence[str]) -> Section:
    section = Section(
        f"A training step in {dtype}",
        "Forward and backward to what is trained and to the input. TFLOP: floating-point operations, and over those of"
        " the frozen network. Kept: MiB in memory between forward and backward, beside the Parameters, and beyond those"
        " of the frozen network. Adam: MiB of its two numbers for each that is trained. Kernels: operations that"
        " compute something. LoCon factors are those of PEFT and LyCORIS; ConvLoRA factors those of loralib.",
        ("network", "rank", "", "TFLOP", "over frozen", "kept", "beyond frozen", "trained", "Adam", "kernels"),
    )
    for name in names:
        net, frozen = NETS[name], None
        for contestant in CONTESTANTS:
            try:
                cost = cost_of(net, contestant, DTYPES[dtype])
            except Exception as error:
                if contestant in OWN:
                    raise
                why = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
                section.add(name, str(net.rank), contestant, "fails", *[""] * 6, net=name, way=contestant, fails=why)
                continue
            frozen = frozen or cost
            section.add(
                name, str(net.rank), contestant, f"{cost.flops / 1e12:.3f}", f"{cost.flops / frozen.flops:.3f}",
                mebibytes(cost.kept), mebibytes(cost.kept - frozen.kept), f"{cost.trained:,}",
                mebibytes(cost.optimizer), f"{cost.kernels:,}", net=name, rank=net.rank, way=contestant, **asdict(cost),
            )  # fmt: skip
            console.print(dtype, *section.rows[-1], sep=" | ")
    return section


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f}"


def main(
    net: Annotated[list[str] | None, typer.Option(help="Networks, else all.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Small networks alone; writes nothing.")] = False,
    out: Annotated[Path, typer.Option(help="Results as JSON, and beside it as Markdown.")] = RESULTS / "cost.json",
) -> None:
    """The costs of a training step with adapters beside the frozen net, full fine-tuning and other libraries."""
    torch.set_num_threads(1)
    logging.getLogger("LyCORIS").setLevel(logging.WARNING)
    names = net or [name for name, each in NETS.items() if each.quick or not quick]
    packages = ("torch", "convlora", "peft", "lycoris-lora", "loralib", "spandrel", "torchvision")
    facts = facts_of_run(*packages, *(() if quick else ("diffusers", "timm")))
    sections = [table(dtype, names) for dtype in DTYPES]
    for section in sections:
        section.show()
    if not quick:
        write_results(out, shlex.join(["python", "benchmarks/cost.py", *sys.argv[1:]]), facts, sections)


if __name__ == "__main__":
    typer.run(main)
