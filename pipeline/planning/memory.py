"""Memory of one process and size of a checkpoint, as this project runs DeepSpeed.

Letters: N parameters, W processes, e bytes of a weight (2 in bf16, 4 in fp32), T rows of a
micro-batch, E hidden size, I feed-forward size, H query heads, G key heads, D head size, V
vocabulary. `tests/pipeline/planning` counts the same in a real engine and a real forward.
"""

from dataclasses import dataclass

from pipeline.model.config import ModelConfig
from pipeline.objective.head_loss import FEWEST_ROWS, PIECE_ELEMENTS

MASTER_AND_ADAM = 12
"""Bytes a parameter of fp32 weights and both moments; ZeRO keeps them in fp32 runs as well."""
DEFAULT_BUCKET = 500_000_000
"""Elements of DeepSpeed's `reduce_bucket_size`."""
GATHERED_AHEAD = 50_000_000
"""Elements of DeepSpeed's `stage3_prefetch_bucket_size`."""


@dataclass(frozen=True)
class StaticMemory:
    """Bytes of one process that do not depend on the batch."""

    weights: int
    gradients: int
    """Held from the backward pass to the update."""
    optimizer: int
    buffers: int
    """Buckets in which gradients are reduced; in stage 3 also weights that are gathered."""
    update: int
    """Gradients in fp32 and in one piece, during the update alone."""
    host: int
    """Optimizer states and weights of this process in host memory."""

    @property
    def total(self) -> int:
        """On the GPU while a batch is there."""
        return self.weights + self.gradients + self.optimizer + self.buffers


def element_bytes(precision: str) -> int:
    """Bytes of a weight or an activation."""
    return 2 if precision == "bf16" else 4


