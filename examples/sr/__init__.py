"""What the examples share: photos, degradations, metrics, networks and the training loop."""
