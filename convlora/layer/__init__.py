"""One live layer with adapters: how it becomes one (adapted.py), what acts on it (slot.py), how it computes."""
