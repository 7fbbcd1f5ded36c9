"""Raw text to packed, laid-out, sharded training sequences. Knows nothing of models or torch."""
