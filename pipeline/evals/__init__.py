"""What a model is worth: decode speed, agreement of drafts, likelihood, tasks."""
