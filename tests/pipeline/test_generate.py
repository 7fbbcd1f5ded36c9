"""`tidar-generate`: any prompt, text as it comes, one summary, quiet when the reader leaves."""

import io
import random
import re
import subprocess
import sys

import commands
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from small_models import (
    huggingface_tokenizer,
    random_model,
    sentencepiece_tokenizer,
    small_config,
    write_checkpoint,
)

from pipeline import generate as command
from pipeline.decoding import generate, terminal
from pipeline.decoding.config import GenerateConfig
from pipeline.decoding.prompts import read_prompt, read_prompts
from pipeline.decoding.text import TextStream, token_texts
from pipeline.model.loading import load_model
from tidar_common import cli
from tidar_common.config import parse
from tidar_common.errors import UserError

PROMPTS = [
    'def f(x: int = 3):\n\treturn {"a": [1, 2], \'b\': f(x)}  # "q" \'r\'\r\n',
    "$HOME ${interpolation} \\${escaped} \\\\${twice} $$ ${",
    "C:\\path\\ and \\' \\\" \\n",
    "  spaces around  ",
    "a,b=c;d|e&f<g>(h)~!%^*@#`?/",
    "[1, 2]", "{k: v}", "null", "true", "3.14", "???!", "key=value", "\\", "'", '"',
    "日本語 🙂 \u2581",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "step"
    return write_checkpoint(folder, random_model(small_config()), sentencepiece_tokenizer())


def call(monkeypatch, *overrides) -> int:
    """Run the command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["tidar-generate", *overrides])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    return stopped.value.code


def expected_text(checkpoint, prompt: str, **options) -> tuple[str, int, int]:
    """Text, tokens and forwards of the library's own `generate`."""
    model, tokenizer = load_model(checkpoint, device="cpu")
    ids = tokenizer.encode(prompt) or [tokenizer.eos_id]
    result = generate(model, ids, eos_id=tokenizer.eos_id, **options)
    whole = tokenizer.decode(ids + result.tokens)
    return whole[len(tokenizer.decode(ids)) :], len(result.tokens), result.forwards


@pytest.mark.parametrize("prompt", [*PROMPTS, ""])
def test_prompts_arrive_letter_for_letter(monkeypatch, prompt):
    seen = []
    monkeypatch.setattr(sys, "argv", ["tidar-generate", "checkpoint=x", f"prompt={prompt}"])
    code = cli.run("generate", lambda cfg: seen.append(cfg.prompt), verbatim_keys=("prompt",))
    assert code == 0
    assert seen == [prompt]


def test_any_mix_of_special_characters_survives_quoting():
    rng = random.Random(0)
    parser = OverridesParser.create()
    for _ in range(300):
        text = "".join(rng.choice("\\${}'\"?~,=:()[] \nab.%") for _ in range(rng.randrange(1, 14)))
        if text == "???":  # a missing value to OmegaConf, which has no escape for it
            continue
        override = parser.parse_override(cli.quote_verbatim(f"prompt={text}", ("prompt",)))
        assert OmegaConf.create({"prompt": override.value()}).prompt == text


def test_other_keys_keep_the_grammar_of_hydra(monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "argv", ["x", "checkpoint=${prompt}", "prompt=run", "seed=3"])
    cli.run(
        "generate", lambda cfg: seen.append((cfg.checkpoint, cfg.seed)), verbatim_keys=("prompt",)
    )
    assert seen == [("run", 3)]


@pytest.mark.parametrize("method", ["tidar", "ar"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_text_is_that_of_generate(monkeypatch, capsys, checkpoint, method, temperature):
    code = call(
        monkeypatch, f"checkpoint={checkpoint}", "prompt=def add(", f"method={method}",
        f"temperature={temperature}", "seed=5", "max_new_tokens=40", "device=cpu", "blocks=all",
    )  # fmt: skip
    assert code == 0
    text, tokens, forwards = expected_text(
        checkpoint, "def add(", method=method, temperature=temperature, seed=5, max_new_tokens=40
    )
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert re.fullmatch(
        rf"{method}: {tokens} tokens, {forwards} forwards, {tokens / forwards:.2f} tokens per "
        r"forward, [\d.]+ tokens/s\n",
        err,
    )


def test_the_real_command_line(checkpoint):
    prompt = "".join(PROMPTS)
    done = subprocess.run(
        commands.command("pipeline.generate", f"checkpoint={checkpoint}", f"prompt={prompt}",
                         "max_new_tokens=20"),
        capture_output=True, cwd=commands.ROOT, check=True,
    )  # fmt: skip
    text, tokens, _ = expected_text(checkpoint, prompt, max_new_tokens=20)
    assert done.stdout.decode() == text + "\n"
    first, *rest = done.stderr.decode().splitlines()
    assert first.startswith(f"tidar: {tokens} tokens, ")
    assert [line.startswith("step chosen while decoding: ") for line in rest] in ([], [True])


def test_prompts_are_taken_letter_for_letter_and_refused_where_they_are_not_text(
    monkeypatch, tmp_path
):
    crlf = b"line one\r\nline two\r\n"
    (tmp_path / "crlf.txt").write_bytes(crlf)
    assert read_prompt("", str(tmp_path / "crlf.txt")) == crlf.decode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(crlf)))
    assert read_prompt("-", None) == crlf.decode()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"^prompt_file: .*latin\.txt: is not UTF-8 text"):
        read_prompt("", str(tmp_path / "latin.txt"))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9")))
    with pytest.raises(UserError, match=r"^prompt: standard input: is not UTF-8 text"):
        read_prompt("-", None)
    with pytest.raises(UserError, match=r"^prompt: is not UTF-8 text"):
        read_prompt("caf\udce9", None)  # as Python gives such a byte of the command line