def static_memory(
    config: ModelConfig,
    *,
    stage: int,
    precision: str,
    processes: int,
    offload: bool = False,
    offload_weights: bool = False,
    bucket: int = DEFAULT_BUCKET,
    frozen: bool = False,
) -> StaticMemory:
    """Memory of one process under ZeRO `stage`, with `bucket` elements in a reduction; on a
    `frozen` base only what drafts has gradients and states.

    `offload` has optimizer states on the host, `offload_weights` (stage 3) this process's share of
    the weights.
    """
    n, size, bf16 = learning(config, frozen), element_bytes(precision), precision == "bf16"
    share, frozen_n = -(-n // processes), config.num_parameters - n
    if stage == 0:
        # bf16: an optimizer with fp32 weights of its own. fp32: Adam on the weights themselves.
        return StaticMemory(
            weights=size * config.num_parameters,
            gradients=size * n,
            optimizer=(MASTER_AND_ADAM if bf16 else 8) * n,
            buffers=size * min(bucket, n),
            update=4 * n if bf16 else 0,
            host=0,
        )
    states = MASTER_AND_ADAM * share
    gradients, update = 4 * share, 4 * share
    if stage == 1:
        # All gradients on every process; in bf16 the backward pass's and their sum in fp32.
        gradients, update = (6 * n, 0) if bf16 else (4 * n, 4 * share)
    weights, gathered = size * config.num_parameters, 0
    if stage == 3:
        weights = size * (share + -(-frozen_n // processes))
        gathered = size * gathered_elements(config)
    kept = weights if stage == 3 and offload_weights else 0
    return StaticMemory(
        weights=weights - kept,
        gradients=gradients,
        optimizer=0 if offload else states,
        buffers=size * bucket + gathered,
        update=update,
        host=(states if offload else 0) + kept,
    )


def learning(config: ModelConfig, frozen: bool) -> int:
    """Parameters that training changes."""
    return config.num_drafting_parameters if frozen else config.num_parameters


def largest_tensor(config: ModelConfig) -> int:
    """Elements of the largest weight matrix."""
    return config.hidden_size * max(config.num_embeddings, config.intermediate_size)


def gathered_elements(config: ModelConfig) -> int:
    """Weights that stage 3 holds whole at one time: the largest of a layer and the LM head, and
    those gathered ahead."""
    head = config.num_embeddings * config.hidden_size
    rest = config.num_parameters - head * (1 if config.tie_embeddings else 2)
    layer = rest // config.num_layers
    return max(head, layer) + min(GATHERED_AHEAD, config.num_parameters)


def layer_row_bytes(config: ModelConfig, size: int, *, fused_norm: bool) -> int:
    """Bytes a row that one layer saves for its backward pass, scores and mask left out.

    Args:
        config: the model's shape.
        size: bytes of an activation.
        fused_norm: CUDA's RMSNorm saves its input and a factor; on a CPU it is made of parts that
            also save the normalised input, both in fp32.
    """
    hidden = config.hidden_size
    query, key = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    norm = size if fused_norm else 2 * 4
    norms = 2 * (norm * hidden + 4)
    if config.qk_norm:
        norms += norm * (query + key) + 4 * (config.num_heads + config.num_kv_heads)
    # Inputs of the projections, q, k, v and the output, and the softmax's fp32 sums.
    attention = size * (hidden + 2 * query + 2 * key) + 4 * config.num_heads
    # Input, gate, its SiLU, up, and their product.
    feed_forward = size * (hidden + 4 * config.intermediate_size)
    adapters = size * config.adapter_rank * len(config.adapter_targets)
    return norms + attention + feed_forward + adapters


@dataclass(frozen=True)
class BatchMemory:
    """Bytes that one micro-batch takes on top."""

    activations: int
    """Saved by the forward pass for the backward pass, logits left out."""
    work: int
    """Beside them while one layer goes backward: what checkpointing computes again, and gradients
    of attention scores."""
    logits: int
    """A piece of them, and the gradients that the loss takes at once: of the hidden states, and of
    the LM head in fp32. Gone before any layer goes back."""
    mask: int

    @property
    def peak(self) -> int:
        return self.activations + self.mask + max(self.logits, self.work)


def batch_memory(
    config: ModelConfig,
    *,
    precision: str,
    sequences: int,
    rows: int,
    checkpointing: str,
    attention: str,
    device: str = "cuda",
    frozen_rows: int = 0,
) -> BatchMemory:
    """Memory of `sequences` of `rows` rows each, all of them labelled, with a kind of
    `checkpointing`.

    `attention=math` holds scores [sequences, H, rows, rows] in fp32: it saves the softmax, and has
    gradients beside it while a layer goes backward. `fused` holds the mask in the weights' type in
    each layer, and `flex` neither. The first `frozen_rows` rows of each sequence are the clean ones
    of a frozen base: of them only keys and values are kept.
    """
    size, total = element_bytes(precision), sequences * (rows - frozen_rows)
    fused_norm = device != "cpu"
    pairs = 0 if attention == "flex" else sequences * (rows - frozen_rows) * rows
    scores = 4 * config.num_heads * pairs if attention == "math" else 0
    # In bf16 their gradients exist in both types.
    gradients = scores + scores // 2 if precision == "bf16" else scores
    # Every backend that takes a boolean mask turns it into numbers, in each layer anew.
    layer = total * layer_row_bytes(config, size, fused_norm=fused_norm) + size * pairs + scores
    norm = size if fused_norm else 2 * 4
    activations = total * ((norm + size) * config.hidden_size + 4)
    # Of the feed-forward layer the SiLU and the product with it.
    product = 2 * total * size * config.intermediate_size
    again = {"none": 0, "selective": product, "full": layer}[checkpointing]
    if checkpointing == "full":
        activations += config.num_layers * total * size * config.hidden_size
    else:
        activations += config.num_layers * (layer - again)
    # Of clean rows with a frozen base: keys and values, and once more beside those of the slots.
    kept = 2 * 2 * config.num_kv_heads * config.head_dim * config.num_layers
    activations += sequences * frozen_rows * size * (kept + config.hidden_size)
    return BatchMemory(
        activations=activations,
        work=gradients + again,
        logits=head_bytes(config, size, sequences * rows, device, learns=not frozen_rows),
        # A dense one with one more while it is put together; else three integers a row.
        mask=2 * pairs if pairs else 3 * 4 * sequences * rows,
    )


def head_bytes(config: ModelConfig, size: int, rows: int, device: str, learns: bool = True) -> int:
    """Bytes that the LM head, which `learns` or not, and its loss take for `rows` labelled rows;
    see `head_loss.py`."""
    width, vocabulary = config.hidden_size, config.num_embeddings
    piece = min(rows, max(FEWEST_ROWS, PIECE_ELEMENTS[device] // vocabulary))
    # In bf16 logits and their slopes exist in both types, and a piece's gradient of the head.
    element, matrix = (4, 4) if size == 4 else (6, 6)
    matrix = matrix if learns else 0
    return (
        size * width * (rows + piece) + element * piece * vocabulary + matrix * vocabulary * width
    )


def checkpoint_bytes(config: ModelConfig, stage: int, precision: str, frozen: bool = False) -> int:
    """Size on disk of one checkpoint, over all processes."""
    n, size = learning(config, frozen), element_bytes(precision)
    # A frozen base is saved whole: each checkpoint is complete by itself.
    base = size * (config.num_parameters - n)
    if stage == 0:
        return base + (size + (MASTER_AND_ADAM if precision == "bf16" else 8)) * n
    # Stage 3 saves no weights beside the optimizer's fp32 ones.
    return base + (MASTER_AND_ADAM if stage == 3 else size + MASTER_AND_ADAM) * n
