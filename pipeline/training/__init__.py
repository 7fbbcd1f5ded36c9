"""The training run: DeepSpeed engine, loop, checkpoints, signals and trackers."""
