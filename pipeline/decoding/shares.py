"""Which of many prompts a process continues, where several share them, and into which file."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from tidar_common.config import array_share
from tidar_common.errors import UserError


@dataclass(frozen=True)
class Share:
    """The prompts whose number in the whole list is `index` modulo `count`."""

    index: int = 0
    count: int = 1

    @classmethod
    def of_process(cls, array: str | None) -> "Share":
        """That of this rank, where torchrun started several, of the `array=i/n` given.

        Raises:
            UserError: when `array` is no share.
        """
        index, count = array_share(array)
        rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        return cls(index * ranks + rank, count * ranks)

    def number(self, place: int) -> int:
        """In the whole list, of the prompt at `place` of this share."""
        return self.index + place * self.count

    def file(self, output: Path) -> Path:
        """`output` itself, or `answers-00003-of-00008.jsonl` for the fourth of eight shares."""
        if self.count == 1:
            return output
        name = f"{output.stem}-{self.index:05d}-of-{self.count:05d}{output.suffix}"
        return output.with_name(name)

    def refuse_others(self, output: Path) -> None:
        """Raise UserError when files of another number of shares stand beside `file(output)`:
        prompts would be answered twice."""
        part = re.compile(rf"{re.escape(output.stem)}-\d+-of-(\d+){re.escape(output.suffix)}")
        counts = {path: part.fullmatch(path.name) for path in sorted(output.parent.iterdir())}
        shares = {path: int(match[1]) for path, match in counts.items() if match}
        if output.is_file():
            shares[output] = 1
        for path, count in shares.items():
            if count != self.count:
                raise UserError(
                    f"output: {path} was begun in {count} shares, and these are {self.count}; go "
                    f"on with {count} (array jobs times ranks), or give another output"
                )

    def __str__(self) -> str:
        return f"share {self.index} of {self.count}: " if self.count > 1 else ""


def rank_device(device: str | None) -> str | None:
    """`device`, or where none is named the GPU of this rank's own among those of its machine.

    Raises:
        UserError: when the machine has fewer GPUs than ranks.
    """
    local = os.environ.get("LOCAL_RANK")
    if device is not None or local is None or not torch.cuda.is_available():
        return device
    if int(local) >= torch.cuda.device_count():
        raise UserError(
            f"device: rank {local} of this machine has no GPU of its own, there are "
            f"{torch.cuda.device_count()}; start as many ranks"
        )
    torch.cuda.set_device(int(local))
    return f"cuda:{local}"
