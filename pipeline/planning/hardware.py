"""Accelerators: memory and peak rate. What is not in the table is unknown, never guessed."""

from dataclasses import dataclass
from pathlib import Path

CPU = "cpu"
"""Name of a machine without accelerator, whose processes share the host's memory."""
CGROUP = Path("/sys/fs/cgroup")
"""Where a container sees the limit of its memory, `memory.max` (cgroup v2)."""


@dataclass(frozen=True)
class Gpu:
    """One accelerator; None is unknown."""

    name: str
    memory_gib: float | None
    """As nvidia-smi reports it."""
    bf16_tflops: float | None
    """Peak dense TFLOP/s, without sparsity (NVIDIA's data sheets)."""
    fp32_tflops: float | None
    """Peak of the plain fp32 units, which is what fp32 training runs on (TF32 is not enabled)."""

    def tflops(self, precision: str) -> float | None:
        """Peak TFLOP/s in `bf16` or `fp32`."""
        return self.bf16_tflops if precision == "bf16" else self.fp32_tflops


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100_40gb", 40.0, 312.0, 19.5),
        Gpu("a100_80gb", 80.0, 312.0, 19.5),
        Gpu("h100_80gb", 79.6, 989.0, 67.0),  # SXM5
        Gpu("h200", 140.4, 989.0, 67.0),  # SXM
        Gpu("b200", 179.1, 2250.0, None),
    )
}


DEVICE_NAMES = {
    "NVIDIA A100-SXM4-40GB": "a100_40gb",
    "NVIDIA A100-PCIE-40GB": "a100_40gb",
    "NVIDIA A100-SXM4-80GB": "a100_80gb",
    "NVIDIA A100 80GB PCIe": "a100_80gb",
    "NVIDIA H100 80GB HBM3": "h100_80gb",
    "NVIDIA H200": "h200",
    "NVIDIA B200": "b200",
}
"""What CUDA calls them. Other forms of a chip (H100 PCIe, NVL) run at other rates."""


def recognise(device_name: str) -> Gpu | None:
    """The table's entry for what CUDA calls a device; None where it has none."""
    return GPUS.get(DEVICE_NAMES.get(device_name, ""))


def free_memory_bytes() -> int | None:
    """Memory that new processes could get on this host; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    try:
        limit, used = ((CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        free.append(int(limit) - int(used))
    except (OSError, ValueError):  # no container, or no limit ("max")
        pass
    return max(min(free), 0) if free else None


def find_gpu(name: str | None, memory_gib: float | None, tflops: float | None) -> Gpu:
    """The table's entry for `name`, with what the user states himself in its place."""
    known = GPUS.get(name or "", Gpu(name or "not given", None, None, None))
    return Gpu(
        known.name,
        memory_gib if memory_gib is not None else known.memory_gib,
        tflops if tflops is not None else known.bf16_tflops,
        tflops if tflops is not None else known.fp32_tflops,
    )