def test_prompts_of_a_file_that_are_not_text_are_told_and_the_others_read(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(
        b'{"prompt": "fine"}\r\n{"prompt": "half \\ud83d pair"}\n{"prompt": "caf\xe9"}\n'
        b'{"prompt": "\\ud83d\\ude42"}\n'
    )
    rows = read_prompts(path, "prompts_file")
    assert [(row.id, row.prompt) for row in rows] == [("0", "fine"), ("3", "\U0001f642")]
    told = capsys.readouterr().err.splitlines()
    assert [line.split(": is not UTF-8")[0] for line in told] == [
        f"prompts_file: {path}:{number}" for number in (2, 3)
    ]


def test_escapes_in_stop_strings_are_what_they_stand_for():
    with initialize_config_dir(str(cli.config_dir()), version_base="1.3"):
        stops = r'stop=["\n\n", "a\tb", "\\n", "\u00e9", "\d"]'
        cfg = compose("generate", ["checkpoint=x", stops])
    options = parse(GenerateConfig, cfg, "").options(sentencepiece_tokenizer(), print)
    assert options.stop is not None
    assert options.stop.strings == ("\n\n", "a\tb", "\\n", "é", "\\d")


def test_rows_behind_the_tokenizer_are_never_drawn(tmp_path):
    """A matrix padded for tensor cores, whose rows behind the text are the likeliest."""
    tokenizer = sentencepiece_tokenizer()
    known = tokenizer.vocab_size
    model = random_model(small_config(vocab_size=known + 60)).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[known:] *= 30
    folder = write_checkpoint(tmp_path / "step", model, tokenizer)
    loaded, _ = load_model(folder, device="cpu")
    for options in (
        {"method": "ar"}, {"temperature": 3.0}, {"temperature": 3.0, "trust": 0.0},
        {"temperature": 1.0, "trust": 0.5, "repetition_penalty": 1.5},
        {"method": "block_diffusion", "temperature": 1.0}, {"temperature": 0.0},
    ):  # fmt: skip
        drawn = generate(loaded, [3, 4], max_new_tokens=24, **options).tokens
        assert max(drawn) < known, options
        wild = generate(model, [3, 4], max_new_tokens=24, **options).tokens
        assert max(wild) >= known, options
    with torch.no_grad():
        some, every = (one(torch.tensor([[3, 4]])) for one in (loaded, model))
    expected = torch.log_softmax(every[..., :known], -1)
    torch.testing.assert_close(torch.log_softmax(some, -1)[..., :known], expected)


def test_prompts_from_standard_input_and_files(monkeypatch, capsys, checkpoint, tmp_path):
    (tmp_path / "start.txt").write_text(PROMPTS[0], newline="")
    text, _, _ = expected_text(checkpoint, PROMPTS[0], max_new_tokens=10)
    file = f"prompt_file={tmp_path}/start.txt"
    assert call(monkeypatch, f"checkpoint={checkpoint}", file, "max_new_tokens=10") == 0
    assert capsys.readouterr().out == text + "\n"
    done = subprocess.run(
        commands.command("pipeline.generate", f"checkpoint={checkpoint}", "prompt=-",
                         "max_new_tokens=10"),
        input=PROMPTS[0].encode(), capture_output=True, cwd=commands.ROOT, check=True,
    )  # fmt: skip
    assert done.stdout.decode() == text + "\n"
    assert call(monkeypatch, f"checkpoint={checkpoint}", file, "prompt=x") == 2
    assert "prompt_file" in capsys.readouterr().err
    assert call(monkeypatch, f"checkpoint={checkpoint}", "prompt_file=/nowhere") == 2
    assert "prompt_file: /nowhere" in capsys.readouterr().err


def test_without_a_prompt_it_starts_after_an_end_token(monkeypatch, capsys, checkpoint):
    assert call(monkeypatch, f"checkpoint={checkpoint}", "max_new_tokens=10") == 0
    assert capsys.readouterr().out == expected_text(checkpoint, "", max_new_tokens=10)[0] + "\n"


def test_it_stops_at_the_end_token(monkeypatch, capsys, tmp_path):
    """A model whose first hidden feature is always large, and makes the end token likely."""
    model = random_model(small_config(tie_embeddings=False))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = 5.0
        model.model.norm.weight.fill_(1.0)
        model.lm_head.weight[3] = torch.eye(32)[0] * 100
    folder = write_checkpoint(tmp_path / "step", model, sentencepiece_tokenizer())
    assert call(monkeypatch, f"checkpoint={folder}", "prompt=x", "method=ar") == 0
    out, err = capsys.readouterr()
    assert out == "\n"
    assert err.startswith("ar: 1 tokens, 1 forwards")


def test_a_reader_that_leaves_is_no_error(checkpoint):
    process = subprocess.Popen(
        commands.command("pipeline.generate", f"checkpoint={checkpoint}", "prompt=def",
                         "max_new_tokens=200", "method=ar"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=commands.ROOT,
    )  # fmt: skip
    process.stdout.read(1)
    process.stdout.close()
    stderr = process.stderr.read().decode()
    assert process.wait(60) == 0
    assert stderr.startswith("ar: ")
    assert stderr.count("\n") == 1


def test_an_interrupt_still_gives_the_summary(monkeypatch, capsys, checkpoint):
    real = command.stream

    def interrupted(*arguments, **options):
        for number, step in enumerate(real(*arguments, **options)):
            if number == 3:
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(command, "stream", interrupted)
    assert call(monkeypatch, f"checkpoint={checkpoint}", "prompt=def", "method=ar") == 130
    assert capsys.readouterr().err.startswith("ar: 3 tokens, 3 forwards")


def test_tokens_are_coloured_by_forward(monkeypatch, capsys, checkpoint):
    options = (f"checkpoint={checkpoint}", "prompt=def add(", "max_new_tokens=20")
    assert call(monkeypatch, *options, "colors=true") == 0
    coloured = capsys.readouterr().out
    assert call(monkeypatch, *options, "colors=auto") == 0  # not a terminal
    plain = capsys.readouterr().out
    color = r"\x1b\[(38;5;\d+|0)m"
    assert not re.search(color, plain)
    assert re.sub(color, "", coloured) == plain
    assert len(set(re.findall(r"38;5;(\d+)m", coloured))) > 1
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert terminal.use_colors("auto")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.use_colors("auto")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("max_new_tokens=many", "max_new_tokens: "),
        ("max_new_tokens=0", "max_new_tokens: must be at least 1"),
        ("temperature=-1", "temperature: "),
        ("trust=2", "trust: "),
        ("method=beam", "method: unknown value 'beam'"),
        ("colors=pink", "colors: unknown value 'pink'"),
        ("dtype=fp8", "dtype: unknown value 'fp8'"),
        ("block_size=0", "block_size: must be at least 1"),
        ("checkpoint=/nowhere", "checkpoint: /nowhere does not exist"),
        ("max_tokens=3", "max_tokens"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, checkpoint, override, message):
    assert call(monkeypatch, f"checkpoint={checkpoint}", "prompt=x", override) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("make", [sentencepiece_tokenizer, huggingface_tokenizer])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_text_streams_in_complete_characters(make, size):
    tokenizer = make()
    text = "naïve 日本語 🙂👩‍👧 \u2581 tab\t end \ufffd!"
    ids = tokenizer.encode(text)
    assert len(ids) > 2 * len(text.split())
    stream = TextStream(tokenizer, tokenizer.encode("before "))
    parts = [stream.add(ids[i : i + size]) for i in range(0, len(ids), size)]
    assert "".join(parts) + stream.end() == text
    assert stream.end() == ""
    assert sum(part.count("\ufffd") for part in parts) == 1, "that of the text, no half characters"
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_bytes_that_never_become_a_character_come_out_at_the_end():
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer.encode("a🙂")[:-2]
    stream = TextStream(tokenizer)
    assert "".join(stream.add([token]) for token in ids) == "a"
    assert stream.end() == tokenizer.decode(ids)[1:]
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)
