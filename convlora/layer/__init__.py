"""One live layer with adapters: how it becomes one (adapted.py), what acts on it, and the forms in which it computes."""
