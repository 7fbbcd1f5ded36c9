"""What decides which documents are removed, beside the config: for the keys of tasks."""

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from data_prep.corpora import Part
from data_prep.filters.decontamination import eval_files, files_sha256
from data_prep.settings import PrepareSettings
from tidar_common.errors import UserError


def screening_identity(settings: PrepareSettings, parts: Sequence[Part]) -> list[Any]:
    """Versions, the evals' contents, and, where copies are looked for, the whole corpus; empty
    where nothing is removed.

    Raises:
        UserError: when datatrove is not installed, or an eval has no files.
    """
    if not settings.screens:
        return []
    evals = settings.decontaminate.evals or {}
    contents = [[name, files_sha256(eval_files(name, path))] for name, path in evals.items()]
    whole = [[p.names, p.start, p.end, p.stamp] for p in parts] if settings.dedup.any else []
    return [datatrove_version(), sorted(contents), whole]


def datatrove_version() -> str:
    try:
        return version("datatrove")
    except PackageNotFoundError as error:
        raise UserError(
            "filters, dedup, decontaminate: need datatrove; pip install 'tidar-pretrain[filters]', "
            "or filters=none and neither of the others"
        ) from error
