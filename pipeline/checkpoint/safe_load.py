"""Reading DeepSpeed's checkpoint files without running what may be pickled in them."""

from pathlib import Path
from typing import Any

import torch

from tidar_common.config import first_line
from tidar_common.errors import UserError


def allowed_classes() -> list[Any]:
    """The classes, all without side effects, that DeepSpeed pickles beside tensors."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address, set]


def load_checked(
    path: Path, *, map_location: Any = "cpu", mmap: bool = False, tensors_only: bool = False
) -> Any:
    """torch.load with `weights_only`, and DeepSpeed's few plain classes allowed, unless
    `tensors_only`: then DeepSpeed is not imported, either.

    Raises:
        UserError: when the file holds anything else, or cannot be read.
    """
    try:
        with torch.serialization.safe_globals([] if tensors_only else allowed_classes()):
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except Exception as error:
        reason = first_line(error)
        raise UserError(f"{path}: is no checkpoint file that can be loaded ({reason})") from error
