"""Decoding by TiDAR (`tidar`), plain autoregression (`ar`), and what one would otherwise use."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.decoding.batch import Generation
    from pipeline.decoding.generation import generate, generate_batch, stream
    from pipeline.decoding.options import DecodeOptions
    from pipeline.decoding.sampling import Sampling

__all__ = ["DecodeOptions", "Generation", "Sampling", "generate", "generate_batch", "stream"]


def __getattr__(name: str) -> Any:
    # On demand, so that a report can read the table of methods without waiting for torch.
    if name in __all__:
        from pipeline.decoding import batch, generation, options, sampling

        for module in (generation, batch, options, sampling):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
