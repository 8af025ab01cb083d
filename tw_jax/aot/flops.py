"""Operations of a train step and of the sampler's loop, counted from the sizes of a model.

The compiler's own cost analysis counts neither loops nor kernels, so it cannot be used. A product
of an [a, b] with a [b, c] matrix counts 2 a b c operations. Norms, rope and softmax are not
counted, as in model FLOPs utilisation (arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tw_jax.contracts import Span
from tw_jax.data import workloads
from tw_jax.forkjoin import tries
from tw_jax.models.transformer import Model
from tw_jax.trie.batch import stack_rows
from tw_jax.trie.mask import needed
from tw_jax.trie.pack import truncate

_BLOCK = 512
"""Queries and keys of the blocks whose occupancy is reported."""


def train_step(model: Model, rows: int, tokens: int) -> dict[str, float]:
    """Operations of one train step on rows of ThreadWeaver-shaped tries.

    The backward pass counts twice the forward pass, or once if the weights are frozen. Adapters and
    the recomputation of remat are not counted. Attention counts the visible pairs of the tries that
    `data/workloads.py` makes.

    Args:
      model: The sizes.
      rows: Rows of a batch.
      tokens: T, tokens of a row.

    Returns:
      `flops` of all rows, and `block_occupancy`, the share of pairs of 512-token blocks that
      contain a visible pair.
    """
    row, used = [], 0
    while used < tokens:
        trie = tries.trajectory_trie(workloads.trajectory(workloads.Shape(), seed=len(row)))
        trie = truncate(trie, min(len(trie), tokens - used))
        row.append(trie)
        used += len(trie)
    batch = stack_rows([row], tokens)
    index: Any = np.arange(tokens, dtype=np.int32)[None]
    keys = Span(enter=index, exit=batch.end)
    is_needed = needed(index, keys, query_block=_BLOCK, key_block=_BLOCK)
    pairs = int((np.asarray(batch.end) - index).sum())
    passes = 3.0 if model.lora is None else 2.0
    products = passes * 2 * _weights(model) * tokens + 3.0 * _pair(model) * pairs
    return {"flops": rows * products, "block_occupancy": float(is_needed.mean())}


def sampler_turn(model: Model, rows: int, queries: int, *, slots: int) -> float:
    """Operations of one turn of the sampler's loop when the cache is full.

    All tokens count as unembedded, although prefill unembeds only the last token of a prompt.

    Args:
      model: The sizes.
      rows: Rows of the sampler.
      queries: Tokens that each row computes in the turn.
      slots: Slots of the cache of each row.
    """
    return float(rows * queries * (2 * _weights(model) + _pair(model) * slots))


def _weights(model: Model) -> int:
    """Entries of all matrices that one token is multiplied with."""
    heads, kv_heads = (n * model.head_width for n in (model.num_heads, model.num_kv_heads))
    attention = model.width * (2 * heads + 2 * kv_heads)
    weights = model.num_layers * (attention + 3 * model.width * model.mlp_width)
    return weights + model.width * model.vocab_size


def _pair(model: Model) -> int:
    """Operations of one pair of a query and a key in all layers of the forward pass."""
    return 4 * model.num_heads * model.head_width * model.num_layers
