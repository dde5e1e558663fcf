"""How much of a GPU's memory steps need besides weights and pages: activations, logits, recordings, libraries.

Decides from the model's shape and the largest step that the configuration allows, before the pool takes the rest: one
that took nine tenths of what is free would leave 0.75 GB of 24 with an 8B model, and a full step takes more by this
estimate. Knows no tensor.
"""

from collections.abc import Iterable
from typing import Final

from inferflux.config import RuntimeConfig
from inferflux.engine.models.partition import num_heads, num_kv_heads
from inferflux.engine.models.spec import ModelSpec
from inferflux.engine.runner.graphs import lengths_to, sizes_to
from inferflux.engine.runner.runner import SCORED_AT_ONCE

# Of attention's splits of long rows, as the Triton kernels are shipped.
SPLIT_TOKENS: Final = 512
MOST_SPLITS: Final = 128
# A launch in a recording: arguments and what the driver keeps with them. Not yet measured.
LAUNCH_BYTES: Final = 8192
LAUNCHES_PER_LAYER: Final = 10
# Modules and workspaces that kernels and cuBLAS take at their first use. Not yet measured.
LIBRARY_BYTES: Final = 300 * 2**20
# The allocator's rounding and gaps between blocks. Not yet measured.
FRAGMENTATION: Final = 1.25
_FLOAT: Final = 4
# Tensors as wide as the residual stream, see `activation_bytes`.
_STREAM: Final = 6


def working_bytes(steps: Iterable[int]) -> int:
    """Returns what a process needs whose models' steps need so much each (`step_bytes`)."""
    return int(FRAGMENTATION * sum(steps)) + LIBRARY_BYTES


def step_bytes(spec: ModelSpec, dtype_bytes: int, runtime: RuntimeConfig, num_ranks: int = 1) -> int:
    """Returns what the tensors of a rank's largest step take at most, and its recordings. dtype_bytes: of a value in
    the type that the model computes in."""
    scheduler = runtime.scheduler
    num_rows = min(scheduler.max_batch_size, scheduler.max_batch_tokens)
    step = activation_bytes(spec, scheduler.max_batch_tokens, dtype_bytes, num_ranks)
    step += logit_bytes(spec, num_rows, dtype_bytes) + _split_bytes(spec, num_rows, num_ranks)
    if runtime.cuda_graphs == "auto":
        step += _recording_bytes(spec, num_rows, dtype_bytes, num_ranks)
    return step


def activation_bytes(spec: ModelSpec, num_tokens: int, dtype_bytes: int, num_ranks: int) -> int:
    """Returns the most that the tensors of a forward take at once, up to the last norm: those of one layer, in its
    attention or in its MLP, beside the embeddings, the stream before and in the layer, two tensors each, and what is
    added to it."""
    query, key_value = num_heads(spec, num_ranks) * spec.head_dim, num_kv_heads(spec, num_ranks) * spec.head_dim
    attention = 3 * query + 2 * key_value
    stream = dtype_bytes * (_STREAM * spec.hidden_size + max(attention, 3 * spec.intermediate_size // num_ranks))
    if spec.moe is not None:
        moe = spec.moe
        pair = 3 * dtype_bytes * moe.expert_size + _FLOAT * spec.hidden_size
        experts = moe.experts_per_token * pair + dtype_bytes * 3 * moe.shared_size // num_ranks
        experts += _FLOAT * (spec.hidden_size + 2 * moe.num_experts)
        stream = max(stream, dtype_bytes * _STREAM * spec.hidden_size + experts)
    angles = 2 * _FLOAT * spec.head_dim * len(spec.ropes)
    return num_tokens * (stream + angles)


def logit_bytes(spec: ModelSpec, num_rows: int, dtype_bytes: int) -> int:
    """Returns what it takes to sample num_rows rows with log-probabilities, and to score a prompt besides: logits as
    the product gives them, as float32, their logarithms, and which of them are larger."""
    return (num_rows + SCORED_AT_ONCE) * spec.vocab_size * (dtype_bytes + 2 * _FLOAT + 1)


def _split_bytes(spec: ModelSpec, num_rows: int, num_ranks: int) -> int:
    """The splits' results, until they are merged."""
    num_splits = min(-(-spec.max_model_len // SPLIT_TOKENS), MOST_SPLITS)
    return num_rows * num_heads(spec, num_ranks) * num_splits * (spec.head_dim + 1) * _FLOAT


def _recording_bytes(spec: ModelSpec, num_rows: int, dtype_bytes: int, num_ranks: int) -> int:
    """One place for the logits, the largest recording's tensors, in which the others' fit, and every launch."""
    sizes = sizes_to(num_rows)
    largest = sizes[-1]
    tensors = activation_bytes(spec, largest, dtype_bytes, num_ranks) + _split_bytes(spec, largest, num_ranks)
    logits = largest * spec.vocab_size * (_FLOAT + dtype_bytes)
    num_launches = LAUNCHES_PER_LAYER * spec.num_layers * len(sizes) * len(lengths_to(spec.max_model_len))
    return tensors + logits + LAUNCH_BYTES * num_launches
