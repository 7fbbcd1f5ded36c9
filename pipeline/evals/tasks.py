"""Task evals through lm-evaluation-harness, an optional extra.

Source: Gao et al., *The Language Model Evaluation Harness* (EleutherAI/lm-evaluation-harness).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import first_line
from data_prep.errors import UserError
from data_prep.tokenizers import Tokenizer
from pipeline.distributed import World
from pipeline.evals.settings import TasksConfig
from pipeline.model.transformer import Transformer

if TYPE_CHECKING:
    from pipeline.evals.lm_eval_model import TidarLM

BOOTSTRAP_ROUNDS = 1000
"""For the standard errors of metrics that have no formula for it."""


def evaluate_tasks(
    model: Transformer, tokenizer: Tokenizer, config: TasksConfig, world: World
) -> dict[str, Any]:
    """Scores by task and group, equal on all ranks; keys as in `docs/metrics.md`.

    Raises:
        UserError: when lm-eval is not installed, a task is not known, or the model cannot draft.
    """
    if config.method == "tidar" and model.config.mask_token_id is None:
        raise UserError(
            "evals.tasks.method: this model has no mask token, so it cannot draft; use "
            "evals.tasks.method=ar"
        )
    try:
        import lm_eval

        from pipeline.evals.lm_eval_model import TidarLM
    except ModuleNotFoundError as error:
        raise UserError(
            f"evals=tasks: needs lm-eval ({error}); pip install 'tidar-pretrain[eval]'"
        ) from error
    manager = _task_manager(config)
    adapter = TidarLM(model, tokenizer, config, world)
    try:
        found = lm_eval.simple_evaluate(
            model=adapter,
            tasks=config.tasks,
            num_fewshot=config.num_fewshot,
            limit=config.limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP_ROUNDS,
            confirm_run_unsafe_code=config.confirm_run_unsafe_code,
        )
    except OSError as error:  # not found, no network, or offline
        raise UserError(
            f"evals.tasks.tasks: the data of a task cannot be had ({first_line(error)}); fetch it "
            "first, or define the task on local files in evals.tasks.tasks_dir"
        ) from error
    except ValueError as error:
        if "confirm_run_unsafe_code" not in str(error):
            raise
        raise UserError(f"evals.tasks.confirm_run_unsafe_code: {first_line(error)}") from error
    found = world.from_main(found)
    return {
        "lm_eval_version": lm_eval.__version__,
        "method": config.method,
        "limit": config.limit,
        "results": found["results"],
        "groups": found.get("groups") or {},
        "versions": found["versions"],
        "n_shot": found["n-shot"],
        "n_samples": found["n-samples"],
        "generation": _generation(adapter, world),
    }


def _task_manager(config: TasksConfig) -> Any:
    """Finds the tasks asked for; raises UserError naming one that is nowhere.

    Listing the library's thousands of tasks takes many seconds, so one's own come first.
    """
    from lm_eval.tasks import TaskManager

    own = Path(config.tasks_dir).expanduser() if config.tasks_dir else None
    unknown = config.tasks
    for with_library in (False, True) if own else (True,):
        manager = TaskManager(include_path=own, include_defaults=with_library)
        unknown = [name for name in config.tasks if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise UserError(
        f"evals.tasks.tasks: no task named {unknown[0]}; `lm-eval ls tasks` lists those of the "
        "library, evals.tasks.tasks_dir adds your own"
    )


def _generation(adapter: "TidarLM", world: World) -> dict[str, dict[str, Any]]:
    """Answers, tokens and forwards of each task that generates, over all ranks."""
    totals: dict[str, dict[str, Any]] = {}
    for part in world.gather({name: vars(cost) for name, cost in adapter.generated.items()}):
        for task, cost in part.items():
            total = totals.setdefault(task, dict.fromkeys(cost, 0))
            totals[task] = {name: total[name] + value for name, value in cost.items()}
    for total in totals.values():
        total["tokens_per_forward"] = total["tokens"] / max(total["forwards"], 1)
    return totals


def task_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One column for each task: its scores, and tokens per forward where it generates."""
    rows = []
    for task, scores in results["results"].items():
        numbers = {
            name.removesuffix(",none"): value
            for name, value in scores.items()
            if isinstance(value, int | float)
        }
        generation = results["generation"].get(task, {})
        speed = {"tokens_per_forward": generation.get("tokens_per_forward")}
        rows.append({"task": task, **numbers, **speed})
    return rows
