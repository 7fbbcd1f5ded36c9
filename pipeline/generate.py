"""`tidar-generate`: continue a prompt; new text on stdout as it comes, a summary on stderr."""

import sys
import time
from pathlib import Path

from omegaconf import DictConfig

from pipeline.decoding import stream
from pipeline.decoding.answers import generate_file
from pipeline.decoding.choice import Choice
from pipeline.decoding.config import GenerateConfig
from pipeline.decoding.prompts import Share, output_file, rank_device, read_prompt
from pipeline.decoding.terminal import (
    histogram,
    prompts_progress,
    reader_may_leave,
    report,
    show_steps,
    use_colors,
)
from pipeline.decoding.text import TextStream
from pipeline.model.loading import load_model
from tidar_common.cli import run
from tidar_common.config import existing_path, parse
from tidar_common.run_files import Exit


def generate_text(cfg: DictConfig) -> int:
    checkpoint = existing_path(cfg, "checkpoint", "a checkpoint, an export or a model folder")
    config = parse(GenerateConfig, cfg, "")
    if config.has_many:
        return generate_many(config, checkpoint)
    colors = use_colors("true" if config.show else config.colors)
    text = read_prompt(config.prompt, config.prompt_file)
    model, tokenizer = load_model(checkpoint, dtype=config.dtype, device=config.device)
    # Documents were trained without a token in front, so a prompt gets none; where there is no
    # prompt at all, the end token of the document before has to do.
    prompt = tokenizer.encode(text) or [tokenizer.eos_id]
    choices: list[Choice] = []
    steps = stream(model, prompt, config.options(tokenizer, choices.append))
    counts: list[int] = []
    code, started = 0, time.perf_counter()
    with reader_may_leave():
        code = show_steps(steps, TextStream(tokenizer, prompt), counts, colors)
    report(config.method, sum(counts), len(counts), time.perf_counter() - started, choices)
    if config.show:
        print(histogram(counts), file=sys.stderr)
    return code


def generate_many(config: GenerateConfig, checkpoint: Path) -> int:
    """Continue this process's share of many prompts, to a file of its own."""
    share, output = Share.of_process(config.array), output_file(config.output)
    share.refuse_others(output)
    rows = config.rows(share)
    model, tokenizer = load_model(checkpoint, dtype=config.dtype, device=rank_device(config.device))
    prompts = config.document_prompts(tokenizer, share) if rows is None else rows
    choices: list[Choice] = []
    options = config.options(tokenizer, choices.append)
    path, started = share.file(output), time.perf_counter()
    try:
        with prompts_progress(str(share)) as advance:
            summary = generate_file(model, tokenizer, prompts, path, options, share, advance)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return Exit.INTERRUPTED
    seconds = time.perf_counter() - started
    report(f"{share}{config.method}", summary.tokens, summary.forwards, seconds, choices)
    print(f"{path}: {summary.answers}", file=sys.stderr)
    return 0


def main() -> None:
    sys.exit(run("generate", generate_text, verbatim_keys=("prompt",)))


if __name__ == "__main__":
    main()
