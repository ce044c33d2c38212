"""Adapt a small RRDBNet, the network of ESRGAN, to the photos of a cheap camera, in three minutes on a CPU.

    python examples/rrdb.py
    python examples/rrdb.py --base RealESRGAN_x4plus.pth --photos holidays

As examples/span.py, with the adapter on the dense convolutions and on those before and after them. `--base` takes any
RRDBNet that spandrel loads (ESRGAN, ESRGAN+, BSRGAN, Real-ESRGAN); the merged network is one of these again.
"""

from span import adapt
from sr.command import make_app
from sr.networks import NETWORKS

app = make_app(adapt, NETWORKS["rrdb"], patch=32)

if __name__ == "__main__":
    app()
