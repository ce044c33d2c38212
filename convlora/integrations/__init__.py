"""Trainers of others: one module each, imported on its own, since each needs the trainer's package."""
