"""What data_prep, pipeline and slurm stand on; nothing here imports torch."""
