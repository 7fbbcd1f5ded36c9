"""Shards to a trained, decodable, exported TiDAR model."""
