"""Results of the code benchmarks as columns: quality and speed of each decoder side by side."""

from typing import Any


def code_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One column for each benchmark and decoder."""
    shown = ("tokens_per_forward", "tokens_per_second", "distinct_4grams", "problems", "timed_out")
    return [
        {
            "benchmark": row["benchmark"],
            "decoder": row["decoder"],
            **{
                f"{group} {name}": value
                for group, scores in row["scores"].items()
                for name, value in scores.items()
            },
            **{name: row[name] for name in shown},
        }
        for row in results["results"]
    ]
