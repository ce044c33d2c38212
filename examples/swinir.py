"""Adapt a small SwinIR to the photos of a cheap camera: convolutions, attention and MLPs, in three minutes on a CPU.

    python examples/swinir.py
    python examples/swinir.py --base 003_realSR_BSRGAN_DFO_s64w8_SwinIR-M_x4_GAN.pth --photos holidays

As examples/span.py, for a transformer: the adapter is on `qkv` and `proj` of every attention, on both layers of every
MLP and on every convolution. `--base` takes any SwinIR that spandrel loads; the merged network is one of these again.
"""

from span import adapt
from sr.command import make_app
from sr.networks import NETWORKS

app = make_app(adapt, NETWORKS["swinir"], patch=32)

if __name__ == "__main__":
    app()
