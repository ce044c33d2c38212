"""What is done to a model: adapters in and out, switched, merged, saved and loaded."""
