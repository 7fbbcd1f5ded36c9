"""Models on the Hugging Face hub: fetched to this machine's disk, and pushed from it."""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tidar_common.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""Owner and name; a path that exists goes before."""
TOKENIZER_PATTERNS = ("tokenizer*", "special_tokens_map.json", "config.json")
MODEL_PATTERNS = ("*.json", "*.safetensors", "tokenizer*")
REPLACED_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "custom_generate/*")
"""What a push deletes of an earlier one, where the folder has no such file."""


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


def check_push(name: str, key: str) -> None:
    """Raises UserError when no model can be pushed to the id `name`; `key` is the config key."""
    if not HUB_ID.fullmatch(name):
        raise UserError(f"{key}: {name!r} is no id on the Hugging Face hub; give owner/name")
    with _hub_errors(name, key) as api:
        api.whoami()


def push(folder: Path, name: str, key: str, *, private: bool) -> str:
    """Upload the files of `folder` to the id `name` in one commit, which is made if it is new.

    Args:
        folder: holds a model.
        name: owner/name.
        key: the config key, for messages.
        private: refuse an id that others can read, and make a new one private.

    Returns:
        Where it is now, with who can read it.

    Raises:
        UserError: when the hub cannot be reached, or does not let this user.
    """
    with _hub_errors(name, key) as api:
        url = api.create_repo(name, private=private, exist_ok=True)
        hidden = bool(api.repo_info(name).private)
        if private and not hidden:
            raise UserError(f"{key}: {name} is public; set push_private=false to push there")
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Export a TiDAR model",
            delete_patterns=list(REPLACED_PATTERNS),
        )  # fmt: skip
    return f"{url} ({'private' if hidden else 'public'})"


@contextmanager
def _hub_errors(name: str, key: str) -> Iterator["HfApi"]:
    """The hub's interface; what goes wrong with it is one line."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    try:
        yield HfApi()
    except UserError:
        raise
    except LocalTokenNotFoundError as error:
        raise UserError(
            f"{key}: no token for the hub; run `hf auth login` or set HF_TOKEN"
        ) from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"{key}: HF_HUB_OFFLINE is set; unset it to push {name}") from error
    except Exception as error:  # those of its HTTP library have no common class
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{key}: {name} cannot be pushed ({reason}); check the network, the id and that the "
            "token may write"
        ) from error
