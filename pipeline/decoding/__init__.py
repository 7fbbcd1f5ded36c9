"""Decoding one sequence at a time, by plain autoregression (`ar`) or TiDAR (`tidar`)."""

from pipeline.decoding.generate import Generation, generate, stream

__all__ = ["Generation", "generate", "stream"]
