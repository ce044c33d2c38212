"""Adapt a small RRDBNet, the network of ESRGAN, to the photos of a cheap camera, in three minutes on a CPU.

    python examples/rrdb.py
    python examples/rrdb.py --base RealESRGAN_x4plus.pth --photos holidays

As examples/span.py, with the adapter on the dense convolutions and on those before and after them. `--base` takes any
RRDBNet that spandrel loads (ESRGAN, ESRGAN+, BSRGAN, Real-ESRGAN); the merged network is one of these again.
"""

from pathlib import Path

from sr.command import Options, make_app
from sr.networks import NETWORKS

RRDB = NETWORKS["rrdb"]

app = make_app(
    RRDB,
    Options(base=RRDB.weights, targets=[*RRDB.targets], patch=32, out=Path("runs/rrdb")),
    gain=0.3,
)

if __name__ == "__main__":
    app()
