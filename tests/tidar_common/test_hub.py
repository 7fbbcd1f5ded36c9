"""A path or an id on the Hugging Face hub: from disk, from the cache, pushed, or one line of why
not."""

import huggingface_hub.constants
import pytest
from fake_hub import FakeHub

from tidar_common.errors import UserError
from tidar_common.hub import check_push, fetched, push


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


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    (folder / "custom_generate").mkdir(parents=True)
    (folder / "custom_generate" / "generate.py").write_text("new")
    (folder / "model.safetensors").write_text("weights")
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "there")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def test_a_push_replaces_an_earlier_one(hub, model):
    """Its weights and code go where the new ones have other names; what others put there stays."""
    place = hub.folder / "owner" / "name"
    assert push(model, "owner/name", "push_to", private=True).endswith("owner/name (private)")
    (place / "model-00002-of-00002.safetensors").write_text("old")
    (place / "custom_generate" / "old.py").write_text("old")
    (place / "figure.png").write_text("theirs")
    # An id that is private stays so.
    assert push(model, "owner/name", "push_to", private=False).endswith("(private)")
    files = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    assert files == {"custom_generate/generate.py", "model.safetensors", "figure.png"}


def test_nothing_becomes_public_by_itself(hub, model):
    assert push(model, "owner/name", "push_to", private=False).endswith("(public)")
    (model / "secret").touch()
    with pytest.raises(UserError, match="push_to: owner/name is public; set push_private=false"):
        push(model, "owner/name", "push_to", private=True)
    assert not (hub.folder / "owner" / "name" / "secret").exists()
    with pytest.raises(UserError, match=r"others/name cannot be pushed \(403 .* you have no"):
        push(model, "others/name", "push_to", private=True)


@pytest.mark.parametrize(
    ("offline", "token", "says"),
    [(True, "hf_x", "HF_HUB_OFFLINE is set"), (False, None, "no token for the hub; run"),
     (False, "hf_x", "cannot be pushed .* check the network")],
)  # fmt: skip
def test_whether_a_push_can_go(monkeypatch, offline, token, says):
    """Asked before anything is written; at an address where nothing listens."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: token)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: token)
    with pytest.raises(UserError, match=f"^push_to: .*{says}") as caught:
        check_push("owner/name", "push_to")
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="push_to: 'name' is no id"):
        check_push("name", "push_to")
