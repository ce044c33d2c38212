"""File formats: one module a format, each between a file and an `Adapter`."""
