"""What a captured step needs, checked where nothing can be captured.

A CUDA graph replays the same kernels on the same memory. So a step may not ask the device for a
value, its width may not follow the lengths, and what it carries on must stay where it was.
"""

import pytest
import torch
from decoding_models import CPU, VOCABULARY, make_model, random_prompts
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.decoding import DecodeOptions, Sampling, generate_batch
from pipeline.decoding.cache import KVCache
from pipeline.decoding.engine import StepEngine
from pipeline.decoding.generation import finish_each
from pipeline.decoding.graphs import WIDTH_STEP
from pipeline.decoding.step import StepShape

ASKING = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal", "unique")
SETTINGS = [
    Sampling(),
    Sampling(temperature=1.0, top_k=5, top_p=0.9, repetition_penalty=1.2),
    Sampling(temperature=1.0, trust=0.5),
]


class Recorded(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

        self.floating_sums = 0
        """Running sums of floating numbers: on a GPU not the same twice, and refused there where
        runs are deterministic."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.names.add(name)
        self.floating_sums += "cumsum" in name and args[0].is_floating_point()
        return func(*args, **(kwargs or {}))


LINEAR = {"draft_rank": 5, "linear_drafts": True}
MODELS = [{}, {"draft_rank": 5}, LINEAR]
"""Without and with a draft head, and with one block for all counts."""


def static_engine(model, sampling, batch_size: int, keys: list, blocks=(1, 2, 4)) -> StepEngine:
    """An engine that goes the way of captured steps; every step is run as it is."""
    shape = StepShape.full(4) if sampling.trust < 1 else StepShape(4, 4, blocks)
    if model.config.linear_drafts:
        shape = StepShape.one_block(4)
    engine = StepEngine(model, sampling, shape, batch_size=batch_size, capacity=300)

    def run_each(key, run):
        keys.append(key)
        return run()

    engine._graphs = run_each
    return engine


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("changes", MODELS)
def test_steps_of_fixed_width_give_the_same_tokens(sampling, changes):
    model, keys = make_model(**changes), []
    prompts = random_prompts(0, (3, 245, 9, 30), VOCABULARY)
    engine = static_engine(model, sampling, 2, keys)
    runs = dict(finish_each(engine, prompts, DecodeOptions(max_new_tokens=30)))
    blocks = None if sampling.trust < 1 or "linear_drafts" in changes else [1, 2, 4]
    expected = generate_batch(
        model, prompts, DecodeOptions(sampling=sampling, blocks=blocks, max_new_tokens=30)
    )
    assert [runs[n].tokens for n in range(4)] == [run.tokens for run in expected]
    widths = {width for *_, width in keys}
    assert WIDTH_STEP in widths
    assert widths <= {WIDTH_STEP, engine.cache.capacity}


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize(
    ("changes", "blocks"),
    [({}, (1, 2, 4)), ({"draft_rank": 5}, (2, 4)), ({"draft_rank": 5}, ()), (LINEAR, (1,))],
)
def test_a_step_asks_the_device_for_nothing_and_moves_nothing(sampling, changes, blocks):
    model = make_model(**changes)
    engine = static_engine(model, sampling, 2, [], blocks)
    for row, prompt in enumerate(random_prompts(0, (5, 11), VOCABULARY)):
        engine.admit(row, prompt, row)
    engine.step()  # builds its tables
    state = {name: x for name, x in vars(engine.state).items() if isinstance(x, torch.Tensor)}
    places = {name: x.data_ptr() for name, x in state.items()}
    lengths = engine.cache.device_lengths
    assert lengths is not None
    with torch.inference_mode(), Recorded() as recorded:
        engine._advance(engine.shape, engine._table(engine.shape))
    assert "index_put_" in recorded.names  # the recorder sees what runs
    assert not {name for name in recorded.names if name.lstrip("_").startswith(ASKING)}
    assert "_local_scalar_dense" not in recorded.names
    assert recorded.floating_sums == 0
    for name, place in places.items():
        assert getattr(engine.state, name).data_ptr() == place, name
    assert engine.cache.device_lengths is lengths


@pytest.mark.parametrize("changes", [{}, {"causal_slots": True}, {"draft_rank": 5}])
@pytest.mark.parametrize("chunk", [512, 40])
def test_prompts_filled_up_to_few_sizes_give_the_same_tokens(changes, chunk):
    """As captured pieces of prompts are: one key for all lengths of a size."""
    model, keys = make_model(**changes), []
    prompts = random_prompts(0, (3, 31, 33, 60, 100, 1), VOCABULARY)
    expected = generate_batch(model, prompts, DecodeOptions(max_new_tokens=12, prefill_chunk=chunk))
    engine = StepEngine(model, Sampling(), StepShape.full(4), capacity=300, prefill_chunk=chunk)
    room = engine.cache.capacity
    engine.cache = KVCache(model.config, room, dtype=torch.float32, device=CPU, ragged=True)

    def run_each(key, run):
        keys.append(key)
        return run()

    engine._graphs = run_each
    runs = dict(finish_each(engine, prompts, DecodeOptions(max_new_tokens=12)))
    assert [runs[n].tokens for n in range(6)] == [run.tokens for run in expected]
    assert [runs[n].forwards for n in range(6)] == [run.forwards for run in expected]
    sizes = {key[0] for key in keys if isinstance(key[0], int)}
    assert sizes == ({32, 64, 128} if chunk == 512 else {32, 40})


@pytest.mark.parametrize("sampling", SETTINGS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_head_read_once_gives_the_same_tokens(sampling, batch_size, monkeypatch):
    model = make_model()
    prompts, options = random_prompts(0, (3, 9, 30), VOCABULARY), {"sampling": sampling}
    chosen = DecodeOptions(batch_size=batch_size, max_new_tokens=20, **options)
    expected = generate_batch(model, prompts, chosen)
    monkeypatch.setattr(StepEngine, "_head_once", lambda self, shape: bool(shape.blocks))
    got = generate_batch(model, prompts, chosen)
    assert [run.tokens for run in got] == [run.tokens for run in expected]


@pytest.mark.parametrize("sampling", SETTINGS[:2])
def test_another_step_reads_and_writes_the_same_memory(sampling):
    """So that steps captured before a change go on being right when it is changed back."""
    model, keys = make_model(), []
    engine = static_engine(model, sampling, 1, keys, (1, 2, 3, 4))
    room = engine.cache.capacity
    engine.cache = KVCache(model.config, room, dtype=torch.float32, device=CPU, ragged=True)
    (prompt,) = random_prompts(1, (6,), VOCABULARY)
    engine.admit(0, prompt, 0)
    state = {name: x for name, x in vars(engine.state).items() if isinstance(x, torch.Tensor)}
    full, small = engine.shape, StepShape(2, 2, (1, 2))
    text = [int(engine.state.current[0, 0])]
    for shape in (full, small, full, StepShape(1), full):
        engine.reshape(shape)
        for _ in range(3):
            text += engine.step()[0]
    for name, value in state.items():
        assert getattr(engine.state, name) is value, name
    assert len({key for key in keys if key[0] == full}) == 2, "the step, and the short one"
    if sampling.greedy:
        options = DecodeOptions(method="ar", max_new_tokens=len(text))
        assert text == generate_batch(model, [prompt], options)[0].tokens


def test_idle_rows_stay_as_they_are():
    model = make_model()
    engine = static_engine(model, Sampling(), 3, [])
    (prompt,) = random_prompts(1, (6,), VOCABULARY)
    engine.admit(1, prompt, 0)
    for _ in range(3):
        made = engine.step()
        assert made[0] == made[2] == []
        assert made[1]
    assert engine.cache.lengths[0] == engine.cache.lengths[2] == 0 < 6 < engine.cache.lengths[1]
    assert engine.cache.device_lengths.tolist() == engine.cache.lengths
