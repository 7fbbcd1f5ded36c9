"""`tidar-evaluate`: decode speed, likelihood and tasks of a trained model."""

import sys

from omegaconf import DictConfig

from tidar_common.cli import run


def evaluate(cfg: DictConfig) -> int:
    # Here, so that help and a mistake in a key do not wait for torch.
    from pipeline import load_model
    from pipeline.distributed import joined_world
    from pipeline.evals.run import EvaluateSettings, describe, run_evals, write_results

    settings = EvaluateSettings.from_config(cfg)
    with joined_world() as world:

        def say(text: str) -> None:
            if world.is_main:
                print(text, flush=True)

        model, tokenizer = load_model(
            settings.checkpoint, dtype=settings.dtype, device=settings.device_of(world)
        )
        results = run_evals(settings, model, tokenizer, world, say)
        say("\n" + describe(results))
        if settings.output is not None and world.is_main:
            write_results(settings.output, results)
            say(f"\nwritten to {settings.output}")
    return 0


def main() -> None:
    sys.exit(run("evaluate", evaluate))


if __name__ == "__main__":
    main()
