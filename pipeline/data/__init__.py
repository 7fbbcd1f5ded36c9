"""Shards to batches: a global order that is a pure function, of which each rank takes a slice."""
