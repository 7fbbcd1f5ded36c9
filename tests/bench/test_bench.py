"""Every benchmark from the command line to its JSON file, at toy size; and bad arguments."""

import json

import pytest

from bench.__main__ import BENCHMARKS, main

TOY_MODEL = ["--vocab-size", "40"]
TOY = {
    "train_step": [*TOY_MODEL, "--length", "32", "--micro-batch-size", "1", "--block-size", "4"],
    "attention": ["--lengths", "16", "40", "--tokens", "40", "--block-size", "4"],
    "head_loss": ["--rows", "12", "--vocab-size", "40", "--hidden-size", "8"],
    "decode": [
        *(*TOY_MODEL, "--block-sizes", "1", "3", "--cached", "5"),
        *("--batch-sizes", "1", "2", "--simulated-steps", "3"),
    ],
    "data": ["--max-bytes", "300000", "--vocab-size", "400", "--sequence-length", "64"],
}
RATIOS = {
    "train_step": {
        *(f"tidar, coverage {share} / ar" for share in ("1", "0.5", "0.25")),
        *(f"frozen, coverage {share} / ar" for share in ("1", "0.25")),
    },
    "attention": {
        f"S={s}, {documents}: {pair}"
        for s in (16, 40)
        for documents in ("one document", "documents")
        for pair in ("dense / causal", "tiles / causal", "dense / tiles")
    },
    "head_loss": {
        f"{name} / whole logits"
        for name in (
            "pieces",
            "pieces, smoothed",
            "pieces, tv",
            "pieces, kl",
            "pieces, blend",
            "pieces, dpace",
        )
    },
    "decode": {
        *("5 cached: K=1 / ar", "5 cached: K=3 / ar", "5 cached, batch 2: K=1 / ar"),
        *("host part of ar / ar", "host part of K=1 / ar"),
    },
    "data": {
        "wait for batches / training step",
        *(
            f"{model}, prepare with {workers}: share of the tokenizer's speed"
            for model in ("unigram", "bpe")
            for workers in ("1 worker", "2 workers")
        ),
        *(f"read: {way}: speed of webdataset's" for way in ("by offset", "sequences in order")),
    },
}


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_writes_what_it_measured(name, tmp_path, capsys):
    common = ["--rounds", "2", "--warmup", "0", "--results", str(tmp_path)]
    assert main([name, *TOY[name], *common]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name == f"{name}-cpu.json"
    result = json.loads(path.read_text())
    assert result["benchmark"] == name
    assert result["machine"]["threads"] == 1
    assert result["machine"]["torch"]
    assert result["command"].startswith("python -m bench")
    assert result["variants"]
    for variant in result["variants"].values():
        for clock in ("wall_seconds", "cpu_seconds"):
            times = variant[clock]
            assert 0 <= times["min"] <= times["median"] <= times["max"]
    assert set(result["ratios"]) == RATIOS[name]
    for value in result["ratios"].values():
        assert value["wall"]["of_medians"] > 0
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert all(row in printed for row in result["variants"])


def test_options_reach_the_result(tmp_path):
    common = ["--rounds", "1", "--warmup", "0", "--results", str(tmp_path)]
    assert main(["decode", *TOY["decode"], "--temperature", "0.5", *common]) == 0
    result = json.loads((tmp_path / "decode-cpu.json").read_text())
    assert result["options"]["temperature"] == 0.5
    assert result["options"]["block_sizes"] == [1, 3]
    queries = {name: v["queries"] for name, v in result["variants"].items() if "queries" in v}
    assert queries == {
        "5 cached: ar": 1, "5 cached: K=1": 2, "5 cached: K=3": 12,
        "5 cached, batch 2: ar": 2, "5 cached, batch 2: K=1": 4,
        "ar": 1, "host part of ar": 1, "host part of K=1": 2,
    }  # fmt: skip
    even = {
        n: v for n, v in result["figures"].items() if n.endswith("tokens a forward to break even")
    }
    assert even
    for name, value in even.items():
        step = result["ratios"][name.removesuffix(": tokens a forward to break even") + " / ar"]
        assert value == step["wall"]["of_medians"]
    curve = [v for n, v in result["figures"].items() if n.startswith("latency curve, ")]
    assert len(curve) >= 9
    assert all(value > 0 for value in curve)
    simulated = [name for name, v in result["variants"].items() if v.get("simulated")]
    assert len(simulated) == 4
    assert all(name.startswith("simulated ") for name in simulated)


def test_more_coverage_takes_more_memory(tmp_path):
    common = ["--rounds", "1", "--warmup", "0", "--results", str(tmp_path)]
    length = ["--length", "256", "--micro-batch-size", "1"]
    assert main(["train_step", *TOY_MODEL, *length, *common]) == 0
    variants = json.loads((tmp_path / "train_step-cpu.json").read_text())["variants"]
    names = ("ar", "tidar, coverage 0.25", "tidar, coverage 0.5", "tidar, coverage 1")
    peaks = [variants[name]["peak_bytes"] for name in names]
    assert peaks == sorted(peaks)
    assert 1.5 * peaks[0] < peaks[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nope"], "nope: no such benchmark; known are train_step, attention"),
        (["decode", "--device", "tpu"], "--device: unknown value 'tpu'; known are cpu and cuda"),
        (["--device", "meta"], "--device: 'meta' is not supported; known are cpu and cuda"),
        (["--device", "cuda:99"], "--device: cuda:99 is not on this machine; use --device cpu"),
        (["decode", "--length", "5"], "unrecognized arguments: --length 5; python -m bench"),
        (["decode", "--rounds", "many"], "argument --rounds: invalid int value: 'many'"),
        (["--rounds", "0"], "--rounds and --threads must be at least 1"),
        (["train_step", "--length", "0"], "--length: must be at least 1, got 0"),
        (["decode", "--block-sizes", "4", "0"], "--block-sizes: must be at least 1, got 0"),
        (["train_step", "--model", "huge"], "--model: unknown shape 'huge'; known are"),
        (["train_step", "--precision", "fp8"], "--precision: unknown value 'fp8'; known are"),
        (["train_step", "--document-tokens", "1"], "--document-tokens: must be at least 2"),
    ],
)
def test_a_bad_argument_is_one_line(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--results", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BENCHMARKS)
def test_help_explains_every_option(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for field in BENCHMARKS[name].Options.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in shown
    assert f"options of {name}" in shown
