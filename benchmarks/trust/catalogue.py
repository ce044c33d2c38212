"""The networks of other people on which the life of an adapter is tried: how to build each, small, and what it takes.

From torchvision, timm (one of each of its modules), diffusers, transformers, torch.nn itself and, by `tests/zoo.py`,
spandrel. Nothing is downloaded: all weights are random. `LEFT_OUT` says what is not here and why.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import zoo
from torch import Tensor, nn

LIBRARIES = ("torch", "torchvision", "timm", "diffusers", "transformers", "spandrel")
LEFT_OUT = {
    "timm/deepseek_vit": "its smallest has 412 M parameters",
    "timm/gemma4_vit": "its smallest has 167 M parameters",
    "timm/nasnet": "its smallest has 89 M parameters, on 331×331 pixels",
    "timm/pnasnet": "its smallest has 86 M parameters, on 331×331 pixels",
    "timm/qwen3_vit": "its smallest has 87 M parameters, on 768×768 pixels",
}


@dataclass(frozen=True)
class NetworkCase:
    """A network. `inputs` gives positional and keyword arguments of its forward; both are made right after seeding."""

    library: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]]

    def build(self) -> nn.Module:
        """The network, the same at every call.

        Constants (zero gains, unit norms) get random values: a fresh network would hide whole branches behind zeros.
        """
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other people's constructors
            model = self.make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() and bool((parameter == parameter.flatten()[0]).all()):
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    def seeded_inputs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        torch.manual_seed(1)
        return self.inputs()


def inputs_of(*arguments: Any, **keywords: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return arguments, keywords


def images(size: int, number: int = 2, channels: int = 3) -> Callable[[], Any]:
    return lambda: inputs_of(torch.rand(number, channels, size, size))


def network_cases(libraries: tuple[str, ...] = LIBRARIES) -> list[NetworkCase]:
    """All networks of the libraries that are installed."""
    return [case for library in libraries if importlib.util.find_spec(library) for case in _OF[library]()]


# --- torch.nn: modules that take weights of others themselves -----------------------------------------------------


class Recurrent(nn.Module):
    """An LSTM, whose own weights are no layer's, between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.lstm, self.after = nn.Linear(8, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.lstm(self.before(x))[0])  # type: ignore[no-any-return]


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def _nested_encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), 2)


def _padded() -> Any:
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[1, 4:] = True
    return inputs_of(torch.randn(2, 7, 16), src_key_padding_mask=mask)


def _torch() -> Iterator[NetworkCase]:
    def tokens(features: int) -> Any:
        return lambda: inputs_of(torch.randn(2, 7, features))

    yield NetworkCase("torch", "nn.LSTM between layers", Recurrent, tokens(8))
    yield NetworkCase("torch", "nn.MultiheadAttention", Attention, tokens(16))
    yield NetworkCase("torch", "nn.MultiheadAttention, no bias", lambda: Attention(bias=False), tokens(16))
    yield NetworkCase(
        "torch", "nn.MultiheadAttention, kdim", lambda: Attention(kdim=16, vdim=16, add_bias_kv=True), tokens(16)
    )
    yield NetworkCase("torch", "nn.TransformerEncoder", _encoder, tokens(16))
    yield NetworkCase("torch", "nn.TransformerEncoder, nested tensors", _nested_encoder, _padded)
    yield NetworkCase(
        "torch", "nn.Transformer", lambda: nn.Transformer(16, 4, 1, 1, 32, 0.0, batch_first=True),
        lambda: inputs_of(torch.randn(2, 7, 16), torch.randn(2, 5, 16)),
    )  # fmt: skip


# --- torchvision --------------------------------------------------------------------------------------------------

