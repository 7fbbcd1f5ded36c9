"""The way of a document from a source into a shard, a module for each stage."""
