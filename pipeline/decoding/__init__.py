"""Decoding by TiDAR (`tidar`), plain autoregression (`ar`), and what one would otherwise use."""

from pipeline.decoding.generate import Generation, generate, generate_batch, stream
from pipeline.decoding.sampling import Sampling

__all__ = ["Generation", "Sampling", "generate", "generate_batch", "stream"]
