"""Bit-equal runs: what torch, cuBLAS and NCCL have to be told."""

import os
from collections.abc import Callable

import torch


def make_deterministic(say: Callable[[str], None]) -> None:
    """Give up every kernel whose result depends on timing; call it before anything runs.

    `say` is told which backends are not used because of it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The tree and the split over channels that NCCL picks decide the order of additions.
    os.environ.setdefault("NCCL_ALGO", "Ring")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if not torch.cuda.is_available():
        say("deterministic: no backend had to be given up on the CPU")
        return
    # cuDNN's attention adds gradients in an order of its own and has no switch in torch.
    torch.backends.cuda.enable_cudnn_sdp(False)
    say(
        "deterministic: without cuDNN's attention; cuBLAS with a fixed workspace "
        f"({os.environ['CUBLAS_WORKSPACE_CONFIG']}), NCCL with {os.environ['NCCL_ALGO']}"
    )
