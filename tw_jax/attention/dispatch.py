"""`attend`, the only attention function that models call. It selects a backend and shards it.

A backend is a function with the signature of `reference.attend`. It either computes exactly the
same function or raises NotImplementedError with the reason. To add one, for example a GPU kernel,
put it into `BACKENDS`, `BLOCKS`, `preferred` and `Impl`, and into the tests that all backends pass,
`tests/attention/test_exam.py`.
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
"""Sizes (queries, keys) of the blocks of a backend, as a function of T, S and N / G."""

_FEW_PAIRS = 256 * 256  # Up to this size dense attention is the fastest, see `preferred`.


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
      at: [B, T] int32, the number of each query, which keys' intervals are compared with.
      keys: [B, S] int32 spans.
      layer: [] int32, the layer of a cache to read. With it "auto" is `cached.attend`, which has no
        gradient.
      impl: A backend, or "auto" for the first of `preferred` that does not raise
        NotImplementedError.
      scale: Factor of the scores, usually H ** -0.5.

    Returns:
      [B, N, T, H] in the dtype of `q`.

    Raises:
      ValueError: If no backend has this name.
      NotImplementedError: If the backend cannot compute this, or with "auto" none can. The message
        has the reason of each.
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
        raise ValueError(f"impl = {impl!r} must be auto or one of {', '.join(BACKENDS)}.")
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
    raise NotImplementedError("No attention backend can compute this. " + " ".join(refusals))


def preferred(queries: int, slots: int) -> tuple[Impl, ...]:
    """Backends in the order in which "auto" tries them if there is no cache.

    Time of `reference` divided by time of `blockwise`, forward and gradients, 8 rows of T tokens, 4
    heads of 32, 2 CPU cores, float32: 1.05 at T = 128, 2.4 at 256, 3.4 at 512. For long rows
    `reference` is not in the list, because its memory is quadratic.
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
    """Runs a backend on each device's own rows, heads and queries; outside of `use`, just runs it.

    Without shard_map the compiler would gather all rows on every device, because it cannot split a
    loop that reads another row in each iteration. Keys and values are split like the query heads.
    If there are fewer key heads than devices, each is repeated so that every device has one. If a
    row is split over devices, each device gathers the keys and values of the whole row for its own
    queries.
    """
    current = sharding.current()
    if current is None:
        return backend(q, k, v, *layer, at=at, keys=keys, scale=scale)
    mesh, rules = current
    by_head = sharding.spec(("rows", "heads", "tokens"), q.shape[:3], mesh, rules, name="queries")
    # A cache is not split over tokens. The keys of the queries' own tokens are split like these.
    tokens = by_head[2] if not layer and k.shape[2] == q.shape[2] else None
    by_token = sharding.mesh_axes(PartitionSpec(tokens))

    def local(q, k, v, at, keys, *layer):
        k, v = (sequence.gather(x, by_token, 2) for x in (k, v))
        keys = jax.tree.map(lambda x: sequence.gather(x, by_token, 1), keys)
        return backend(q, k, v, *layer, at=at, keys=keys, scale=scale)

    if by_head[1] is not None:
        split = math.prod(mesh.shape[axis] for axis in rules.heads)
        repeats = math.lcm(k.shape[-3], split) // k.shape[-3]
        if layer and repeats > 1:  # Repeat one layer instead of the whole cache.
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
