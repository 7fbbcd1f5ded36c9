"""A path or an id on the Hugging Face hub: from disk, from the cache, or one line of why not."""

import huggingface_hub
import pytest

from tidar_common.errors import UserError
from tidar_common.hub import fetched


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """A cache that holds one file of the model owner/name, and no network."""
    snapshot = tmp_path / "hub" / "models--owner--name" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_path_goes_before_an_id(hub_cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fetched("owner/name", "init_from") == hub_cache
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert fetched("owner/name", "init_from").resolve() == tmp_path / "owner" / "name"


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(
    ("name", "says"),
    [("owner/other", "hf download owner/other"), ("/nowhere/model", "does not exist"),
     ("nothing", "does not exist"), ("a/b/c", "does not exist")],
)  # fmt: skip
def test_what_cannot_be_had_is_named_on_one_line(name, says):
    with pytest.raises(UserError, match=f"init_from: {name} .*{says}") as caught:
        fetched(name, "init_from")
    assert "\n" not in str(caught.value)
