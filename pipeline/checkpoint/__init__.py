"""Training checkpoints on disk: the only place that knows DeepSpeed's files."""
