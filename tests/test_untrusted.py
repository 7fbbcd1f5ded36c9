"""Files from outside: what they hold is never run, unpacked elsewhere, or read without end."""

import ast
import io
import json
import os
import re
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import ROOT
from omegaconf import OmegaConf

from data_prep.corpora import open_corpus
from data_prep.formats.manifest import MANIFEST, MAX_BYTES, Manifest
from data_prep.formats.shards import ShardReader, group_offsets, read_shard
from pipeline.checkpoint.files import write_file_list
from pipeline.checkpoint.read import open_checkpoint
from pipeline.model.config import ModelConfig
from pipeline.model.loading import open_model
from tidar_common.errors import UserError
from tidar_common.files import MAX_TEXT_BYTES, read_text_checked
from tidar_common.run_files import newest_checkpoint
from tidar_common.secrets import without_secrets


def entry(name: str, kind: bytes = tarfile.REGTYPE, **values) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type = kind
    for key, value in values.items():
        setattr(member, key, value)
    return member


ODD = {
    "link": entry("00000000.tokens.npy", tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": entry("00000000.tokens.npy", tarfile.LNKTYPE, linkname="00000001.layout.npy"),
    "device": entry("00000000.layout.npy", tarfile.CHRTYPE, devmajor=1, devminor=5),
    "folder": entry("00000000.layout.npy", tarfile.DIRTYPE),
    "outside": entry("../00000000.tokens.npy"),
    "absolute": entry("/00000000.tokens.npy"),
    "unknown": entry("00000000.code.py"),
    "extended header": entry("00000000.tokens.npy", pax_headers={"path": "00000000.tokens.npy"}),
}


@pytest.mark.parametrize("kind", ODD)
def test_a_shard_with_an_odd_member_is_refused(data_dir, tmp_path, kind):
    """The member stands behind whole groups, where a reader by names would pass over it."""
    name = next(iter(sorted((data_dir / "heldout").glob("*.tar"))))
    shard = tmp_path / name.name
    with tarfile.open(name) as source, tarfile.open(shard, "w", format=tarfile.PAX_FORMAT) as tar:
        for member in source:
            content = source.extractfile(member)
            assert content is not None
            tar.addfile(member, io.BytesIO(content.read()))
        tar.addfile(ODD[kind])
    end = shard.stat().st_size
    readers = (
        lambda: group_offsets(shard),
        lambda: list(read_shard(shard)),
        lambda: ShardReader(shard, [0, end]).read_group(0),
    )
    for read in readers:
        with pytest.raises(UserError, match=re.escape(f"{shard}: missing or damaged shard (mem")):
            read()


def test_odd_members_of_a_text_tar_are_counted_and_not_read(tmp_path):
    with tarfile.open(tmp_path / "corpus.tar", "w") as tar:
        good = entry("good.txt", size=4)
        tar.addfile(good, io.BytesIO(b"text"))
        tar.addfile(entry("link.txt", tarfile.SYMTYPE, linkname="/etc/passwd"))
        tar.addfile(entry("pipe.txt", tarfile.FIFOTYPE))
        tar.addfile(entry("../above.txt", size=4), io.BytesIO(b"evil"))
        tar.addfile(entry("folder", tarfile.DIRTYPE))
    corpus = open_corpus(OmegaConf.create({"kind": "webdataset", "path": str(tmp_path)}))
    refused = Counter()
    assert [document.text for document in corpus.documents(refused=refused)] == ["text"]
    assert refused == {"link or device": 2, "odd member name": 1}


def test_a_manifest_of_any_size_or_with_names_outside_is_refused(data_dir, tmp_path):
    manifest = Manifest.load(data_dir)
    shards = manifest.train.shards
    for name in ("../train/000000.tar", "/etc/passwd", "train/../../x.tar", "train/.tar"):
        odd = (replace(shards[0], name=name), *shards[1:])
        replace(manifest, train=replace(manifest.train, shards=odd)).save(tmp_path)
        with pytest.raises(UserError, match=r"manifest.json: damaged \(.* is no name of a file"):
            Manifest.load(tmp_path)
    replace(manifest, tokenizer=replace(manifest.tokenizer, file="../x.model")).save(tmp_path)
    with pytest.raises(UserError, match=r"'\.\./x\.model' is no name"):
        Manifest.load(tmp_path)
    os.truncate(tmp_path / MANIFEST, MAX_BYTES + 1)  # a sparse file: no such disk is needed
    with pytest.raises(UserError, match="it has more than the 536,870,912 bytes"):
        Manifest.load(tmp_path)


def test_a_config_of_any_size_is_refused(tmp_path):
    path = tmp_path / "model.json"
    path.write_text("{}")
    assert read_text_checked(path) == "{}"
    os.truncate(path, MAX_TEXT_BYTES + 1)
    with pytest.raises(UserError, match="more than the 67,108,864 bytes"):
        ModelConfig.load(path)
    with pytest.raises(ValueError, match="more than the 10 bytes"):
        read_text_checked(Path("/proc/cpuinfo"), 10)  # whose size the system gives as 0


class Attack:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize(
    "name", ["zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"]
)
def test_a_checkpoint_from_outside_runs_nothing(trained_run, tmp_path, name):
    """Its list of files is right: whoever gives a checkpoint away can write that as well. Without
    the whole module it is one of ZeRO 3, which DeepSpeed's own converter would unpickle."""
    trace, folder = tmp_path / "trace", tmp_path / "step-00000012"
    folder.mkdir()
    for known in ("state.json", "model.json"):
        content = (trained_run / "checkpoints" / "step-00000012" / known).read_bytes()
        (folder / known).write_bytes(content)
    # Partitions are read after the model's states, so those of ZeRO 3 are there and harmless.
    torch.save({"module": {}}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    torch.save({"module": Attack(trace), "optimizer_state_dict": {}}, folder / name)
    write_file_list(folder)
    with pytest.raises(UserError, match=f"{name}: is no checkpoint file that can be loaded"):
        list(open_checkpoint(folder).weights(torch.float32))
    assert not trace.exists()


def test_latest_does_not_lead_out_of_the_checkpoints(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "checkpoints" / "latest").write_text("../elsewhere\n")
    assert newest_checkpoint(tmp_path) is None
    with pytest.raises(UserError, match="holds no checkpoint yet"):
        open_model(tmp_path)


def test_nothing_in_the_project_unpickles_without_restriction():
    """Every torch.load says weights_only=True, and nothing else reads pickles.

    Except the sandbox of the code evals, whose child reads what its own parent sent it.
    """
    sandbox = {ROOT / "pipeline/evals/code" / name for name in ("child.py", "sandbox.py")}
    for path in [
        p for top in ("tidar_common", "data_prep", "pipeline") for p in ROOT.glob(f"{top}/**/*.py")
    ]:
        text = path.read_text()
        for call in re.findall(r"torch\.load\((.*)", text):
            assert "weights_only=True" in call, path
        if path not in sandbox:
            assert not re.search(r"\bpickle\b\.|import pickle|joblib|allow_pickle=True", text), path
        assert "yaml.load(" not in text, path
        # Called so: what an export's card tells its reader to write is another matter.
        for node in ast.walk(ast.parse(text)):
            assert not (isinstance(node, ast.keyword) and node.arg == "trust_remote_code"), path


def test_secrets_of_the_environment_are_replaced_by_their_names():
    environment = {
        "HF_TOKEN": "hf_0123456789", "STORE_PASSWORD": "correct horse", "AUTH": "yes",
        "HOME": "/home/somebody", "LONGER_KEY": "hf_0123456789abc",
    }  # fmt: skip
    config = {
        "data": {"dir": "pipe:curl -H 'Bearer hf_0123456789abc' https://a:correct horse@store/"},
        "tags": ["/home/somebody", "yes", 3, None, "hf_0123456789"],
    }
    assert without_secrets(config, environment) == {
        "data": {"dir": "pipe:curl -H 'Bearer ${oc.env:LONGER_KEY}' "
                        "https://a:${oc.env:STORE_PASSWORD}@store/"},
        "tags": ["/home/somebody", "yes", 3, None, "${oc.env:HF_TOKEN}"],
    }  # fmt: skip
    assert json.dumps(config).count("hf_0123456789") == 2  # the config itself is as it was
