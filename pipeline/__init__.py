"""Shards to a trained, decodable, exported TiDAR model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.model.loading import load_model

__all__ = ["load_model"]


def __getattr__(name: str) -> Any:
    # On demand, so that parts that need no model (report, plan) do not wait for torch.
    if name == "load_model":
        from pipeline.model.loading import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
