"""A Hugging Face `tokenizer.json`: no silent control symbols, one mask, the eos that is meant."""

import json
import pickle

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from data_prep.tokenizers.load import HUGGINGFACE_MASK, load_tokenizer
from tidar_common.errors import UserError

SPECIAL = ["<|endoftext|>", "<|im_end|>", "<|bos|>"]
TEXT = "def f(x):\n    return 机器 🙂 <|endoftext|> <|im_end|> <|mask|>\0"


@pytest.fixture
def folder(texts, tmp_path):
    """A byte-level BPE that adds a bos by itself, with a truncation and a padding set."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(texts[:20], trainer)
    bos = ("<|bos|>", model.token_to_id("<|bos|>"))
    model.post_processor = processors.TemplateProcessing("<|bos|> $A", special_tokens=[bos])
    model.enable_truncation(5)
    model.enable_padding(length=64)
    model.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_nothing_is_added_cut_or_padded(folder):
    loaded = load_tokenizer(folder)
    ids = loaded.encode(TEXT)
    assert loaded._model.token_to_id("<|bos|>") not in ids
    assert len(ids) > 5
    assert loaded.decode(ids) == TEXT


def test_spelled_out_symbols_are_text(folder):
    loaded = load_tokenizer(folder)
    control = {loaded.mask_id, *(loaded._model.token_to_id(name) for name in SPECIAL)}
    assert not control & set(loaded.encode(TEXT))


def test_a_batch_gives_what_single_texts_give(folder, texts):
    loaded = load_tokenizer(folder)
    for ids, text in zip(loaded.encode_batch([TEXT, *texts], "batch"), [TEXT, *texts], strict=True):
        assert ids.dtype == np.int32
        assert ids.tolist() == loaded.encode(text)


def test_a_copy_for_a_worker_is_the_same(folder):
    loaded = load_tokenizer(folder, "<|im_end|>")
    copied = pickle.loads(pickle.dumps(loaded))
    assert copied.encode(TEXT) == loaded.encode(TEXT)
    path = folder / "tokenizer.json"
    assert copied.info(path) == loaded.info(path)
    assert copied.content() == loaded.content()


def test_the_mask_is_appended_once(folder, tmp_path):
    loaded = load_tokenizer(folder)
    assert loaded.mask_id == 500
    assert loaded.vocab_size == 501
    assert loaded.pad_id == loaded.mask_id
    (tmp_path / "again").mkdir()
    path = loaded.save(tmp_path / "again")
    again = load_tokenizer(path)
    assert (again.mask_id, again.vocab_size) == (500, 501)
    assert again.info(path) == loaded.info(path)
    assert again.encode(TEXT) == loaded.encode(TEXT)
    assert json.loads(path.read_text())["added_tokens"][-1]["content"] == HUGGINGFACE_MASK


def test_gaps_among_added_ids_count(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    gapped = {**values["added_tokens"][0], "id": 700, "content": "<|late|>"}
    values["added_tokens"].append(gapped)
    path.write_text(json.dumps(values))
    loaded = load_tokenizer(path)
    highest = max(loaded._model.get_vocab(with_added_tokens=True).values())
    assert loaded.vocab_size == highest + 1
    assert loaded.mask_id <= highest


@pytest.mark.parametrize("written", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
def test_the_eos_comes_from_tokenizer_config(folder, written):
    usual = load_tokenizer(folder)
    assert usual.eos_id == usual._model.token_to_id("<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": written}))
    loaded = load_tokenizer(folder)
    assert loaded.eos_id == loaded._model.token_to_id("<|im_end|>")
    named = load_tokenizer(folder, "<|bos|>")
    assert named.eos_id == named._model.token_to_id("<|bos|>"), "the config key has the last word"
    loaded.save(folder)
    assert load_tokenizer(folder).eos_id == loaded.eos_id


def test_transformers_reads_what_is_saved(folder):
    transformers = pytest.importorskip("transformers")
    loaded = load_tokenizer(folder, "<|im_end|>")
    loaded.save(folder)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.mask_token_id == loaded.mask_id
    assert theirs.eos_token_id == loaded.eos_id


def test_a_missing_eos_is_named(folder):
    with pytest.raises(UserError, match=r"tokenizer\.eos_token: .* has none of <\|nope\|>"):
        load_tokenizer(folder, "<|nope|>")


def test_a_broken_tokenizer_config_is_named(folder):
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: not a JSON object"):
        load_tokenizer(folder)


def test_a_mask_of_its_own_is_used(folder):
    path = folder / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(str(path))
    model.add_special_tokens([AddedToken(HUGGINGFACE_MASK, special=True), "<|after|>"])
    model.save(str(path))
    loaded = load_tokenizer(path)
    assert (loaded.mask_id, loaded.vocab_size) == (500, 502)


def test_the_saved_file_adds_nothing_in_front_either(folder, tmp_path):
    """Others read it, transformers first, and training never saw the token."""
    from transformers import AutoTokenizer

    loaded = load_tokenizer(folder)
    saved = tmp_path / "saved"
    saved.mkdir()
    loaded.save(saved)
    text = "def f(x): return x"
    assert AutoTokenizer.from_pretrained(saved)(text).input_ids == loaded.encode(text)
    assert load_tokenizer(saved).content() == loaded.content()


def own_piece():
    """A unigram model that has `</s>` in its own vocabulary."""
    model = tokenizers.Tokenizer(models.Unigram())
    model.pre_tokenizer, model.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
    )
    model.train_from_iterator(["of the and to in is it you < / s > | endoftext"] * 50, trainer)
    return model, "</s>"


def added_piece():
    """A byte-level BPE with an added token that it does not call special."""
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet)
    model.train_from_iterator(["of the and to in is it you"] * 50, trainer)
    model.add_tokens([AddedToken("<|endoftext|>", special=False, normalized=False)])
    return model, "<|endoftext|>"


@pytest.mark.parametrize("make", [own_piece, added_piece])
def test_control_tokens_never_come_out_of_text_whatever_the_file_makes_of_them(make, tmp_path):
    model, eos = make()
    model.save(str(tmp_path / "tokenizer.json"))
    text = f"of the and{eos}to in {eos} it is{eos}{eos}"
    assert model.token_to_id(eos) in model.encode(text, add_special_tokens=False).ids
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": eos}))
    loaded = load_tokenizer(tmp_path)
    assert loaded.eos_id == model.token_to_id(eos)
    control = {loaded.eos_id, loaded.bos_id, loaded.mask_id}
    for encoder in loaded.encoders:
        (ids,) = loaded.encode_batch([text], encoder)
        assert not control & set(ids.tolist())
        assert loaded.decode(ids.tolist()) == text
    plain = "of the and to in it is"
    assert loaded.encode(plain) == model.encode(plain, add_special_tokens=False).ids
    assert pickle.loads(pickle.dumps(loaded)).encode(text) == loaded.encode(text)


@pytest.mark.parametrize(
    ("name", "special"),
    [("<|reserved_special_token_0|>", True), ("<unused0>", False), ("<|placeholder1|>", True),
     ("<SPECIAL_20>", True), ("[unused1]", True)],
)  # fmt: skip
def test_a_token_in_reserve_becomes_the_mask(folder, tmp_path, name, special):
    path = folder / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(str(path))
    model.add_tokens([AddedToken(name, special=special), AddedToken("<more_1>", special=True)])
    model.save(str(path))
    loaded = load_tokenizer(folder)
    assert loaded.mask_id == model.token_to_id(name)
    assert loaded.vocab_size == model.get_vocab_size()
    text = f"a {name} b"
    assert loaded.mask_id not in loaded.encode(text)
    assert loaded.decode(loaded.encode(text)) == text
    saved = tmp_path / "saved"
    saved.mkdir()
    loaded.save(saved)
    again = load_tokenizer(saved)
    assert again.mask_id == pickle.loads(pickle.dumps(loaded)).mask_id == loaded.mask_id
    assert json.loads((saved / "tokenizer_config.json").read_text())["mask_token"] == name


def test_a_mask_token_goes_before_one_in_reserve(folder):
    path = folder / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(str(path))
    model.add_special_tokens(["<unused0>", HUGGINGFACE_MASK])
    model.save(str(path))
    assert load_tokenizer(folder).mask_id == model.token_to_id(HUGGINGFACE_MASK)


def test_vocabularies_are_compared_but_for_an_appended_mask(folder, tmp_path):
    loaded = load_tokenizer(folder)
    assert loaded.same_ids(pickle.loads(pickle.dumps(loaded)))
    path = folder / "tokenizer.json"
    model = tokenizers.Tokenizer.from_file(str(path))
    model.add_tokens(["<unused0>"])
    model.save(str(path))
    assert not loaded.same_ids(load_tokenizer(folder))