_CLASSIFIERS = {  # builder -> size of the images
    "alexnet": 64, "convnext_tiny": 32, "densenet121": 32, "efficientnet_b0": 32, "efficientnet_v2_s": 32,
    "googlenet": 64, "mnasnet0_5": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32, "regnet_y_400mf": 32, "resnet18": 32, "resnet50": 32, "resnext50_32x4d": 32,
    "shufflenet_v2_x0_5": 32, "squeezenet1_1": 64, "swin_t": 64, "swin_v2_t": 64,
}  # fmt: skip
_SEGMENTATION = ("deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large")
_DETECTORS = ("FCOS", "FasterRCNN", "MaskRCNN", "RetinaNet")  # on a small backbone
_FEW = {"rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}
_VIDEO = ("mc3_18", "r2plus1d_18", "r3d_18")


def _detected(small: int) -> Callable[[], Any]:
    """Two images with a target each, which training takes and evaluation leaves aside."""

    def inputs() -> Any:
        boxes = torch.tensor([[4.0, 6.0, 40.0, 44.0], [20.0, 10.0, 60.0, 50.0]])
        target = {
            "boxes": boxes, "labels": torch.tensor([1, 1]), "masks": torch.ones(2, small, small, dtype=torch.uint8),
        }  # fmt: skip
        return inputs_of([torch.rand(3, small, small) for _ in range(2)], [dict(target) for _ in range(2)])

    return inputs


def _torchvision() -> Iterator[NetworkCase]:
    from torchvision import models

    def case(name: str, inputs: Any, **options: Any) -> NetworkCase:
        return NetworkCase("torchvision", name, lambda: models.get_model(name, weights=None, **options), inputs)

    for name, size in _CLASSIFIERS.items():
        quiet = {"init_weights": False} if name == "googlenet" else {}  # SciPy's, and slow
        yield case(name, images(size), **quiet)
    small = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}
    yield NetworkCase("torchvision", "VisionTransformer", lambda: models.VisionTransformer(**small), images(32))
    tiny = {"input_size": (64, 64), "stem_channels": 16, "partition_size": 2, "block_channels": [16, 32],
            "block_layers": [1, 1], "head_dim": 8, "stochastic_depth_prob": 0.1}  # fmt: skip
    yield NetworkCase("torchvision", "MaxVit", lambda: models.MaxVit(**tiny), images(64))
    for name in _SEGMENTATION:
        yield case(name, images(64), weights_backbone=None, num_classes=4)
    for name in _DETECTORS:
        yield NetworkCase("torchvision", name, functools.partial(_detector, name), _detected(64))
    yield case("ssdlite320_mobilenet_v3_large", _detected(64), weights_backbone=None, num_classes=3)
    yield NetworkCase("torchvision", "resnet_fpn_backbone", _backbone, images(64))
    for name in _VIDEO:
        yield case(name, lambda: inputs_of(torch.rand(2, 3, 4, 32, 32)), num_classes=4)
    yield case("swin3d_t", lambda: inputs_of(torch.rand(1, 3, 4, 32, 32)), num_classes=4)
    yield case("raft_small", lambda: inputs_of(torch.rand(1, 3, 128, 128), torch.rand(1, 3, 128, 128), 2))


def _backbone() -> nn.Module:
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    return resnet_fpn_backbone(backbone_name="resnet18", weights=None)  # type: ignore[no-any-return]


def _detector(name: str) -> nn.Module:
    from torchvision.models import detection

    few = _FEW if "RCNN" in name else {}
    return getattr(detection, name)(_backbone(), num_classes=3, min_size=64, max_size=64, **few)  # type: ignore


# --- timm: the smallest of each of its modules --------------------------------------------------------------------

