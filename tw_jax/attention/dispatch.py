"""`attend`: one function for every attention of the project; it picks a backend and spreads it.

A backend is a function with the signature of `reference.attend`. It either computes exactly that
or raises NotImplementedError with the reason; it never answers a different question. A new one (a
GPU kernel) takes its place in `BACKENDS`, `BLOCKS` and `preferred`, adds its name to `Impl`, and
sits the exam of `tests/attention/test_exam.py`. This file knows no kernel's inside and no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tw_jax import sharding
from tw_jax.attention import blockwise, cached, pallas_tpu, reference, sequence
from tw_jax.contracts import Span

Impl = Literal["auto", "reference", "blockwise", "pallas_tpu"]

BACKENDS: dict[str, Callable[..., jax.Array]] = {
    "reference": reference.attend,
    "blockwise": blockwise.attend,
    "pallas_tpu": pallas_tpu.attend,
}

BLOCKS: dict[str, Callable[[int, int, int], tuple[int, int]]] = {
    "reference": lambda queries, slots, stack: (queries, slots),
    "blockwise": blockwise.blocks,
    "pallas_tpu": pallas_tpu.blocks,
}
"""Queries and keys of the blocks that a backend walks, from T, S and N / G."""

_FEW_PAIRS = 256 * 256


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    at: jax.Array,
    keys: Span,
    layer: jax.Array | None = None,
    impl: Impl = "auto",
    scale: float,
) -> jax.Array:
    """Attention through the spans of a trie.

    Query t of row b sees key s iff `keys.enter[b, s] <= at[b, t] < keys.exit[b, s]`; query head n
    reads key/value head n // (N / G). Softmax in float32. A query that sees nothing returns zeros.
    Under `sharding.use`, each device computes its own rows and heads without talking to others.

    Args:
      q: [B, N, T, H] floating, N a multiple of G.
      k: [B, G, S, H] floating, of the dtype of `q`; with `layer`, [L, B, G, S, H].
      v: as `k`.
      at: [B, T] int32, where the queries stand.
      keys: [B, S] int32 spans.
      layer: [] int32, which layer of a cache is read; "auto" then is `cached.attend`, which has no
        gradient.
      impl: a backend, or "auto": the first of `preferred` that does not refuse.
      scale: factor on the scores, usually H ** -0.5.

    Returns:
      [B, N, T, H] in the dtype of `q`.

    Raises:
      ValueError: no backend has this name.
      NotImplementedError: the backend refuses, or under "auto" all do; with every reason.
    """
    rows, heads, queries, width = q.shape
    groups, slots = k.shape[-3:-1]
    leading = () if layer is None else k.shape[:1]
    chex.assert_shape([k, v], (*leading, rows, groups, slots, width))
    chex.assert_shape(at, (rows, queries))
    chex.assert_shape([keys.enter, keys.exit], (rows, slots))
    chex.assert_is_divisible(heads, groups)
    chex.assert_equal(k.dtype, q.dtype)
    chex.assert_equal(v.dtype, q.dtype)

    if impl != "auto" and impl not in BACKENDS:
        raise ValueError(f"impl = {impl!r}: want auto or one of {', '.join(BACKENDS)}.")
    if layer is not None:
        if impl == "auto":
            return _per_device(cached.attend, q, k, v, at, keys, scale, layer)
        k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (k, v))
    if impl != "auto":
        return _per_device(BACKENDS[impl], q, k, v, at, keys, scale)
    refusals = []
    for name in preferred(queries, slots):
        try:
            return _per_device(BACKENDS[name], q, k, v, at, keys, scale)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError("Every attention backend refuses. " + " ".join(refusals))


def preferred(queries: int, slots: int) -> tuple[Impl, ...]:
    """Names in the order in which "auto" tries them where there is no cache.

    Time of `reference` over time of `blockwise`, forward and gradients, 8 rows of T tokens, 4 heads
    of 32, 2 CPU cores, float32 (above 1: walk blocks): 1.05 at T = 128, 2.4 at 256, 3.4 at 512.
    Many pairs written out would also make memory quadratic, so "auto" never falls back to that.
    """
    if queries * slots <= _FEW_PAIRS:
        return ("reference", "blockwise")
    return ("pallas_tpu", "blockwise")


def _per_device(
    backend: Callable[..., jax.Array],
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    at: jax.Array,
    keys: Span,
    scale: float,
    *layer: jax.Array,
) -> jax.Array:
    """Runs a backend on each device's rows, heads and queries; outside of `use`, just runs it.

    Left to itself, the compiler gathers every row on every device: it cannot split a loop whose
    steps each read another row. Keys and values are split as the query heads are; where there are
    fewer of them than devices, each is repeated until every device has its own. Where a row is
    split over devices, each brings the keys and values of the row together for its own queries.
    """
    current = sharding.current()
    if current is None:
        return backend(q, k, v, *layer, at=at, keys=keys, scale=scale)
    mesh, rules = current
    by_head = sharding.spec(("rows", "heads", "tokens"), q.shape[:3], mesh, rules, name="queries")
    # The keys of a cache are whole on every device; those of the queries' own tokens are split.
    tokens = by_head[2] if not layer and k.shape[2] == q.shape[2] else None
    by_token = sharding.mesh_axes(PartitionSpec(tokens))

    def local(q, k, v, at, keys, *layer):
        k, v = (sequence.gather(x, by_token, 2) for x in (k, v))
        keys = jax.tree.map(lambda x: sequence.gather(x, by_token, 1), keys)
        return backend(q, k, v, *layer, at=at, keys=keys, scale=scale)

    if by_head[1] is not None:
        split = math.prod(mesh.shape[axis] for axis in rules.heads)
        repeats = math.lcm(k.shape[-3], split) // k.shape[-3]
        if layer and repeats > 1:  # One layer is repeated, not the whole cache.
            k, v = (jax.lax.dynamic_index_in_dim(x, *layer) for x in (k, v))
            layer = (jnp.zeros_like(*layer),)
        k, v = jnp.repeat(k, repeats, axis=-3), jnp.repeat(v, repeats, axis=-3)
    by_key = PartitionSpec(*(None for _ in layer), *by_head[:2], tokens)
    return jax.shard_map(
        local,
        in_specs=(
            by_head,
            by_key,
            by_key,
            PartitionSpec(by_head[0], by_head[2]),
            PartitionSpec(by_head[0], tokens),
            *(PartitionSpec() for _ in layer),
        ),
        out_specs=by_head,
        check_vma=False,
    )(q, k, v, at, keys, *layer)
