"""Task evals through lm-evaluation-harness, an optional extra.

Source: Gao et al., *The Language Model Evaluation Harness* (EleutherAI/lm-evaluation-harness).
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.tokenizers.load import Tokenizer
from pipeline.distributed import World
from pipeline.evals.config import TasksConfig
from pipeline.evals.decoders import answering_decoders
from pipeline.evals.totals import Cost
from pipeline.model.transformer import Transformer
from tidar_common.config import first_line
from tidar_common.errors import UserError

if TYPE_CHECKING:
    from pipeline.evals.lm_eval_model import TidarLM

BOOTSTRAP_ROUNDS = 1000
"""For the standard errors of metrics that have no formula for it."""


def evaluate_tasks(
    model: Transformer, tokenizer: Tokenizer, config: TasksConfig, world: World
) -> dict[str, Any]:
    """Scores by task and group, equal on all ranks; keys as in `docs/evals.md`.

    All tasks run with the first decoder; with the others only those that generate.

    Raises:
        UserError: when lm-eval is not installed, a task is not known, or the model cannot draft.
    """
    decoders = answering_decoders(config.decoders, config.trust, model, "evals.tasks.decoders")
    try:
        import lm_eval

        from pipeline.evals.lm_eval_model import TidarLM
    except ModuleNotFoundError as error:
        raise UserError(
            f"evals=tasks: needs lm-eval ({error}); pip install 'tidar-pretrain[eval]'"
        ) from error
    manager = _task_manager(config)
    tasks = list(config.tasks)
    first: dict[str, Any] = {}
    by_decoder: dict[str, Any] = {}
    for decoder in decoders:
        adapter = TidarLM(model, tokenizer, config, decoder, world)
        scores = world.from_main(_evaluate(adapter, tasks, manager))
        costs = _costs(adapter, world)
        first = first or scores
        by_decoder[decoder.name] = {
            "trust": decoder.trust,
            "results": {task: scores["results"][task] for task in costs},
            "generation": costs,
        }
        tasks = list(costs)
        if not tasks:
            break
    return {
        "lm_eval_version": lm_eval.__version__,
        "limit": config.limit,
        "results": first["results"],
        "groups": first.get("groups") or {},
        "versions": first["versions"],
        "n_shot": first["n-shot"],
        "n_samples": first["n-samples"],
        "decoders": by_decoder,
    }


def _evaluate(adapter: "TidarLM", tasks: list[str], manager: Any) -> Any:
    """The library's results of `tasks`, None on ranks but the first."""
    import lm_eval

    config = adapter.config
    try:
        return lm_eval.simple_evaluate(
            model=adapter,
            tasks=tasks,
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


def _task_manager(config: TasksConfig) -> Any:
    """Finds the tasks asked for; raises UserError naming one that is nowhere.

    Listing the library's thousands of tasks takes many seconds, so one's own come first.
    """
    from lm_eval.tasks import TaskManager

    folder = Path(config.tasks_dir).expanduser() if config.tasks_dir else None
    unknown = config.tasks
    for with_library in (False, True) if folder else (True,):
        manager = TaskManager(include_path=folder, include_defaults=with_library)
        unknown = [name for name in config.tasks if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise UserError(
        f"evals.tasks.tasks: no task named {unknown[0]}; `lm-eval ls tasks` lists those of the "
        "library, evals.tasks.tasks_dir adds your own"
    )


def _costs(adapter: "TidarLM", world: World) -> dict[str, dict[str, Any]]:
    """What each task that generates cost, over all ranks."""
    totals: dict[str, Cost] = {}
    for part in world.gather(dict(adapter.generated)):
        for task, cost in part.items():
            totals[task] = totals.get(task, Cost()) + cost
    return {task: total.rates() for task, total in totals.items()}


def task_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One column for each task, or for each decoder of a task that generates: its scores, and the
    tokens per forward and second that they were made with, with the share of distinct 4-grams."""
    rows = []
    for task, scores in results["results"].items():
        generated = {
            name: part for name, part in results["decoders"].items() if task in part["results"]
        }
        if not generated:
            rows.append({"task": task, **_numbers(scores)})
        for name, part in generated.items():
            cost = part["generation"][task]
            speed = {
                key: cost[key]
                for key in ("tokens_per_forward", "tokens_per_second", "distinct_4grams")
            }
            rows.append({"task": task, "decoder": name, **_numbers(part["results"][task]), **speed})
    return rows


def _numbers(scores: dict[str, Any]) -> dict[str, float]:
    return {
        name.removesuffix(",none"): value
        for name, value in scores.items()
        if isinstance(value, int | float)
    }
