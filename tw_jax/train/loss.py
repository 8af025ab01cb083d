"""Log-probs of trie nodes, and gradient accumulation. Every objective is built from these two.

`token_logp` computes one log-prob for each node from the hidden state of its parent, without ever
building the [B, T, V] logits. `accumulate` adds an objective and its gradient over parts of a
batch. It divides nothing: a mean over the global batch needs its numerator and its denominator
summed over all parts first.
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
"""Float32 scalars that add up over parts of a batch: numerators and denominators, never means.

Scalars that are combined in another way, such as a maximum, are named in `accumulate`.
"""

Objective = Callable[[Params, Any], tuple[jax.Array, Sums]]
"""(params, batch) -> (total, sums): the undivided scalar to differentiate, and sums to log."""


class TokenLogp(struct.PyTreeNode):
    """The model's prediction of each node from the hidden state of its parent."""

    logp: jax.Array  # [B, T] float32 nats
    is_argmax: jax.Array  # [B, T] bool, the node is the most likely token after its parent
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
    """The log-prob of each node of packed tries, predicted from its parent.

    logp[b, i] = log_softmax(unembed(hidden[b, parent[b, i]]) / temperature)[tokens[b, i]]

    Hidden states are gathered at `parent` and unembedded in chunks of `chunk_tokens` nodes of every
    row, with rematerialisation, so that in both passes the largest array with a dimension V is
    [B * chunk_tokens, V]. Gradients of the unembedding are added over chunks in float32. Under
    `sharding.use` each device scores its own rows, and these gradients are exchanged once.
    The parent of a root and of padding is the node itself; these log-probs are meaningless and have
    weight 0. Source: ThreadWeaver (arXiv:2512.07843), with labels along the edges of the trie;
    its collator shifts labels in flat order.

    Args:
      network: `unembed` and `axes` are used.
      params: The parameters that computed `hidden`.
      hidden: [B, T, D], after the final norm.
      batch: `tokens` and `parent` are read, [B, T] int32.
      chunk_tokens: Nodes of a row in a chunk, at least 1. T need not be a multiple of it.
      temperature: Divides the logits; above 0; may be traced.
      with_entropy: Also computes the entropy, which needs one more pass over the logits.

    Raises:
      ValueError: If `chunk_tokens` is below 1.
    """
    chex.assert_rank(hidden, 3)
    chex.assert_shape([batch.tokens, batch.parent], hidden.shape[:2])
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens = {chunk_tokens} must be at least 1, for example 1024.")

    def score(head: Params, piece: tuple[jax.Array, jax.Array]) -> TokenLogp:
        source, tokens = piece  # [n, D], [n]
        logits = network.unembed(params | head, source).astype(jnp.float32) / temperature
        log_z = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum instead of a gather. It is elementwise over a vocabulary that is split over
        # devices, and its transpose is a select; that of a gather would scatter into [n, V].
        is_token = jnp.arange(logits.shape[-1], dtype=tokens.dtype) == tokens[:, None]
        logp = jnp.where(is_token, logits, 0).sum(-1) - log_z
        entropy = None
        if with_entropy:
            logs = logits - log_z[:, None]
            entropy = -(jnp.exp(logs) * logs).sum(-1)
        return TokenLogp(logp=logp, is_argmax=logits.argmax(-1) == tokens, entropy=entropy)

    def score_rows(head: Params, hidden: jax.Array, batch: TrieBatch) -> TokenLogp:
        head = jax.tree.map(_gathered, head, places)
        hidden = sequence.gather(hidden, by_token, 1)  # A parent may be anywhere in its row.
        source = jnp.take_along_axis(hidden, batch.parent[..., None], axis=1)
        # The loop over chunks already separates forward from backward, so remat needs no barrier
        # against common subexpression elimination.
        chunk = jax.checkpoint(partial(score, head), prevent_cse=False)  # pyright: ignore[reportPrivateImportUsage]
        return _by_chunks(chunk, (source, batch.tokens), chunk_tokens)

    head = {name: params[name] for name in network.head}
    places = jax.tree.map(lambda _: PartitionSpec(), head)
    # A loop adds the cotangent of an array that it closes over in the dtype of that array, so the
    # trained part of the head is copied to float32. (XLA for CPU also aborts on bfloat16
    # collectives under shard_map.)
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
        # Without shard_map the compiler would sum that gradient over devices in every chunk.
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
    """Applies [n, ...] -> [n] to arrays [B, T, ...] in chunks of nodes of every row; [B, T]."""
    rows, length = arrays[0].shape[:2]
    num_chunks = -(-length // chunk_tokens)
    size = -(-length // num_chunks)  # Equal chunks need at most num_chunks - 1 nodes of padding.

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

    The denominator is an argument because it is that of the global batch: both must be summed over
    all rows and accumulation steps before the division. In a mean of means the weight of a token
    would depend on the tokens that it happens to be packed with.

    Args:
      total: A weighted sum, or the gradient of one; any shape.
      denominator: [] sum of the weights, at least 0.
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

    Nothing is divided here, so `accumulation_steps` changes the result only by rounding.

    Args:
      objective: Evaluated and differentiated once for each part, with respect to the trained part
        of `params` (`lora.trained`); see `Objective`.
      params: Parameters of any dtype.
      batch: A pytree of arrays [R, ...]; a part has arrays [R / accumulation_steps, ...].
      accumulation_steps: Number of parts, which run one after another. It must divide R.
      axes: `Network.axes()`. The sum of gradients is carried by a loop. Without these axes the
        compiler could copy it to every device.
      extremes: Scalars that do not add up over parts: the function that combines two of them, and
        its neutral element, for example `(jnp.maximum, -jnp.inf)`.
      count: [] int32, number of parts to run, counted from the first; None runs all of them. With
        it one program serves batches of many sizes, and the other parts cost nothing.

    Returns:
      (gradients, total, sums): the gradients of the summed total, float32, shaped like
      `trained(params)`; the summed total; and the sums.

    Raises:
      ValueError: If `accumulation_steps` does not divide R.
    """
    parts = split_rows(batch, accumulation_steps)

    names = jax.eval_shape(objective, params, part_of(parts, 0))[1]
    combine = {name: (jnp.add, 0.0) for name in names} | dict(extremes or {})
    moving, axes = trained(params), trained(axes)

    def objective_of(moving: Params, part: Any) -> tuple[jax.Array, Sums]:
        return objective(overlay(params, moving), part)

    def add(number: jax.Array, carry: Any) -> Any:
        gradients, total, sums = carry
        (new_total, new_sums), new = jax.value_and_grad(objective_of, has_aux=True)(
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
    """Splits a batch into parts of equal size, [R, ...] -> [parts, R / parts, ...].

    Part p has the rows p, p + parts, p + 2 parts, and so on. So every part has rows of every
    device, and no row moves between devices.

    Raises:
      ValueError: If `parts` does not divide R.
    """
    rows = jax.tree.leaves(batch)[0].shape[0]
    if parts < 1 or rows % parts:
        raise ValueError(
            f"accumulation_steps = {parts} does not divide the batch's {rows} rows. Set it to a "
            "divisor of them."
        )

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(rows // parts, parts, *x.shape[1:]).swapaxes(0, 1)

    return jax.tree.map(split, batch)


def part_of(parts: Any, number: jax.Array | int) -> Any:
    """One part of the result of `split_rows`, [parts, ...] -> [...]."""
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), parts)
