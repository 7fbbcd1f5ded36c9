"""The processes of a run: starting them up, what they tell each other outside DeepSpeed, and how
they compute the same twice."""

import os
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class LostProcessError(RuntimeError):
    """Another process of the run is gone, noticed in a collective."""


LOST_SIGNS = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "connection was closed",
    "remote process exited", "NCCL communicator was aborted", "Timed out waiting",
)  # fmt: skip
"""What gloo and NCCL say when a peer went away."""


@dataclass(frozen=True)
class World:
    """This process among all, and a gloo group for small host-side messages.

    The group is separate from the one gradients use, so that control messages never wait for, or
    reorder, work on the accelerator.
    """

    rank: int
    size: int
    device: torch.device
    control: dist.ProcessGroup

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks, in fp64."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return total.tolist()

    def gather_bytes(self, data: bytes) -> list[bytes]:
        """Every rank's `data`, which must have the same length everywhere, in order of rank."""
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        parts: list[Tensor] = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(parts, sent, group=self.control)
        return [part.numpy().tobytes() for part in parts]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in order of rank; any picklable object, for rare messages."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]


@contextmanager
def joined_world() -> Iterator[World]:
    """Join the processes torchrun started, or be a world of one; leave it at the end.

    Uses NCCL and one GPU for each process where there are GPUs, gloo and the CPU elsewhere.
    """
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    device = torch.device("cpu")
    if has_gpu:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    import deepspeed  # after DS_ACCELERATOR: it looks for an accelerator when imported

    if not has_gpu:
        # A shared-memory all-reduce that DeepSpeed would compile at this moment; gloo needs none.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # DeepSpeed still calls collectives by names that newer torch releases warn about.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.init_distributed(dist_backend="nccl" if has_gpu else "gloo", verbose=False)
    control = dist.new_group(backend="gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device, control)
    except RuntimeError as error:
        if any(sign in str(error) for sign in LOST_SIGNS):
            rank, host = dist.get_rank(), socket.gethostname()
            raise LostProcessError(
                f"rank {rank} on {host} lost another process of the run, which has ended or cannot "
                "be reached (its own output says why)"
            ) from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
