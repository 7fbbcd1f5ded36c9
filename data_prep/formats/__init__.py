"""The files of a prepared folder: shards of packed groups, and the manifest over them."""
