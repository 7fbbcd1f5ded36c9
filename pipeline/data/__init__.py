"""Shards to batches: a global order that is a pure function, and whatever slice of it a rank needs."""
