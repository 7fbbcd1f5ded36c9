"""`tidar-generate` with a file of prompts, stops and statistics."""

import json
import re

import pytest
from small_models import (
    huggingface_tokenizer,
    random_model,
    sentencepiece_tokenizer,
    small_config,
    write_checkpoint,
)
from test_generate import call, expected_text

from pipeline.decoding import terminal
from pipeline.decoding.terminal import ProgressLines

PROMPTS = ["def add(", "The rain", "x = [1,", "for number", ""]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "step"
    return write_checkpoint(folder, random_model(small_config()), sentencepiece_tokenizer())


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": p, "category": f"c{n}"}) for n, p in enumerate(PROMPTS))
    )
    return path


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_prompt_gets_the_text_it_gets_alone(
    monkeypatch, capsys, checkpoint, prompts, tmp_path, temperature
):
    output = tmp_path / "out.jsonl"
    command = (
        f"checkpoint={checkpoint}", f"prompts_file={prompts}", f"output={output}",
        "max_new_tokens=12", "batch_size=2", f"temperature={temperature}", "blocks=all", "seed=3",
    )  # fmt: skip
    assert call(monkeypatch, *command) == 0
    assert capsys.readouterr().err.startswith("tidar: ")
    found = {line["id"]: line for line in lines(output)}
    assert set(found) == {"0", "1", "2", "3", "4"}
    for number, prompt in enumerate(PROMPTS):
        text, tokens, forwards = expected_text(
            checkpoint, prompt, max_new_tokens=12, temperature=temperature, seed=3 + number
        )
        line = found[str(number)]
        # A character that the limit cuts is no text.
        shown = text if line["stopped_by"] == "eos" else text.rstrip("\ufffd")
        assert (line["prompt"], line["text"]) == (prompt, shown)
        assert (line["tokens"], line["forwards"]) == (tokens, forwards)
        assert line["category"] == f"c{number}"
    # Interrupted after two lines and a half: the rest is made, as it would have been.
    whole = output.read_text().splitlines(keepends=True)
    output.write_text("".join(whole[:2]) + whole[2][:20])
    assert call(monkeypatch, *command) == 0
    timeless = [{**line, "seconds": 0} for line in found.values()]
    again = [{**line, "seconds": 0} for line in lines(output)]
    assert sorted(again, key=lambda line: line["id"]) == sorted(timeless, key=lambda x: x["id"])
    assert output.read_text().startswith("".join(whole[:2]))
    # And a third time nothing is left to do; other settings are refused.
    before = output.read_text()
    assert call(monkeypatch, *command) == 0
    assert output.read_text() == before
    assert call(monkeypatch, *command[:-1], "seed=4") == 2
    assert "output: " in capsys.readouterr().err


def test_progress_is_told_in_lines_where_no_terminal_is(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: clock[0])
    lines = ProgressLines("share 1 of 2: ")
    # 40 of 100 were there; 10 more take 12 s, so the other 50 take a minute.
    for seconds, done, tokens in ((6.0, 40, 0), (9.0, 41, 50), (18.0, 50, 600), (20.0, 60, 700)):
        clock[0] = seconds
        lines.advance(done, 100, tokens)
    said = capsys.readouterr().err
    assert said == "share 1 of 2: prompts 50/100, 50 tokens/s, 0:01:00 left\n"


def test_stop_strings_and_statistics(monkeypatch, capsys, checkpoint):
    text, _, _ = expected_text(checkpoint, "def add(", max_new_tokens=30)
    stop = next(text[n : n + 2] for n in range(4, 40) if "\ufffd" not in text[n : n + 2])
    assert call(
        monkeypatch, f"checkpoint={checkpoint}", "prompt=def add(", "max_new_tokens=30",
        f"stop=[{json.dumps(stop)}]", "show=true",
    ) == 0  # fmt: skip
    out, err = capsys.readouterr()
    assert "\x1b[38;5;" in out
    counted, *_, histogram = err.splitlines()
    assert int(counted.split()[1]) < 30
    assert histogram.startswith("tokens a forward: 1: ")


