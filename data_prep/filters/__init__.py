"""What keeps documents out of training: rules of quality, duplicates, texts of evals."""