_NARROW = {"depth": 2, "embed_dim": 48, "num_heads": 3}
_TIMM: dict[str, tuple[str, int, dict[str, Any]]] = {  # module -> model, size of the images, options
    "beit": ("beit_base_patch16_224", 224, _NARROW),
    "byoanet": ("eca_halonext26ts", 256, {}),
    "byobnet": ("test_byobnet", 64, {}),
    "cait": ("cait_xxs24_224", 224, {"depth": 2, "depth_token_only": 1}),
    "coat": ("coat_tiny", 224, {"serial_depths": (1, 1, 1, 1), "parallel_depth": 1}),
    "convit": ("convit_tiny", 224, {"depth": 3, "local_up_to_layer": 2}),
    "convmixer": ("convmixer_768_32", 64, {}),
    "convnext": ("test_convnext", 64, {}),
    "cpubone": ("cpubone_nano", 64, {}),
    "crossvit": ("crossvit_tiny_240", 240, {}),
    "csatv2": ("csatv2", 512, {}),
    "cspnet": ("cs3darknet_focus_s", 64, {}),
    "cspnext": ("cspnext_tiny", 64, {}),
    "davit": ("davit_tiny", 64, {}),
    "deit": ("deit_tiny_distilled_patch16_224", 224, _NARROW),
    "densenet": ("densenet121", 64, {}),
    "dla": ("dla34", 64, {}),
    "dpn": ("dpn48b", 64, {}),
    "edgenext": ("edgenext_xx_small", 64, {}),
    "efficientformer": ("efficientformer_l1", 224, {}),
    "efficientformer_v2": ("efficientformerv2_s0", 224, {}),
    "efficientnet": ("test_efficientnet", 64, {}),
    "efficientvim": ("efficientvim_m1_dist", 64, {}),
    "efficientvit_mit": ("efficientvit_b0", 64, {}),
    "efficientvit_msra": ("efficientvit_m0", 224, {}),
    "eva": ("eva02_tiny_patch14_224", 224, _NARROW),
    "fasternet": ("fasternet_t0", 64, {}),
    "fastvit": ("fastvit_t8", 64, {}),
    "focalnet": ("focalnet_tiny_srf", 64, {}),
    "gcvit": ("gcvit_xxtiny", 224, {}),
    "ghostnet": ("ghostnet_050", 64, {}),
    "hardcorenas": ("hardcorenas_b", 64, {}),
    "hgnet": ("hgnetv2_b0", 64, {}),
    "hiera": ("hiera_tiny_224", 224, {}),
    "hieradet_sam2": ("sam2_hiera_tiny", 128, {}),
    "hrnet": ("hrnet_w18_small", 64, {}),
    "iformer": ("iformer_s", 224, {}),
    "inception_next": ("inception_next_atto", 64, {}),
    "inception_resnet_v2": ("inception_resnet_v2", 96, {}),
    "inception_v3": ("inception_v3", 96, {}),
    "inception_v4": ("inception_v4", 96, {}),
    "lcnetv2": ("lcnetv2_small", 64, {}),
    "levit": ("levit_128s", 224, {}),
    "lowformer": ("lowformer_b0", 64, {}),
    "mambaout": ("test_mambaout", 64, {}),
    "maxxvit": ("test_coatnet", 160, {}),
    "metaformer": ("poolformer_s12", 64, {}),
    "mlp_mixer": ("gmixer_12_224", 224, {}),
    "mobilenetv3": ("mobilenetv3_small_050", 64, {}),
    "mobilenetv5": ("mobilenetv5_base", 64, {}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "mvitv2": ("mvitv2_tiny", 224, {}),
    "naflexvit": ("naflexvit_base_patch16_siglip", 64, _NARROW),
    "nest": ("nest_tiny", 224, {}),
    "nextvit": ("nextvit_small", 64, {}),
    "nfnet": ("test_nfnet", 64, {}),
    "pit": ("pit_xs_224", 224, {}),
    "pvt_v2": ("pvt_v2_b0", 64, {}),
    "rdnet": ("rdnet_tiny", 64, {}),
    "regnet": ("regnetx_002", 64, {}),
    "repghost": ("repghostnet_050", 64, {}),
    "repvit": ("repvit_m0_9", 64, {}),
    "res2net": ("res2net50_26w_4s", 64, {}),
    "resnest": ("resnest14d", 64, {}),
    "resnet": ("test_resnet", 64, {}),
    "resnetv2": ("resnetv2_18", 64, {}),
    "rexnet": ("rexnet_100", 64, {}),
    "selecsls": ("selecsls42", 64, {}),
    "senet": ("legacy_seresnet18", 64, {}),
    "sequencer": ("sequencer2d_s", 224, {"layers": (1, 1, 1, 1)}),
    "shvit": ("shvit_s1", 64, {}),
    "sknet": ("skresnet18", 64, {}),
    "starnet": ("starnet_s050", 64, {}),
    "swiftformer": ("swiftformer_xs", 224, {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 224, {"depths": (2, 1, 1, 1), "embed_dim": 24}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 256, {"depths": (2, 1, 1, 1), "embed_dim": 24}),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 224, {"depths": (2, 1, 1, 1), "embed_dim": 24}),
    "tiny_vit": ("tiny_vit_5m_224", 224, {}),
    "tnt": ("tnt_s_legacy_patch16_224", 224, {"depth": 2}),
    "tresnet": ("tresnet_m", 64, {}),
    "twins": ("twins_svt_small", 224, {}),
    "vgg": ("vgg11_bn", 64, {"mlp_ratio": 0.02}),
    "visformer": ("visformer_tiny", 224, {}),
    "vision_transformer": ("test_vit", 160, {}),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 224, {"depth": 2}),
    "vision_transformer_relpos": ("test_vit_relpos", 160, {}),
    "vision_transformer_sam": ("samvit_base_patch16_224", 224, {**_NARROW, "global_attn_indexes": (1,)}),
    "vitamin": ("vitamin_small_224", 224, {}),
    "volo": ("volo_d1_224", 224, {}),
    "vovnet": ("ese_vovnet19b_slim_dw", 64, {}),
    "xception": ("xception", 96, {}),
    "xception_aligned": ("xception41p", 96, {}),
    "xcit": ("xcit_nano_12_p8_224", 224, {}),
}

