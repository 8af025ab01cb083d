"""Memory layouts that are fixed by hand: of an activation, and of the cache that a step writes to.

A compiler chooses a layout for each loop. Where two loops share an array it may choose two layouts,
and then copies the array between them. The functions here keep dimensions in row-major order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec as P

from tw_jax.sharding import LogicalAxes, current, mesh_axes, spec


def pinned(x: jax.Array, axes: LogicalAxes) -> jax.Array:
    """Keeps each device's part of an activation in row-major order.

    Args:
      x: An array of any shape.
      axes: A logical name for each dimension.
    """
    found = current()
    if found is None:
        return _row_major(x)
    where = spec(axes, x.shape, *found, name="An activation")
    # Outside of shard_map the constraint would gather the whole array on every device.
    return jax.shard_map(
        _row_major,
        in_specs=where,
        out_specs=where,
        axis_names=set(mesh_axes(where)),
        check_vma=False,
    )(x)


def write_cache(cache: jax.Array, new: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    """Writes new keys or values into one layer of a cache.

    Args:
      cache: [L, B, G, S, H].
      new: [B, G, T, H], cast to the dtype of the cache.
      layer: [] int32.
      start: [B] int32; row b is written to the slots start[b] .. start[b] + T - 1.

    Returns:
      [L, B, G, S, H]; inside jit the cache is updated in place.
    """
    found = current()
    if found is None:
        return _write_rows(cache, new, layer, start)
    where = spec(("rows", "kv_heads"), cache.shape[1:3], *found, name="The cache")
    return jax.shard_map(
        _write_rows,
        in_specs=(P(None, *where), where, P(), P(where[0])),
        out_specs=P(None, *where),
        axis_names=set(mesh_axes(where)),
        check_vma=False,
    )(cache, new, layer, start)


def _row_major(x: jax.Array) -> jax.Array:
    """Keeps an array in the layout with the last dimension innermost."""
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def _write_rows(cache: jax.Array, new: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    # The layout is fixed because the TPU compiler would otherwise choose one layout for loops that
    # write one entry and another for loops that write many, and copy the whole cache in between.
    def write_row(row: jax.Array, cache: jax.Array) -> jax.Array:
        entries = jax.lax.dynamic_index_in_dim(new, row)[None].astype(cache.dtype)
        zero = jnp.zeros((), start.dtype)
        put = jax.lax.dynamic_update_slice(cache, entries, (layer, row, zero, start[row], zero))
        return _row_major(put)

    return jax.lax.fori_loop(0, len(start), write_row, cache)
