"""What is found out about a model: summary, audit, ranks by importance. It comes back as it was."""
