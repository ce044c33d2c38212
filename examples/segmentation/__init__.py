"""What segment.py needs: images of cells from two microscopes, a U-Net, and what a run shows."""