_BATCH_NORM_1D = ("efficientvit_msra", "iformer", "levit")  # normalise single numbers over the batch


def _timm() -> Iterator[NetworkCase]:
    import timm

    for module, (name, size, options) in _TIMM.items():
        make = functools.partial(timm.create_model, name, pretrained=False, **options)
        yield NetworkCase(
            "timm", module, make, images(size, number=1 if size > 100 and module not in _BATCH_NORM_1D else 2)
        )


def timm_modules() -> set[str]:
    """The modules of the installed timm that have models."""
    import timm

    return set(timm.list_modules())


# --- diffusers ----------------------------------------------------------------------------------------------------

_BLOCKS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
_CROSS: dict[str, Any] = {
    "cross_attention_dim": 8, "attention_head_dim": 4, "in_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
}  # fmt: skip
_DIFFUSERS: dict[str, tuple[str, dict[str, Any], Callable[[], Any]]] = {  # name -> class, options, inputs
    "UNet2DModel": (
        "UNet2DModel",
        {"sample_size": 16, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4, **_BLOCKS},
        lambda: inputs_of(torch.rand(1, 3, 16, 16), 3, return_dict=False),
    ),
    "UNet2DConditionModel": (
        "UNet2DConditionModel",
        {"sample_size": 16, "out_channels": 4, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
         **_BLOCKS, **_CROSS},
        lambda: inputs_of(torch.rand(1, 4, 16, 16), 3, torch.rand(1, 5, 8)),
    ),
    "ControlNetModel": (
        "ControlNetModel",
        {"conditioning_embedding_out_channels": (8, 16), **_BLOCKS, **_CROSS},
        lambda: inputs_of(torch.rand(1, 4, 16, 16), 3, torch.rand(1, 5, 8), torch.rand(1, 3, 32, 32)),
    ),
    "AutoencoderKL": (
        "AutoencoderKL",
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
         "latent_channels": 4, "sample_size": 16, **_BLOCKS},
        lambda: inputs_of(torch.rand(1, 3, 16, 16)),
    ),
    "AutoencoderTiny": (
        "AutoencoderTiny",
        {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8), "num_encoder_blocks": (1, 1),
         "num_decoder_blocks": (1, 1)},
        lambda: inputs_of(torch.rand(1, 3, 16, 16)),
    ),
    "VQModel": (
        "VQModel",
        {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
         "num_vq_embeddings": 16, **_BLOCKS},
        lambda: inputs_of(torch.rand(1, 3, 16, 16)),
    ),
    "DiTTransformer2DModel": (
        "DiTTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8,
         "norm_num_groups": 4, "num_embeds_ada_norm": 10},
        lambda: inputs_of(torch.rand(1, 4, 8, 8), torch.tensor([3]), torch.tensor([1])),
    ),
    "SD3Transformer2DModel": (
        "SD3Transformer2DModel",
        {"sample_size": 16, "patch_size": 2, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
         "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16,
         "out_channels": 4, "pos_embed_max_size": 16},
        lambda: inputs_of(torch.rand(1, 4, 16, 16), torch.rand(1, 5, 16), torch.rand(1, 16), torch.tensor([3])),
    ),
}  # fmt: skip


