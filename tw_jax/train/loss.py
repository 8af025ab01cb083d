"""Log-probs of trie nodes, read at their parents, and sums that name their denominators.

Every objective is built from two pieces: `token_logp`, which turns the network's hidden states into
one log-prob per node without ever holding [B, T, V] logits, and `accumulate`, which adds an
objective and its gradient over parts of a batch before anything is divided. This file knows no
optimiser and no algorithm; it hands `train/sft.py` and `train/pgrpo.py` sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec

from tw_jax import sharding
from tw_jax.attention import sequence
from tw_jax.contracts import Network, Params
from tw_jax.models.lora import overlay, trained
from tw_jax.trie.batch import TrieBatch

Sums = dict[str, jax.Array]
"""Scalars, float32, that add up over parts of a batch: numerators and denominators, never means.

What is combined in another way, such as a maximum, is named to `accumulate`.
"""

Objective = Callable[[Params, Any], tuple[jax.Array, Sums]]
"""(params, batch) -> (total, sums): a scalar to differentiate, not yet divided, and its company."""


class TokenLogp(struct.PyTreeNode):
    """What the model said of each node, given the hidden state of its parent."""

    logp: jax.Array  # [B, T] float32 nats
    is_argmax: jax.Array  # [B, T] bool, the node is the likeliest token after its parent
    entropy: jax.Array | None  # [B, T] float32 nats of the distribution that predicts the node


def token_logp(
    network: Network,
    params: Params,
    hidden: jax.Array,
    *,
    batch: TrieBatch,
    chunk_tokens: int,
    temperature: jax.Array | float = 1.0,
    with_entropy: bool = False,
) -> TokenLogp:
    """Log-probs of all nodes of packed tries, each predicted from its parent.

    logp[b, i] = log_softmax(unembed(hidden[b, parent[b, i]]) / temperature)[tokens[b, i]]

    Hidden states are gathered at `parent` and unembedded `chunk_tokens` nodes of every row at a
    time, under remat: the largest array with V in its shape is [B * chunk_tokens, V], forward and
    backward. The unembedding's gradients add up over chunks in float32. Under `sharding.use`, each
    device scores its own rows, and these gradients are exchanged once.
    Roots and padding point at themselves; what they score means nothing and has weight 0.
    Source: ThreadWeaver (arXiv:2512.07843) with labels along trie edges, where its collator shifts
    them in flat order.

    Args:
      network: only `unembed` is used.
      params: the parameters that made `hidden`.
      hidden: [B, T, D], after the final norm.
      batch: `tokens` and `parent` are read, [B, T] int32.
      chunk_tokens: nodes per row and chunk, at least 1; T need not be a multiple.
      temperature: divides the logits, above 0; may be traced.
      with_entropy: also computes the entropy, at the price of one more pass over the logits.

    Raises:
      ValueError: `chunk_tokens` is below 1.
    """
    chex.assert_rank(hidden, 3)
    chex.assert_shape([batch.tokens, batch.parent], hidden.shape[:2])
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens}: want at least 1, for example 1024.")

    def score(head: Params, piece: tuple[jax.Array, jax.Array]) -> TokenLogp:
        source, tokens = piece  # [n, D], [n]
        logits = network.unembed(params | head, source).astype(jnp.float32) / temperature
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum, not a gather: it stays elementwise over a sharded vocabulary, and its
        # transpose is a select where a gather's would be a scatter into [n, V].
        is_token = jnp.arange(logits.shape[-1], dtype=tokens.dtype) == tokens[:, None]
        logp = jnp.where(is_token, logits, 0).sum(-1) - log_z
        entropy = None
        if with_entropy:
            logs = logits - log_z[:, None]
            entropy = -(jnp.exp(logs) * logs).sum(-1)
        return TokenLogp(logp=logp, is_argmax=logits.argmax(-1) == tokens, entropy=entropy)

    def score_rows(head: Params, hidden: jax.Array, batch: TrieBatch) -> TokenLogp:
        head = jax.tree.map(_gathered, head, places)
        hidden = sequence.gather(hidden, by_token, 1)  # a parent may stand anywhere in its row
        source = jnp.take_along_axis(hidden, batch.parent[..., None], axis=1)
        # The scan already keeps forward and backward apart: remat needs no barrier against CSE.
        chunk = jax.checkpoint(partial(score, head), prevent_cse=False)  # pyright: ignore[reportPrivateImportUsage]
        return _by_chunks(chunk, (source, batch.tokens), chunk_tokens)

    head = {name: params[name] for name in network.head}
    places = jax.tree.map(lambda _: PartitionSpec(), head)
    # A float32 copy has a float32 cotangent: a scan adds up in the dtype of what it closes over.
    # (And XLA for CPU aborts on bfloat16 collectives under shard_map.)
    moving = jax.tree.map(
        lambda x: x.astype(jnp.float32), {k: v for k, v in head.items() if k in trained(params)}
    )
    head |= moving
    found, split = sharding.current(), PartitionSpec()
    if found is not None:
        split = sharding.spec(("rows", "tokens"), batch.tokens.shape, *found, name="The batch")
    by_token = sharding.mesh_axes(PartitionSpec(*split[1:]))
    if found is not None and (axes := sharding.mesh_axes(split)):
        if moving:
            # Gathered inside the shard_map, a trained table has a gradient that is summed and split
            # in one operation before the backward pass of the layers. Otherwise the whole gradient
            # would stay in memory during that pass.
            names = {name: network.axes()[name] for name in moving}
            where = sharding.shardings(names, moving, found[0], found[1])
            places |= jax.tree.map(lambda place: sharding.only(place.spec, axes), where)
            moving, hidden = jax.lax.optimization_barrier((moving, hidden))
            head |= moving
        # Left to itself, the compiler would sum that gradient over devices in every chunk.
        score_rows = jax.shard_map(
            score_rows,
            in_specs=(places, split, split),
            out_specs=split,
            axis_names=set(axes),
            check_vma=False,
        )
    return score_rows(head, hidden, batch)


def _gathered(x: jax.Array, place: PartitionSpec) -> jax.Array:
    """The whole of an array that `place` splits over devices; inside `jax.shard_map`."""
    for dimension, part in enumerate(place):
        x = sequence.gather(x, sharding.mesh_axes(PartitionSpec(part)), dimension)
    return x


def _by_chunks(
    function: Callable[[Any], Any], arrays: tuple[jax.Array, ...], chunk_tokens: int
) -> Any:
    """Maps [n, ...] -> [n] over arrays [B, T, ...], a chunk of every row at a time; [B, T]."""
    rows, length = arrays[0].shape[:2]
    num_chunks = -(-length // chunk_tokens)
    size = -(-length // num_chunks)  # equal chunks, so that at most num_chunks - 1 nodes are padded

    def split(x: jax.Array) -> jax.Array:  # [B, T, ...] -> [chunks, B * size, ...]
        pad = [(0, 0), (0, num_chunks * size - length)] + [(0, 0)] * (x.ndim - 2)
        parts = jnp.pad(x, pad).reshape(rows, num_chunks, size, *x.shape[2:])
        return parts.swapaxes(0, 1).reshape(num_chunks, rows * size, *x.shape[2:])

    def merge(x: jax.Array) -> jax.Array:  # [chunks, B * size] -> [B, T]
        parts = x.reshape(num_chunks, rows, size).swapaxes(0, 1)
        return parts.reshape(rows, num_chunks * size)[:, :length]

    return jax.tree.map(merge, jax.lax.map(function, jax.tree.map(split, arrays)))


def weighted_mean(total: jax.Array, *, denominator: jax.Array) -> jax.Array:
    """Divides a sum by its denominator in float32; 0 where the denominator is 0.

    The denominator is an argument because it belongs to the whole global batch: sum both over
    all rows and accumulation steps first, divide once. A mean of means would weigh a token by the
    company it happens to be packed with.

    Args:
      total: a weighted sum, or a gradient of one; any shape.
      denominator: [] the sum of the weights, at least 0.
    """
    safe = jnp.where(denominator == 0, 1, denominator)
    return jnp.where(denominator == 0, 0, total.astype(jnp.float32) / safe)


def accumulate(
    objective: Objective,
    params: Params,
    batch: Any,
    *,
    accumulation_steps: int,
    axes: Params,
    extremes: Mapping[str, tuple[Callable[[jax.Array, jax.Array], jax.Array], float]] | None = None,
    count: jax.Array | None = None,
) -> tuple[Params, jax.Array, Sums]:
    """Adds an objective, its gradient and its sums over parts of a batch, in float32.

    Nothing is divided here, so the result does not depend on `accumulation_steps` but for rounding.

    Args:
      objective: differentiated in what `lora.trained` says of `params`, once per part; see
        `Objective`.
      params: any dtype.
      batch: a pytree of arrays [R, ...]; every part is one of [R / accumulation_steps, ...].
      accumulation_steps: number of parts that are run one after another, a divisor of R.
      axes: `Network.axes()`. The accumulator is a loop carry, which the compiler would otherwise be
        free to copy to every device.
      extremes: for scalars that do not add up over parts, by name, what makes one of two and the
        number that changes no other: `(jnp.maximum, -jnp.inf)`.
      count: [] int32, the first so many parts are run; None runs all. One program then serves
        batches of many sizes, and what is not run costs nothing.

    Returns:
      (gradients of the summed total, float32, shaped like `trained(params)`; the summed total; the
      sums).

    Raises:
      ValueError: `accumulation_steps` does not divide R.
    """
    parts = split_rows(batch, accumulation_steps)

    names = jax.eval_shape(objective, params, part_of(parts, 0))[1]
    combine = {name: (jnp.add, 0.0) for name in names} | dict(extremes or {})
    moving, axes = trained(params), trained(axes)

    def of_moving(moving: Params, part: Any) -> tuple[jax.Array, Sums]:
        return objective(overlay(params, moving), part)

    def add(number: jax.Array, carry: Any) -> Any:
        gradients, total, sums = carry
        (new_total, new_sums), new = jax.value_and_grad(of_moving, has_aux=True)(
            moving, part_of(parts, number)
        )
        added = jax.tree.map(lambda old, g: old + g.astype(jnp.float32), gradients, new)
        return (
            jax.tree.map(sharding.constrain, added, axes),
            total + new_total.astype(jnp.float32),
            {name: combine[name][0](old, new_sums[name]) for name, old in sums.items()},
        )

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), moving)
    sums = {name: jnp.full((), combine[name][1], jnp.float32) for name in names}
    empty = (zeros, jnp.zeros((), jnp.float32), sums)
    return jax.lax.fori_loop(0, accumulation_steps if count is None else count, add, empty)


def split_rows(batch: Any, parts: int) -> Any:
    """Splits a batch into parts of as many rows, [R, ...] -> [parts, R / parts, ...].

    Strided, not in blocks: part p has rows p, p + parts, ..., so that each device's rows are spread
    over all parts and none moves.

    Raises:
      ValueError: `parts` does not divide R.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if parts < 1 or rows % parts:
        raise ValueError(
            f"accumulation_steps = {parts}: want a divisor of the batch's {rows} rows."
        )

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def part_of(parts: Any, number: jax.Array | int) -> Any:
    """One of the parts that `split_rows` made, [parts, ...] -> [...]."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), parts)
