"""What a run tells the outside: files, W&B, the terminal. None of it changes the training state."""
