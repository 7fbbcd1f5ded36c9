"""A path, or the id of a model on the Hugging Face hub, as something on this machine's disk."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from tidar_common.errors import UserError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""Owner and name; a path that exists goes before."""
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "config.json")
MODEL_PATTERNS = ("*.json", "*.safetensors", "tokenizer*")


def fetched(name: str, key: str, patterns: Sequence[str] = MODEL_PATTERNS) -> Path:
    """The path `name`, or the folder in the hub's cache that holds the model of that id.

    Files that match `patterns` are downloaded first, unless they are there or HF_HUB_OFFLINE is
    set. `key` is the config key, for messages.

    Raises:
        UserError: when it is neither a path nor a model that can be had.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(name):
        raise UserError(
            f"{key}: {path} does not exist; give a folder, a .gguf file, or a model's id on the "
            "Hugging Face hub (owner/name)"
        )
    # Imported here: only this needs it, and it takes a second.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except LocalEntryNotFoundError as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached"
        raise UserError(
            f"{key}: {name} is neither a path nor in the cache of the Hugging Face hub, and {why}; "
            f"run `hf download {name}` where there is a network, or give a folder"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {name} is no path, and cannot be had from the Hugging Face hub ({reason}); "
            "check the id, or log in with `hf auth login`"
        ) from error
