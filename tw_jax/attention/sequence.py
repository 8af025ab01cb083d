"""One row over several devices: which tokens of it each device works on.

A device that had the last tokens of a long row would score most pairs of it, and one that had a
short thread few. So the row is cut into blocks, and these are dealt out by the pairs that each one
needs, as many blocks to every device. The mask asks for intervals, never for places in an array, so
dealt tokens attend just as they stand; what comes out is put back in order.

Keys and values are gathered, not passed round a ring. Grouped heads make them small beside the
queries (84 MB each for 40,960 tokens of 8 heads of 128 in bfloat16), one list of block pairs serves
the whole kernel, and no device waits for another's share of a turn, which the uneven shape of a
trie would force on a ring however well the sums are balanced (so does Llama 3, arXiv:2407.21783,
section 3.3.2, for its documents' masks). The price: each device holds one layer's keys and values
of the whole row. This file knows no kernel and no model.
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
    """Deals the blocks of each row to devices, so that all have about as many pairs to score.

    The blocks with the most needed pairs of blocks go first, one to each device forth and then
    back; a device keeps its own in their order.

    Args:
      span: [B, T] int32, of packed rows; T a multiple of `devices`.
      devices: D.

    Returns:
      [B, T] int32, for each place the token that goes there; the first T / D places are those of
      the first device.
    """
    rows, tokens = span.enter.shape
    block = math.gcd(tokens // devices, _BLOCK)
    cost = needed(span.enter, span, query_block=block, key_block=block).sum(-1)  # [B, blocks]
    rank = jnp.argsort(jnp.argsort(-cost, axis=-1, stable=True), axis=-1)
    round_, seat = rank // devices, rank % devices
    device = jnp.where(round_ % 2 == 0, seat, devices - 1 - seat)
    dealt = jnp.argsort(device, axis=-1, stable=True)  # [B, blocks]
    places = dealt[..., None] * block + jnp.arange(block)
    return places.reshape(rows, tokens).astype(jnp.int32)


def gather(x: jax.Array, axes: tuple[str, ...], axis: int) -> jax.Array:
    """Brings together what devices hold of a dimension; inside `jax.shard_map` over `axes`."""
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True) if axes else x


def spread(
    function: Callable[[jax.Array, jax.Array, Span], jax.Array],
    tokens: jax.Array,
    depth: jax.Array,
    span: Span,
) -> jax.Array:
    """Runs a network on dealt tokens, where rows are split over devices; else just runs it.

    Args:
      function: (tokens, depth, span) -> [B, T, D]; what it does with a token may depend on the
        token's depth and span and on what it sees, not on its place in the arrays.
      tokens: [B, T] int32.
      depth: [B, T] int32.
      span: [B, T] int32, of packed rows.

    Returns:
      [B, T, D] of the function, in the order of `tokens`.

    Raises:
      ValueError: T does not divide over the devices.
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

    # Left to itself, the compiler would exchange rows too.
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
