"""Tokenizers: opening, training, and encoding fast."""
