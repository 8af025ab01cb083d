"""Sequence parallelism: how the tokens of one row are assigned to several devices.

Splitting a row into contiguous shards would be unbalanced: later tokens have more visible keys than
early ones, and tokens of a short thread have few. So the row is cut into blocks, and the blocks are
assigned to devices so that each device has the same number of blocks and about the same number of
visible pairs. The mask compares intervals and not positions in an array, so the network runs on the
reordered tokens unchanged; the result is put back in order.

Example: 4 blocks with 1, 2, 3 and 4 visible pairs of blocks, as in a causal row, on 2 devices.
Contiguous shards would have 3 and 7 pairs. `deal` sorts the blocks by cost and assigns the costs 4
and 1 to the first device and 3 and 2 to the second, 5 pairs each.

Each device gathers the keys and values of the whole row; they are not passed around a ring. Grouped
heads make them small (84 MB each for 40,960 tokens of 8 heads of 128 in bfloat16), and one list of
block pairs serves the whole kernel. In a ring every turn takes as long as the slowest device, and
in a trie the devices' shares of a single turn differ even if their totals are balanced. Llama 3
gathers for the same reason (arXiv:2407.21783, section 3.3.2). The cost is that each device holds
one layer's keys and values of the whole row.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tw_jax import sharding
from tw_jax.contracts import Span
from tw_jax.trie.mask import needed

_BLOCK = 512


def deal(span: Span, devices: int) -> jax.Array:
    """Assigns the blocks of each row to devices so that all compute about as many pairs.

    Blocks are sorted by their number of needed block pairs, the largest first, and assigned in
    turn to devices 0, 1, ..., D - 1, D - 1, ..., 1, 0, 0, 1, and so on. Each device keeps its
    blocks in the order of the row.

    Args:
      span: [B, T] int32 spans of packed rows; T must be a multiple of `devices`.
      devices: Number of devices D.

    Returns:
      [B, T] int32, the token at each place of the new order. The first T / D places belong to the
      first device.
    """
    rows, tokens = span.enter.shape
    block = math.gcd(tokens // devices, _BLOCK)
    cost = needed(span.enter, span, query_block=block, key_block=block).sum(-1)  # [B, blocks]
    # argsort of argsort is the rank of each block: 0 for the most expensive.
    rank = jnp.argsort(jnp.argsort(-cost, axis=-1, stable=True), axis=-1)
    round_, seat = rank // devices, rank % devices
    device = jnp.where(round_ % 2 == 0, seat, devices - 1 - seat)
    dealt = jnp.argsort(device, axis=-1, stable=True)  # [B, blocks]
    places = dealt[..., None] * block + jnp.arange(block)
    return places.reshape(rows, tokens).astype(jnp.int32)


def gather(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """Gathers a dimension that is split over mesh axes; call it inside their `jax.shard_map`."""
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def spread(
    function: Callable[[jax.Array, jax.Array, Span], jax.Array],
    tokens: jax.Array,
    depth: jax.Array,
    span: Span,
) -> jax.Array:
    """Runs a network on reordered tokens if rows are split over devices; otherwise just runs it.

    Args:
      function: (tokens, depth, span) -> [B, T, D]. Its result for a token may depend on the token,
        its depth and span, and on the tokens that it sees, but not on positions in the arrays.
      tokens: [B, T] int32.
      depth: [B, T] int32.
      span: [B, T] int32 spans of packed rows.

    Returns:
      [B, T, D], the result of the function in the order of `tokens`.

    Raises:
      ValueError: If T is not divisible by the number of devices.
    """
    found = sharding.current()
    if found is None:
        return function(tokens, depth, span)
    split = sharding.spec(("rows", "tokens"), tokens.shape, *found, name="The batch")
    by_token = sharding.mesh_axes(PartitionSpec(split[1]))
    if not by_token:
        return function(tokens, depth, span)
    places = deal(span, math.prod(found[0].shape[axis] for axis in by_token))
    dealt = jax.tree.map(lambda x: jnp.take_along_axis(x, places, axis=1), (tokens, depth, span))

    # Without shard_map the compiler would exchange whole rows too.
    @functools.partial(
        jax.shard_map,
        in_specs=(split, split),
        out_specs=split,
        axis_names=set(sharding.mesh_axes(split)),
        check_vma=False,
    )
    def take(x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(gather(x, by_token, 1), index[..., None], axis=1)

    return take(function(*dealt), jnp.argsort(places, axis=1))
