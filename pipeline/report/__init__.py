"""One self-contained page per run: what it learned, how well it drafts, how fast it decodes."""

from pipeline.report.page import build_report

__all__ = ["build_report"]
