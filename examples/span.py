"""Adapt a small super-resolution network to the photos of a cheap camera, in two minutes on a CPU.

    python examples/span.py

The network, a SPAN of 26 channels, has only seen clean bicubic input. Real input is blurred, noisy
and compressed. A ConvLoRA adapter on every convolution learns that from five photographs and is
judged on three others. The script then merges the adapter, saves and reloads it, hands the merged
network to other programs and removes the adapter, checking each time that the outputs are what
they should be; it exits with 1 if they are not. sr/demonstration.py does it, step by step.
"""

from pathlib import Path

from sr.command import Options, make_app
from sr.networks import NETWORKS

SPAN = NETWORKS["span"]

app = make_app(
    SPAN,
    Options(base=SPAN.weights, targets=[*SPAN.targets], out=Path("runs/span")),
    gain=0.3,
)

if __name__ == "__main__":
    app()