def _diffusers() -> Iterator[NetworkCase]:
    def make(kind: str, options: dict[str, Any]) -> nn.Module:
        import diffusers

        return getattr(diffusers, kind)(**options)  # type: ignore[no-any-return]

    for name, (kind, options, inputs) in _DIFFUSERS.items():
        yield NetworkCase("diffusers", name, functools.partial(make, kind, options), inputs)


# --- transformers -------------------------------------------------------------------------------------------------

_TEXT: dict[str, Any] = {
    "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
_VISION: dict[str, Any] = {**_TEXT, "image_size": 32, "patch_size": 8}
_VISION.pop("vocab_size")
_SPEECH: dict[str, Any] = {
    **_TEXT, "conv_dim": (8, 8), "conv_kernel": (5, 3), "conv_stride": (3, 2), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0, "layerdrop": 0.0,
}  # fmt: skip
_STAGES: dict[str, Any] = {"hidden_sizes": [8, 16], "depths": [1, 1]}


def _words(**more: Any) -> Callable[[], Any]:
    return lambda: inputs_of(input_ids=torch.randint(2, 30, (2, 6)), **more)


def _waves() -> Any:
    return inputs_of(torch.randn(1, 400))


_TRANSFORMERS: dict[str, tuple[dict[str, Any], Callable[[], Any]]] = {
    "Bert": (_TEXT, _words()),
    "Llama": ({**_TEXT, "num_key_value_heads": 1}, _words(use_cache=False)),
    "GPT2": ({"vocab_size": 30, "n_embd": 16, "n_layer": 2, "n_head": 2}, _words(use_cache=False)),
    "T5": (
        {"vocab_size": 30, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        lambda: inputs_of(input_ids=torch.randint(2, 30, (2, 6)), decoder_input_ids=torch.ones(2, 4, dtype=torch.long),
                      use_cache=False),
    ),
    "Mixtral": ({**_TEXT, "num_key_value_heads": 1, "num_local_experts": 2}, _words(use_cache=False)),
    "Mamba": ({"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, _words(use_cache=False)),
    "ViT": (_VISION, images(32)),
    "Dinov2": (_VISION, images(32)),
    "Swin": ({"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2],
              "window_size": 4}, images(32)),
    "ConvNext": ({**_STAGES, "num_stages": 2}, images(32)),
    "ResNet": ({**_STAGES, "embedding_size": 8}, images(32)),
    "Segformer": ({"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "num_attention_heads": [1, 2],
                   "sr_ratios": [2, 1], "patch_sizes": [3, 3], "strides": [2, 2], "mlp_ratios": [2, 2]}, images(32)),
    "MobileViT": ({"hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8, 16, 16, 16, 16, 16], "image_size": 64,
                   "num_attention_heads": 2}, images(64)),
    "Wav2Vec2": (_SPEECH, _waves),
    "Hubert": (_SPEECH, _waves),
    "CLIP": (
        {"text_config": {**_TEXT, "eos_token_id": 29}, "vision_config": _VISION, "projection_dim": 16},
        lambda: inputs_of(input_ids=torch.randint(2, 29, (2, 6)), pixel_values=torch.rand(2, 3, 32, 32)),
    ),
}  # fmt: skip


def _transformers() -> Iterator[NetworkCase]:
    def make(name: str, options: dict[str, Any]) -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")(**options)
        return getattr(transformers, f"{name}Model")(config)  # type: ignore[no-any-return]

    for name, (options, inputs) in _TRANSFORMERS.items():
        yield NetworkCase("transformers", name, functools.partial(make, name, options), inputs)


# --- spandrel -----------------------------------------------------------------------------------------------------


def _spandrel() -> Iterator[NetworkCase]:
    def made(name: str) -> nn.Module:
        return zoo.build(name)[0]

    def taken(name: str) -> Any:
        return inputs_of(*zoo.build(name)[1])

    for name in zoo.ARCHITECTURES:
        yield NetworkCase("spandrel", name, functools.partial(made, name), functools.partial(taken, name))


_OF: dict[str, Callable[[], Iterator[NetworkCase]]] = {
    "torch": _torch, "torchvision": _torchvision, "timm": _timm, "diffusers": _diffusers,
    "transformers": _transformers, "spandrel": _spandrel,
}  # fmt: skip
