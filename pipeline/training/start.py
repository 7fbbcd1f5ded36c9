"""The model before the first step: built where it will live, with no more than one of its tensors
whole beside it.

ZeRO 0 to 2: every process builds the model on its own device in the run's type. ZeRO 3: every
parameter is cut up as soon as it exists, and filled one after another; rank 0 reads, the others
take their share of what it sends.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from pipeline.checkpoint.read import DTYPES
from pipeline.distributed import World
from pipeline.model.config import ModelConfig
from pipeline.model.loading import check_shape, load_into, open_source
from pipeline.model.opening import Opening, whole
from pipeline.model.transformer import Transformer
from pipeline.training.engine import deepspeed_settings
from pipeline.training.settings import TrainSettings


def build_model(
    settings: TrainSettings, config: ModelConfig, world: World, say: Callable[[str], None]
) -> Transformer:
    """The model of a new run, drawn from the seed or read from `init_from`; all ranks call it.

    Raises:
        UserError: when the weights at `init_from` cannot be used.
    """
    source = None if settings.init_from is None else open_source(settings.init_from)
    if source is not None:
        check_shape(source, config)
    model, opened = allocate(settings, config, world)
    if source is None:
        model.initialize(settings.seed, opened)
    else:
        mask = load_into(model, source, opened, settings.seed)
        if mask is not None:
            say(f"mask token {config.mask_token_id}: embedding with {mask}")
    if settings.freeze_base:
        model.freeze_base()
    model.checkpoint_activations(settings.activation_checkpointing)
    return model.compile_layers() if settings.compile else model


def allocate(
    settings: TrainSettings, config: ModelConfig, world: World
) -> tuple[Transformer, Opening]:
    """A model whose weights are yet to be set, and how to open them for that."""
    if settings.deepspeed.stage < 3:
        return Transformer.empty(config, world.device, DTYPES[settings.precision]), whole
    import deepspeed

    accumulation = settings.accumulation_steps(world.size)
    cutting = deepspeed.zero.Init(
        config_dict_or_path=deepspeed_settings(
            settings.optimizer,
            settings.deepspeed,
            settings.precision,
            settings.micro_batch_size,
            accumulation,
        ),
        # The type follows from these settings; given by itself, DeepSpeed ignores it on a CPU.
        # Its replacement of `F.linear` saves memory that torch's own no longer takes.
        mem_efficient_linear=False,
    )
    with cutting:
        model = Transformer(config)
    return model, opened_by_rank_0(world)


def opened_by_rank_0(world: World) -> Opening:
    """Gathers a parameter on all ranks; what rank 0 writes into it is what all keep."""
    import deepspeed

    @contextmanager
    def opened(parameter: nn.Parameter) -> Iterator[bool]:
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            yield world.is_main

    return opened
