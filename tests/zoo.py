"""Every architecture that spandrel ships, small: a class, hyperparameters and input shapes each.

A name is `<package in spandrel.architectures>`, or `<package>/<variant>` where a package has several networks.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import convlora
from convlora.layer.adapted import why_not


@dataclass(frozen=True)
class Case:
    """How to build one architecture.

    Args:
        network: the class in the package.
        options: its hyperparameters; those left out have their defaults.
        shapes: of the inputs.
        overwritten: patterns of the layers whose base weight the network itself overwrites.
        unread: patterns of the layers whose weight no forward reads.
        sparse: patterns of the layers that training reads, and evaluation only where a router picks them.
        discarded: patterns of the layers that are read, but whose result reaches no output.
        shrink: a further step for what has no hyperparameter.
    """

    network: str
    options: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ((1, 3, 16, 16),)
    overwritten: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    sparse: tuple[str, ...] = ()
    discarded: tuple[str, ...] = ()
    shrink: Callable[[nn.Module], None] = lambda model: None


def _small_lama(model: Any) -> None:
    model.model = type(model.model)(4, 3, ngf=8, n_blocks=2)


SMALL, MEDIUM = ((1, 3, 8, 8),), ((1, 3, 40, 40),)
CUGAN = ((1, 3, 32, 32),)

ARCHITECTURES: dict[str, Case] = {
    "ATD": Case(
        "ATD",
        dict(img_size=16, embed_dim=16, depths=(2,), num_heads=(2,), window_size=8, category_size=32, num_tokens=8,
             reducted_dim=4, upscale=2, upsampler="pixelshuffledirect"),
    ),
    "AuraSR": Case(
        "AuraSR",
        dict(dim=16, image_size=64, input_image_size=16, style_network=dict(dim_in=8, dim_out=16, depth=2),
             up_dim_mults=(1, 1, 2, 2, 2), down_dim_mults=(2, 2, 2), attn_depths=(1,) * 5, mid_attn_depth=1,
             num_conv_kernels=2, self_attn_dim_head=8, self_attn_heads=2),
    ),
    "CRAFT": Case("CRAFT", dict(embed_dim=64, depths=[1], num_heads=[2], upscale=2)),
    "Compact": Case("Compact", dict(num_feat=16, num_conv=3, upscale=2), SMALL),
    "DAT": Case(  # two images: its training mode normalises one pixel per channel over the batch
        "DAT", dict(img_size=16, embed_dim=64, depth=[2], num_heads=[2], upscale=2), ((2, 3, 16, 16),)
    ),
    "DCTLSA": Case("DCTLSA", dict(nf=20, upscale=2)),
    "DITN": Case("DITN", dict(dim=12, ITL_blocks=1, SAL_blocks=1, upscale=2)),
    "DRCT": Case(
        "DRCT",
        dict(img_size=16, embed_dim=12, depths=(2,), num_heads=(2,), window_size=8, upscale=2,
             upsampler="pixelshuffle", gc=4),
    ),
    "DRUNet": Case("DRUNet", dict(in_nc=4, out_nc=3, nc=[4, 8, 8, 16], nb=1), ((1, 4, 16, 16),)),
    "DnCNN": Case("DnCNN", dict(in_nc=3, out_nc=3, nc=8, nb=4), SMALL),
    "ESRGAN": Case("ESRGAN", dict(num_filters=8, num_blocks=2), SMALL),
    "FBCNN": Case("FBCNN", dict(nc=[4, 8, 8, 512], nb=1)),
    "FDAT": Case("FDAT", dict(embed_dim=16, num_groups=1, depth_per_group=2, num_heads=2, mid_dim=8, scale=2),
                 unread=("blocks.[02].inter.sg.*", "blocks.[13].inter.cg.*")),
    "FFTformer": Case("FFTformer", dict(dim=8, num_blocks=[1, 1, 1], num_refinement_blocks=1), ((1, 3, 32, 32),),
                      unread=("reduce_chan_level2",)),
    "GFPGAN": Case("GFPGAN", dict(out_size=16, num_style_feat=16, num_mlp=2, channel_multiplier=1, narrow=1 / 32),
                   unread=("style_mlp.*",)),
    "GRL": Case(
        "GRL",
        dict(img_size=16, embed_dim=36, depths=[2], num_heads_window=[2], num_heads_stripe=[2], mlp_ratio=2.0,
             upscale=2, upsampler="pixelshuffle", local_connection=True),
    ),
    "HAT": Case(
        "HAT",
        dict(img_size=16, embed_dim=12, depths=(2,), num_heads=(2,), window_size=8, squeeze_factor=4, upscale=2,
             num_feat=8),
    ),
    "HVICIDNet": Case("HVICIDNet", dict(channels=[4, 4, 8, 16]), discarded=("I_LCA5.*",)),
    "IPT": Case("IPT", dict(patch_size=12, n_feats=8, num_heads=2, num_layers=1), ((1, 3, 12, 12),)),
    "KBNet/l": Case("KBNet_l", dict(dim=24, num_blocks=[1] * 4, num_refinement_blocks=1)),
    "KBNet/s": Case("KBNet_s", dict(width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1])),
    "LaMa": Case("LaMa", dict(in_nc=4), ((1, 3, 16, 16), (1, 1, 16, 16)), shrink=_small_lama),
    "MMRealSR": Case(
        "MMRealSR",
        dict(num_in_ch=3, num_out_ch=3, num_feat=8, num_block=1, num_grow_ch=4, num_feats=[8, 8, 8, 512],
             num_blocks=[1] * 4),
    ),
    "MixDehazeNet": Case("MixDehazeNet", dict(embed_dims=[8, 16, 32, 16, 8], depths=[1] * 5), MEDIUM),
    "MoESR": Case("MoESR", dict(dim=16, n_blocks=1, n_block=1, scale=2, upsample_dim=8), SMALL),
    "MoSR": Case("MoSR", dict(n_block=2, dim=16, upscale=2, drop_path=0.1), SMALL),
    "NAFNet": Case("NAFNet", dict(width=8, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]), SMALL),
    "OmniSR": Case("OmniSR", dict(num_feat=16, up_scale=2)),
    "PLKSR": Case("PLKSR", dict(dim=16, n_blocks=2, upscaling_factor=2, kernel_size=7), SMALL),
    "PLKSR/real": Case(
        "RealPLKSR",
        dict(dim=16, n_blocks=2, upscaling_factor=2, kernel_size=7, dropout=0.1, dysample=True), SMALL,
    ),
    "RCAN": Case("RCAN", dict(scale=2, n_resgroups=1, n_resblocks=2, n_feats=16, reduction=4), SMALL),
    "RGT": Case("RGT", dict(img_size=16, embed_dim=64, depth=[2], num_heads=[2], mlp_ratio=2.0, upscale=2)),
    "RealCUGAN/2x": Case("UpCunet2x", shapes=CUGAN),
    "RealCUGAN/3x": Case("UpCunet3x", dict(pro=True), CUGAN),
    "RealCUGAN/4x": Case("UpCunet4x", shapes=CUGAN),
    "RealCUGAN/fast": Case("UpCunet2x_fast", shapes=MEDIUM),
    "RestoreFormer": Case(
        "RestoreFormer",
        dict(n_embed=16, embed_dim=32, ch=32, ch_mult=(1, 1), num_res_blocks=1, attn_resolutions=(8,), resolution=16,
             z_channels=32, head_size=2),
    ),
    "RetinexFormer": Case("RetinexFormer", dict(n_feat=8, stage=1)),
    "SAFMN": Case("SAFMN", dict(dim=8, n_blocks=2, upscaling_factor=2)),
    "SAFMNBCIE": Case("SAFMNBCIE", dict(dim=8, n_blocks=1, num_layers=2)),
    "SCUNet": Case("SCUNet", dict(config=[1] * 7, drop_path_rate=0.1), MEDIUM),
    "SPAN": Case("SPAN", dict(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2), SMALL,
                 overwritten=("eval_conv",)),
    "SeemoRe": Case("SeemoRe", dict(scale=2, num_experts=2, num_layers=1, embedding_dim=16),
                    sparse=("moe_layer.experts.*",)),
    "SwiftSRGAN": Case("SwiftSRGAN", dict(num_channels=8, num_blocks=2, upscale_factor=2), SMALL),
    "Swin2SR": Case(
        "Swin2SR",
        dict(img_size=16, embed_dim=12, depths=[2], num_heads=[2], window_size=8, upscale=2,
             upsampler="pixelshuffledirect"),
    ),
    "SwinIR": Case(
        "SwinIR",
        dict(img_size=16, embed_dim=12, depths=[2], num_heads=[2], window_size=8, upscale=2,
             upsampler="pixelshuffledirect"),
    ),
    "Uformer": Case("Uformer", dict(img_size=128, embed_dim=4, depths=[1] * 9, num_heads=[1] * 9), ((1, 3, 128, 128),)),
}  # fmt: skip

LEFT_OUT: dict[str, str] = {}  # architecture -> why it has no case


def shipped() -> set[str]:
    """The architectures that the installed spandrel has."""
    import spandrel.architectures

    return {m.name for m in pkgutil.iter_modules(spandrel.architectures.__path__) if not m.name.startswith("__")}


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network with inputs for it, the same ones at every call.

    Constants (zero gains, unit norms) get random values: a fresh network would hide whole branches behind zeros.
    """
    case = ARCHITECTURES[name]
    package = importlib.import_module(f"spandrel.architectures.{name.split('/')[0]}")
    torch.manual_seed(0)
    model: nn.Module = getattr(package, case.network)(**case.options)
    case.shrink(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model, tuple(torch.rand(shape) for shape in case.shapes)


def run(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """All output tensors. Seeded, and on copies: some networks draw noise, some scale their input in place."""
    torch.manual_seed(1)
    return tensors(model(*(x.clone() for x in inputs)))


def tensors(output: Any) -> list[Tensor]:
    """The tensors of a nested output, in order."""
    if isinstance(output, Tensor):
        return [output]
    return [t for part in output for t in tensors(part)] if isinstance(output, list | tuple) else []


def adaptable(name: str, module: nn.Module) -> bool:
    """A target: every layer that can be adapted."""
    return why_not(module) is None


def adapted(name: str, **options: Any) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network with an adapter on every layer but those that it overwrites itself."""
    model, inputs = build(name)
    return inject(model, exclude=ARCHITECTURES[name].overwritten, **options), inputs


def inject(model: nn.Module, **options: Any) -> nn.Module:
    """Inject on every layer that can be adapted."""
    return convlora.inject(model, **{"targets": adaptable, "rank": 1, **options})
