"""The decoder, its attention masks, and loading weights in and out."""
