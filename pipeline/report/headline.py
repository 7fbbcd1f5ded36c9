"""The figures at the top of the page, each with what it has to be read against, and warnings."""

from pipeline.report.read import Row, Run, as_number
from tidar_common.page import Tile
from tidar_common.tables import compact, fixed, percent

REPETITION_LIMIT = 0.5
"""Share of distinct 4-grams below which tokens per forward says little about the method."""


def headline(run: Run) -> list[Tile]:
    """The figures this run can show, most important first."""
    greedy, sampled = run.last_eval("tidar", 0.0), run.last_eval("tidar", 1.0)
    tiles: list[Tile] = []
    if greedy:
        tiles.append(_tokens_per_forward("Tokens per forward, greedy", greedy))
    if sampled:
        tiles.append(_tokens_per_forward("Tokens per forward, T = 1", sampled))
    if greedy:
        chosen = [run.last_eval("tidar_chosen", temperature) for temperature in (0.0, 1.0)]
        tiles += [_speed(greedy, sampled, *chosen), _exact_match(greedy), _first_draft(greedy)]
    tiles += [_ar_loss(run), _training(run)]
    if greedy:
        tiles.append(_repetition(greedy))
    return tiles


def _tokens_per_forward(label: str, row: Row) -> Tile:
    value = as_number(row.get("tokens_per_forward"))
    size = row.get("block_size")
    context = f"at most K = {size}; AR decoding has 1" if size else "AR decoding has 1"
    return Tile(label, fixed(value), f"{context}; prefill included")


def _speed(greedy: Row, sampled: Row | None, chosen: Row | None, drawn: Row | None) -> Tile:
    """That of the step chosen for the machine where it was measured, which is how one decodes."""
    best, other = (chosen, drawn) if chosen else (greedy, sampled)
    value = as_number(best.get("speedup_over_ar"))
    context = "tokens/s over AR's, same prompts and machine"
    if chosen:
        every = as_number(greedy.get("speedup_over_ar"))
        context += f", with the step chosen for it; {fixed(every)}× with every mask block"
    second = as_number(other.get("speedup_over_ar")) if other else None
    if second is not None:
        context += f"; {fixed(second)}× at T = 1"
    return Tile("Speed over AR, greedy", "–" if value is None else f"{value:.2f}×", context)


def _exact_match(greedy: Row) -> Tile:
    prompts = greedy.get("prompts")
    context = "prompts whose greedy text equals greedy AR's, token for token"
    if prompts:
        context = f"of {prompts} " + context
    return Tile("Exact match with AR", percent(as_number(greedy.get("exact_match_ar"))), context)


def first_acceptance(row: Row, name: str) -> float | None:
    """The value of a list over draft positions at position 1."""
    values = row.get(name) or [None]
    return as_number(values[0])


def _first_draft(greedy: Row) -> Tile:
    measured = first_acceptance(greedy, "acceptance_by_position")
    context = "greedy, draft position 1"
    for draft in ("unigram", "bigram"):
        share = first_acceptance(greedy, f"{draft}_acceptance")
        if share is not None:
            context += f"; a {draft} draft would get {percent(share)}"
    return Tile("First draft accepted", percent(measured), context)


def _ar_loss(run: Run) -> Tile:
    row = next(
        (row for row in run.latest_rows() if as_number(row.get("ar_loss")) is not None), None
    )
    if row is None:
        last = as_number(run.metrics[-1].get("loss_ar"))
        return Tile("AR loss, training", fixed(last), "nats per token at the last step")
    loss, entropy = as_number(row.get("ar_loss")), as_number(row.get("unigram_entropy"))
    context = "nats per token"
    if loss is not None and entropy is not None:
        side = "below" if loss <= entropy else "ABOVE"
        context += f"; {abs(entropy - loss):.2f} {side} the unigram entropy {entropy:.2f}"
    return Tile("AR loss, held out", fixed(loss), context)


def _training(run: Run) -> Tile:
    last = run.metrics[-1]
    planned = run.setting("steps")
    steps = f"{last['step']:,} steps"
    if isinstance(planned, int):
        steps = f"{last['step']:,} of {planned:,} steps"
    if run.parameters:
        steps += f"; {compact(run.parameters)} parameters"
    return Tile("Training tokens", compact(as_number(last.get("tokens"))), steps)


def _repetition(greedy: Row) -> Tile:
    share = as_number(greedy.get("distinct_4grams"))
    return Tile(
        "Distinct 4-grams, greedy",
        fixed(share),
        "share of the generated text's 4-grams; low means it repeats itself",
    )


def warnings(run: Run) -> list[str]:
    """What a reader could mistake for a success, or should know of a failure; plain text."""
    found: list[str] = []
    for temperature, words in ((0.0, "Greedy"), (1.0, "Sampled (T = 1)")):
        row = run.last_eval("tidar", temperature)
        if row:
            found += _row_warnings(row, words)
    greedy = run.last_eval("tidar", 0.0)
    if greedy:
        found += _greedy_warnings(greedy, run.last_eval("tidar_chosen", 0.0))
    return found


def _row_warnings(row: Row, words: str) -> list[str]:
    found = []
    distinct = as_number(row.get("distinct_4grams"))
    if distinct is not None and distinct < REPETITION_LIMIT:
        found.append(
            f"{words} text repeats itself: only {percent(distinct)} of its 4-grams are distinct. "
            "Repetition is easy to draft and inflates tokens per forward: do not take "
            f"{fixed(as_number(row.get('tokens_per_forward')))} for what varied text would get."
        )
    measured = first_acceptance(row, "acceptance_by_position")
    unigram = first_acceptance(row, "unigram_acceptance")
    if measured is not None and unigram is not None and measured <= unigram:
        found.append(
            f"{words}: the first draft is accepted no more often ({percent(measured)}) than one "
            f"that ignores the context would be ({percent(unigram)}). The model has not yet "
            "learned to draft."
        )
    own = as_number(row.get("expected_tokens_per_forward"))
    bigram = as_number(row.get("bigram_expected_tokens_per_forward"))
    if own is not None and bigram is not None and own <= bigram:
        found.append(
            f"{words}: on held-out text a table of token pairs would draft as well, "
            f"{fixed(bigram)} expected tokens per forward beside {fixed(own)}. The diffusion half "
            "does not pay for itself yet."
        )
    return found


def _greedy_warnings(greedy: Row, chosen: Row | None) -> list[str]:
    found = []
    loss, entropy = as_number(greedy.get("ar_loss")), as_number(greedy.get("unigram_entropy"))
    if loss is not None and entropy is not None and loss >= entropy:
        found.append(
            "The held-out AR loss is not below the unigram entropy: the model predicts no better "
            "than token frequencies, and acceptance says nothing yet."
        )
    match = as_number(greedy.get("exact_match_ar"))
    if match is not None and match < 1:
        found.append(
            f"Greedy TiDAR gave another text than greedy AR for {percent(1 - match)} of the "
            "prompts. They should be equal in fp32; in bf16, rounding can turn a near tie."
        )
    speed = as_number(greedy.get("speedup_over_ar"))
    best = as_number(chosen.get("speedup_over_ar")) if chosen else None
    if speed is not None and speed < 1 and (best is None or best < 1):
        found.append(
            f"TiDAR decoded more slowly than AR here ({speed:.2f}×). A step computes K + K² tokens "
            "at once; that is nearly free only where a forward is bound by reading weights, as "
            "for large models on a GPU. On a CPU the extra tokens cost time."
        )
        if best is not None:
            found[-1] += (
                f" The step chosen for this machine decoded at {best:.2f}× the speed of AR."
            )
    return found