def test_blocks_and_a_draft_model_leave_greedy_text_alone(
    monkeypatch, capsys, checkpoint, prompts, tmp_path
):
    text, _, _ = expected_text(checkpoint, "def add(", max_new_tokens=12)
    common = (f"checkpoint={checkpoint}", "max_new_tokens=12")
    ways = (
        ["blocks=[1]"], ["blocks=[]"], ["blocks=auto"], [],
        ["method=speculative", f"draft_model={checkpoint}"],
    )  # fmt: skip
    for number, way in enumerate(ways):
        assert call(monkeypatch, *common, "prompt=def add(", *way) == 0
        assert capsys.readouterr().out == text + "\n"
        output = tmp_path / f"{number}.jsonl"
        assert call(monkeypatch, *common, f"prompts_file={prompts}", f"output={output}", *way) == 0
        assert lines(output)[0]["text"] == text.rstrip("\ufffd")
    assert call(monkeypatch, *common, "prompt=x", "method=speculative") == 2
    assert "draft_model: method=speculative needs a smaller model" in capsys.readouterr().err
    other = write_checkpoint(
        tmp_path / "other", random_model(small_config()), huggingface_tokenizer()
    )
    assert call(monkeypatch, *common, "prompt=x", "method=speculative", f"draft_model={other}") == 2
    assert "was trained with another tokenizer" in capsys.readouterr().err


def test_the_chosen_step_is_shown_and_the_text_stays(monkeypatch, capsys, checkpoint):
    text, _, _ = expected_text(checkpoint, "def add(", max_new_tokens=120)
    command = (f"checkpoint={checkpoint}", "prompt=def add(", "max_new_tokens=120")
    assert call(monkeypatch, *command) == 0
    out, err = capsys.readouterr()
    assert out == text + "\n"
    chosen = err.splitlines()[1]
    assert re.fullmatch(r"step chosen while decoding: .* \(.*tokens/s expected\).*", chosen)
    assert call(monkeypatch, *command, "blocks=all") == 0
    assert "step chosen" not in capsys.readouterr().err
    # At a temperature too, where the text is another draw; all blocks keep a seed's text.
    assert call(monkeypatch, *command, "temperature=1") == 0
    assert "step chosen" in capsys.readouterr().err
    assert call(monkeypatch, *command, "temperature=1", "blocks=all") == 0
    assert "step chosen" not in capsys.readouterr().err


def test_block_diffusion_is_a_method(monkeypatch, capsys, checkpoint):
    options = {"method": "block_diffusion", "confidence": 0.3}
    text, tokens, forwards = expected_text(checkpoint, "def add(", max_new_tokens=20, **options)
    command = (f"checkpoint={checkpoint}", "prompt=def add(", "max_new_tokens=20")
    assert call(monkeypatch, *command, "method=block_diffusion", "confidence=0.3") == 0
    out, err = capsys.readouterr()
    assert out == text + "\n"
    assert err.startswith(f"block_diffusion: {tokens} tokens, {forwards} forwards")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prompts_file=/nowhere", "output=o.jsonl"], "prompts_file: /nowhere cannot be read"),
        (["prompts_file={prompts}"], "output: many prompts need one"),
        (["prompts_file={prompts}", "output=/no/where.jsonl"], "output: /no is not a folder"),
        (["prompts_file={prompts}", "output=o.jsonl", "prompt=x"], "given together with another"),
        (["prompts_file={prompts}", "output={prompts}"], "is not a line of tidar-generate"),
        (["top_p=0"], "top_p: must be above 0"),
        (["blocks=some"], "blocks: must be auto, all, or numbers"),
        (["blocks=[1,x]"], "blocks: must be auto, all, or numbers"),
        (["blocks=[1,9]"], "blocks: must be numbers in 1"),
        (["method=block_diffusion", "confidence=2"], "confidence: must be above 0"),
    ],
)
def test_mistakes_are_named(monkeypatch, capsys, checkpoint, prompts, overrides, message):
    given = [override.format(prompts=prompts) for override in overrides]
    assert call(monkeypatch, f"checkpoint={checkpoint}", *given) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_bad_file_of_prompts_is_named(monkeypatch, capsys, checkpoint, tmp_path):
    path = tmp_path / "bad.jsonl"
    for content, message in (
        ("", "holds no prompt"),
        ('{"prompt": "a"}\n{"text": "b"}\n', "bad.jsonl:2: not a JSON object"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n', "stands there twice"),
    ):
        path.write_text(content)
        overrides = (f"prompts_file={path}", f"output={tmp_path / 'o.jsonl'}")
        assert call(monkeypatch, f"checkpoint={checkpoint}", *overrides) == 2
        assert message in capsys.readouterr().err
