"""`tidar-generate`: continue a prompt; new text on stdout as it comes, a summary on stderr."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from data_prep.cli import run
from data_prep.config import existing_path, parse
from data_prep.errors import UserError
from pipeline.decoding import stream
from pipeline.decoding.sampling import Sampling
from pipeline.decoding.text import TextStream
from pipeline.model.loading import load_model
from pipeline.terminal import EXIT_INTERRUPTED, reader_may_leave, use_colors, write_text


@dataclass(frozen=True)
class GenerateConfig:
    """Keys of `conf/generate.yaml`; values are checked where they are used."""

    checkpoint: str
    prompt: str = ""
    prompt_file: str | None = None
    method: str = "tidar"
    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0
    trust: float = 1.0
    block_size: int | None = None
    dtype: str | None = None
    device: str | None = None
    colors: str = "auto"


def generate_text(cfg: DictConfig) -> int:
    checkpoint = existing_path(cfg, "checkpoint", "a checkpoint, an export or a model folder")
    config = parse(GenerateConfig, cfg, "")
    colors = use_colors(config.colors)
    sampling = Sampling(config.temperature, config.trust, config.seed)
    text = read_prompt(config)
    model, tokenizer = load_model(checkpoint, dtype=config.dtype, device=config.device)
    # Documents were trained without a token in front, so a prompt gets none; where there is no
    # prompt at all, the end token of the document before has to do.
    prompt = tokenizer.encode(text) or [tokenizer.eos_id]
    steps = stream(
        model,
        prompt,
        method=config.method,
        block_size=config.block_size,
        max_new_tokens=config.max_new_tokens,
        sampling=sampling,
        eos_id=tokenizer.eos_id,
    )
    decoded = TextStream(tokenizer, prompt)
    tokens = forwards = code = 0
    started = time.perf_counter()
    with reader_may_leave():
        try:
            for new, _ in steps:
                tokens, forwards = tokens + len(new), forwards + 1
                write_text(decoded.add(new), forwards, colors)
        except KeyboardInterrupt:
            code = EXIT_INTERRUPTED
        write_text(decoded.end(), forwards, colors)
        write_text("\n", forwards, colors=False)
    report(config.method, tokens, forwards, time.perf_counter() - started)
    return code


def read_prompt(config: GenerateConfig) -> str:
    """The text to continue: `prompt`, standard input for `-`, or the content of `prompt_file`."""
    if config.prompt_file is None:
        return sys.stdin.read() if config.prompt == "-" else config.prompt
    if config.prompt:
        raise UserError("prompt: given together with prompt_file; use one of them")
    path = Path(config.prompt_file).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file: {path} is not a file of UTF-8 text ({error})") from error


def report(method: str, tokens: int, forwards: int, seconds: float) -> None:
    """The summary; the prompt's forward counts, and its time too."""
    ratio = f"{tokens / max(forwards, 1):.2f} tokens per forward, {tokens / seconds:.1f} tokens/s"
    print(f"{method}: {tokens} tokens, {forwards} forwards, {ratio}", file=sys.stderr)


def main() -> None:
    sys.exit(run("generate", generate_text, verbatim_keys=("prompt",)))


if __name__ == "__main__":
    main()
