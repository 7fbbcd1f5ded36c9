"""The decode-speed comparison as a small Markdown table, ready to paste."""

from collections.abc import Mapping, Sequence
from typing import Any

NAMES = {
    "ar": "AR",
    "tidar": "TiDAR",
    "tidar_chosen": "TiDAR, chosen step",
    "recurrent": "draft head alone",
    "block_diffusion": "block diffusion",
    "prompt_lookup": "prompt lookup",
    "speculative": "speculative",
}
HEAD = ("method", "T", "K", "tokens/forward", "tokens/s", "over AR", "conversion", "equal to AR")


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line for each method and temperature of the rows of one decode-speed eval."""
    lines = [HEAD, tuple("---" for _ in HEAD), *map(_cells, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    match = row["exact_match_ar"]
    spread = row["speedup_over_ar_range"]
    return (
        NAMES[row["method"]],
        f"{row['temperature']:g}",
        str(row["block_size"]),
        f"{row['tokens_per_forward']:.2f}",
        f"{row['tokens_per_second']:.1f}",
        f"{row['speedup_over_ar']:.2f}× ({spread['min']:.2f} to {spread['max']:.2f})",
        f"{row['conversion']:.0%}",
        "–" if match is None else f"{match:.0%} of {row['prompts']}",
    )
