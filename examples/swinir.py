"""Adapt a small SwinIR to the photos of a cheap camera: convolutions, attention and MLPs, in three minutes on a CPU.

    python examples/swinir.py
    python examples/swinir.py --base 003_realSR_BSRGAN_DFO_s64w8_SwinIR-M_x4_GAN.pth --photos holidays

As examples/span.py, for a transformer: the adapter is on `qkv` and `proj` of every attention, on both layers of every
MLP and on every convolution. `--base` takes any SwinIR that spandrel loads; the merged network is one of these again.
"""

from pathlib import Path

from sr.command import Options, make_app
from sr.networks import NETWORKS

SWINIR = NETWORKS["swinir"]

app = make_app(
    SWINIR,
    Options(base=SWINIR.weights, targets=[*SWINIR.targets], patch=32, out=Path("runs/swinir")),
    gain=0.3,
)

if __name__ == "__main__":
    app()
