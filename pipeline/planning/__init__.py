"""What a training run takes, worked out from its config alone: memory, FLOPs, time, disk."""
