"""What can happen to a photo, one thing at a time: blur, resizing, noise, JPEG.

Tensors are RGB `(1, 3, h, w)` in [0, 1]; noise is drawn from the generator given, so a seed decides all.
"""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from numpy.typing import NDArray
from PIL import Image as PilImage
from torch import Tensor

from sr.data import Image

Kernel = NDArray[np.float64]  # (size, size), of sum 1


def resize(tensor: Tensor, height: int, width: int, mode: str = "bicubic") -> Tensor:
    """Resizing with antialiasing, bicubic (a = -0.5, as MATLAB's and Pillow's) or `"bilinear"`."""
    return F.interpolate(tensor, size=(height, width), mode=mode, antialias=True)


def gaussian_kernel(sigma_x: float, sigma_y: float, theta: float, size: int = 21, power: float = 1.0) -> Kernel:
    """A Gaussian, widths in pixels, its first axis turned by `theta` radians.

    `power` makes it a generalised one, exp(-q^power / 2) with q the squared distance in widths: pointed below 1, flat
    with steep sides above.
    """
    offsets = np.arange(size) - size // 2
    y, x = np.meshgrid(offsets, offsets, indexing="ij")
    along = np.cos(theta) * x + np.sin(theta) * y
    across = -np.sin(theta) * x + np.cos(theta) * y
    kernel = np.exp(-0.5 * ((along / sigma_x) ** 2 + (across / sigma_y) ** 2) ** power)
    return kernel / kernel.sum()


def sinc_kernel(cutoff: float, size: int = 21) -> Kernel:
    """The ideal low pass, cut to a square: what sharpened and compressed photos ring like.

    ω·J₁(ω·r) / (2π·r), with `cutoff` ω in radians per pixel; π keeps every wave along a row.
    """
    offsets = torch.arange(size, dtype=torch.float64) - size // 2
    radius = torch.hypot(offsets[:, None], offsets).clamp(min=1e-9)  # J₁(z)/z has its limit at the middle
    kernel = (cutoff * torch.special.bessel_j1(cutoff * radius) / (2 * torch.pi * radius)).numpy()
    return kernel / kernel.sum()


def blur(tensor: Tensor, kernel: Kernel) -> Tensor:
    """Each channel correlated with one kernel, reflected at the edges."""
    weight = repeat(torch.from_numpy(kernel).to(tensor), "y x -> c 1 y x", c=tensor.shape[1])
    padded = F.pad(tensor, [kernel.shape[0] // 2] * 4, mode="reflect")
    return F.conv2d(padded, weight, groups=tensor.shape[1])


def gaussian_noise(tensor: Tensor, deviation: float, rng: np.random.Generator, *, grey: bool = False) -> Tensor:
    """The tensor and normal noise of that standard deviation, of 255 levels; `grey`: the same in all colours."""
    height, width = tensor.shape[2:]
    grain = torch.from_numpy(rng.normal(0, deviation / 255, size=(height, width, 1 if grey else 3)))
    return tensor + rearrange(grain, "h w c -> c h w").float()


def shot_noise(tensor: Tensor, strength: float, rng: np.random.Generator, *, grey: bool = False) -> Tensor:
    """The tensor and `strength` times the noise of a sensor that counts 255 photons where it is white."""
    counted = (tensor.mean(1, keepdim=True) if grey else tensor).clamp(0, 1).double() * 255
    noise = torch.from_numpy(rng.poisson(counted.numpy()).astype(np.float64)) - counted
    return tensor + (strength / 255 * noise).float()


def jpeg(image: Image, quality: int) -> Image:
    """The image after JPEG of this quality, colours at half resolution (4:2:0)."""
    buffer = io.BytesIO()
    PilImage.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling=2)
    return np.asarray(PilImage.open(buffer).convert("RGB"))
