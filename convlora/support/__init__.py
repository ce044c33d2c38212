"""What knows nothing of adapters: files written at once, JSON, progress, tables, safetensors bytes."""
