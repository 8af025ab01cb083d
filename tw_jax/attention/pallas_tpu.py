"""Flash attention with the interval mask as TPU kernels: forward, dq, and dk with dv.

The grid of a kernel is the list of pairs of blocks that the mask needs. Each grid step reads from
the list which blocks to fetch. The list is computed on the device from the smallest and largest
numbers of each block, and its length is the size of the grid, known only at run time. So rows with
different tries run the same program, without padding, buckets or compiling again.

In the example of `blockwise.py` (blocks of 2, queries p q | a b | c d) the list in the order of
queries is, as (query block, key block):

    (0, 0) FIRST LAST CUT     the only key block of p q; the mask hides some of its pairs
    (1, 0) FIRST              a b see all of p q, so no mask is computed
    (1, 1)       LAST CUT
    (2, 0) FIRST
    (2, 2)       LAST CUT

At FIRST a kernel clears its accumulators, and at LAST it writes its result. dk and dv need the same
pairs in the order of keys: (0, 0), (1, 0), (2, 0), (1, 1), (2, 2).

Inside a kernel the scores of a pair of blocks are [keys, queries], with queries along the lanes.
Maxima, sums and log-sums over keys are then rows of one sublane, which need no copy for each lane.
The M query heads that share a key head are adjacent in R = M * block queries, so that keys and
values are read once for all of them.

Source: FlashAttention (arXiv:2205.14135, 2307.08691); a grid of unknown size as in JAX's grouped
matrix products (megablox); the mask is ours.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from tw_jax import sharding
from tw_jax.attention.blockwise import KEPT, pad
from tw_jax.contracts import Span
from tw_jax.trie.mask import HIDDEN, LOWEST, needed, sees

_LANES = 128
_QUERIES = 1024  # Queries of a block, those of all heads that share a key head together.
_KEYS = 512
# A pair is one int32: query block (13 bits), key block (13 bits), and 4 flags. FIRST and LAST mark
# the first and the last pair of a block; CUT a pair with hidden tokens, for which the mask is
# computed; IDLE a pair of a block that needs no other, for which only zeros are written.
_FIRST, _LAST, _CUT, _IDLE = 1, 2, 4, 8
_FLAG_BITS, _BLOCK_BITS = 4, 13
_MAX_PAIRS = 3 * 2**16  # The list is in scalar memory, which has 1 MiB.


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    at: jax.Array,
    keys: Span,
    scale: float,
    query_block: int | None = None,
    key_block: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Softmax attention over the pairs of blocks that the mask needs.

    Computes the same function as `reference.attend`, with zeros for queries that see nothing.

    Args:
      q: [B, N, T, H] floating, N a multiple of G.
      k: [B, G, S, H] floating.
      v: [B, G, S, H] floating.
      at: [B, T] int32, the number of each query, which keys' intervals are compared with.
      keys: [B, S] int32 spans.
      scale: Factor of the scores, usually H ** -0.5.
      query_block: Queries of a block, a multiple of 128. By default 1024 / (N / G), so that a block
        has 1024 rows.
      key_block: Keys of a block, a multiple of 128; 512 by default.
      interpret: `pltpu.InterpretParams` to run the kernels on any device, for tests.

    Returns:
      [B, N, T, H] in the dtype of `q`.

    Raises:
      NotImplementedError: If the devices are not TPUs, or if the rows have more pairs of blocks
        than the list can hold.
    """
    if not interpret and (platform := sharding.platform()) != "tpu":
        raise NotImplementedError(f"the kernels are for TPUs and the devices are {platform}")
    (rows, heads, queries, width), (groups, slots) = q.shape, k.shape[1:3]
    stack = heads // groups
    query_block, key_block = blocks(
        queries, slots, stack, query_block=query_block, key_block=key_block
    )
    # Queries are padded with copies of the last one, which need no further key block. Keys are
    # padded with the interval (0, 0), which is empty.
    at = pad(at, 1, query_block, mode="edge")
    keys = jax.tree.map(lambda x: pad(x, 1, key_block), keys)
    counts = at.shape[1] // query_block, keys.enter.shape[1] // key_block
    if rows * max(counts) >= 2**_BLOCK_BITS or rows * counts[0] * counts[1] > _MAX_PAIRS:
        raise NotImplementedError(
            f"{rows} rows of {counts[0]} x {counts[1]} pairs of blocks are more than the list of "
            f"{_MAX_PAIRS} pairs in scalar memory can hold; use shorter rows, fewer rows on a "
            "device, or larger blocks"
        )

    plan = _plan(at, keys, query_block, key_block)
    stacked_at = jnp.tile(at.reshape(-1, 1, query_block), (1, 1, stack))
    spans = jax.tree.map(lambda x: x.reshape(-1, 1, key_block), keys)
    out = _attend(
        (scale, interpret),
        pad(q, 2, query_block).reshape(rows, groups, stack, -1, width),
        pad(k, 2, key_block),
        pad(v, 2, key_block),
        stacked_at,
        spans,
        plan,
    )
    return out.reshape(rows, heads, -1, width)[:, :, :queries]


def blocks(
    queries: int,
    slots: int,
    stack: int,
    *,
    query_block: int | None = None,
    key_block: int | None = None,
) -> tuple[int, int]:
    """Numbers of queries and keys in a block, see `attend`; `stack` = N / G."""
    query_block = query_block or max(_LANES, _QUERIES // stack // _LANES * _LANES)
    return min(query_block, _up(queries, _LANES)), min(key_block or _KEYS, _up(slots, _LANES))


def _up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple


def _plan(at: jax.Array, keys: Span, query_block: int, key_block: int):
    """The list of pairs of blocks, in the order of queries and in the order of keys.

    Blocks are numbered through all rows. A block that needs no other gets one idle pair, so that
    zeros are written to its part of the output.

    Returns:
      Twice (pairs [B Q K] int32, of which the first `count` are valid; count [] int32).
    """
    need = needed(at, keys, query_block=query_block, key_block=key_block)
    by_query = at.reshape(len(at), -1, 1, query_block)
    enter, exit = (x.reshape(len(at), 1, -1, key_block) for x in (keys.enter, keys.exit))
    # In a whole pair every query sees every key, so the kernel needs no mask.
    whole = (enter.max(-1) <= by_query.min(-1)) & (by_query.max(-1) < exit.min(-1))
    numbers = jnp.arange(need.size // need.shape[2]).reshape(*need.shape[:2], 1)
    others = jnp.arange(need.size // need.shape[1]).reshape(len(at), 1, -1)
    pairs = (numbers << _BLOCK_BITS | others) << _FLAG_BITS | jnp.where(whole, 0, _CUT)

    def ordered(need: jax.Array, pairs: jax.Array) -> tuple[jax.Array, jax.Array]:
        is_idle = ~need.any(axis=-1, keepdims=True)
        need = need | (is_idle & (jnp.arange(need.shape[-1]) == 0))
        rank = jnp.cumsum(need, axis=-1)
        pairs = pairs | jnp.where(rank == 1, _FIRST, 0) | jnp.where(is_idle, _IDLE, 0)
        pairs = pairs | jnp.where(rank == rank[..., -1:], _LAST, 0)
        index = jnp.nonzero(need.ravel(), size=need.size, fill_value=0)[0]
        return pairs.ravel()[index].astype(jnp.int32), need.sum(dtype=jnp.int32)

    return ordered(need, pairs), ordered(need.swapaxes(1, 2), pairs.swapaxes(1, 2))


def _query(pair: jax.Array) -> jax.Array:
    return pair >> (_FLAG_BITS + _BLOCK_BITS)


def _key(pair: jax.Array) -> jax.Array:
    return (pair >> _FLAG_BITS) & (2**_BLOCK_BITS - 1)


def _dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
    """The product a b, or a b^T, with float32 sums; float32 operands are not rounded."""
    contract = (((1,), (1 if transposed else 0,)), ((), ()))
    precision = lax.Precision.HIGHEST if b.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(
        a.astype(b.dtype), b, contract, precision=precision, preferred_element_type=jnp.float32
    )


def _scores(pair, scale, at, enter, exit, q, k) -> jax.Array:
    """Scores of a pair of blocks, [keys, R] float32; q: [R, H]."""
    scores = _dot(k[...], q, transposed=True) * scale

    def cut(scores: jax.Array) -> jax.Array:
        # Turns a row of lanes into a column. The hardware transposes full tiles only.
        column = lambda x: jnp.broadcast_to(x[...], (_LANES, x.shape[1])).T[:, :1]  # noqa: E731
        return jnp.where(sees(at[...], Span(column(enter), column(exit))), scores, HIDDEN)

    return lax.cond((pair & _CUT) != 0, cut, lambda scores: scores, scores)


def _forward_kernel(pairs, at, enter, exit, q, k, v, out, log_sum, acc, top, total, *, scale):
    """v: [H, keys]; q, out: [M, queries, H]; acc: [H, R]; log_sum, top, total: [1, R]."""
    pair = pairs[pl.program_id(1)]

    @pl.when((pair & _FIRST) != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        top[...] = jnp.full_like(top, LOWEST)
        total[...] = jnp.zeros_like(total)

    @pl.when((pair & _IDLE) == 0)
    def _():
        scores = _scores(pair, scale, at, enter, exit, _stacked(q), k)
        new_top = jnp.maximum(top[...], scores.max(axis=0, keepdims=True))
        weights = jnp.exp(scores - new_top)
        shrink = jnp.exp(top[...] - new_top)
        top[...] = new_top
        total[...] = total[...] * shrink + weights.sum(axis=0, keepdims=True)
        acc[...] = acc[...] * shrink + _dot(v[...], weights.astype(v.dtype))

    @pl.when((pair & _LAST) != 0)
    def _():
        is_seeing = total[...] > 0
        safe = jnp.where(is_seeing, total[...], 1.0)
        out[...] = (acc[...] / safe).T.reshape(out.shape).astype(out.dtype)
        # A query that sees nothing has log-sum 0. Its weights in the backward pass are then
        # exp(HIDDEN - 0) = 0, so its gradients are 0.
        log_sum[...] = jnp.where(is_seeing, top[...] + jnp.log(safe), 0.0)


def _stacked(x) -> jax.Array:
    """Stacks the query heads of a key head: [M, queries, H] to [R, H]."""
    return x[...].reshape(-1, x.shape[-1])


def _pull(pair, scale, at, enter, exit, q, k, v, d_out, log_sum, delta):
    """Weights, and gradients of the scores, [keys, R] float32; q, d_out: [R, H]."""
    weights = jnp.exp(_scores(pair, scale, at, enter, exit, q, k) - log_sum[...])
    d_weights = _dot(v[...], d_out, transposed=True)
    return weights, weights * (d_weights - delta[...]) * scale


def _query_kernel(pairs, at, enter, exit, q, k, v, d_out, log_sum, delta, k_t, dq, acc, *, scale):
    """k_t: [H, keys]; q, d_out, dq: [M, queries, H]; acc: [H, R]."""
    pair = pairs[pl.program_id(1)]

    @pl.when((pair & _FIRST) != 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    @pl.when((pair & _IDLE) == 0)
    def _():
        heads = _stacked(q), k, v, _stacked(d_out)
        _, d_scores = _pull(pair, scale, at, enter, exit, *heads, log_sum, delta)
        acc[...] += _dot(k_t[...], d_scores.astype(k_t.dtype))

    @pl.when((pair & _LAST) != 0)
    def _():
        dq[...] = acc[...].T.reshape(dq.shape).astype(dq.dtype)


def _key_kernel(
    pairs, at, enter, exit, q, k, v, d_out, log_sum, delta, dk, dv, dk_acc, dv_acc, *, scale
):
    """q, d_out: [M, queries, H]; dk, dv: [keys, H]."""
    pair = pairs[pl.program_id(1)]

    @pl.when((pair & _FIRST) != 0)
    def _():
        dk_acc[...] = jnp.zeros_like(dk_acc)
        dv_acc[...] = jnp.zeros_like(dv_acc)

    @pl.when((pair & _IDLE) == 0)
    def _():
        heads = _stacked(q), k, v, _stacked(d_out)
        weights, d_scores = _pull(pair, scale, at, enter, exit, *heads, log_sum, delta)
        dk_acc[...] += _dot(d_scores, heads[0])
        dv_acc[...] += _dot(weights, heads[3])

    @pl.when((pair & _LAST) != 0)
    def _():
        dk[...] = dk_acc[...].astype(dk.dtype)
        dv[...] = dv_acc[...].astype(dv.dtype)


def _by(number, *block):
    """Blocks of an array [blocks, G, ...], or [blocks, ...] for arrays without heads."""
    if len(block) == 2:
        return pl.BlockSpec((None, None, *block), lambda g, p, pairs: (number(pairs[p]), g, 0, 0))
    return pl.BlockSpec((None, 1, *block), lambda g, p, pairs: (number(pairs[p]), 0, 0))


def _by_query(count, *block):
    """Blocks of queries in [B, G, M, T, H]; a row has `count` of them."""

    def place(g, p, pairs):
        number = _query(pairs[p])
        return (lax.div(number, count), g, 0, lax.rem(number, count), 0)

    return pl.BlockSpec((None, None, *block), place)


def _by_key(count, *block, transposed=False):
    """Blocks of keys in [B, G, S, H], or transposed in [B, G, H, S]; a row has `count` of them."""

    def place(g, p, pairs):
        row, here = lax.div(_key(pairs[p]), count), lax.rem(_key(pairs[p]), count)
        return (row, g, 0, here) if transposed else (row, g, here, 0)

    return pl.BlockSpec((None, None, *block), place)


def _call(kernel, options, plan, inputs, outputs, scratch, arrays):
    """Runs a kernel for all pairs of the plan and each key head."""
    scale, interpret = options
    pairs, count = plan
    return pl.pallas_call(
        functools.partial(kernel, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(arrays[3].shape[1], count),
            in_specs=inputs,
            out_specs=[spec for spec, _ in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=[shape for _, shape in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
    )(pairs, *arrays)


def _folded(options, q, k, v, at, keys, plan) -> jax.Array:
    """Attention on folded arrays.

    Args:
      options: (scale, interpret).
      q: [B, G, M, Q queries, H].
      k: [B, G, K b, H].
      v: [B, G, K b, H].
      at: [B Q, 1, R] int32, R = M queries.
      keys: [B K, 1, b] spans.
      plan: of `_plan`.

    Returns:
      [B, G, M, Q queries, H] in the dtype of `q`.
    """
    return _forward(options, q, k, v, at, keys, plan)[0]


def _forward(options, q, k, v, at, keys, plan):
    """Returns the output and the residuals of the backward pass."""
    (_, groups, stack, queries, width), (blocks, _, lanes) = q.shape, at.shape
    slots = keys.enter.shape[2]
    count = k.shape[2] // slots
    by_query = _by_query(queries * stack // lanes, stack, lanes // stack, width)
    inputs = [
        _by(_query, lanes),
        _by(_key, slots),
        _by(_key, slots),
        by_query,
        _by_key(count, slots, width),
        _by_key(count, width, slots, transposed=True),
    ]
    outputs = [
        (by_query, jax.ShapeDtypeStruct(q.shape, q.dtype)),
        (
            _by(_query, 1, lanes),
            jax.ShapeDtypeStruct((blocks, groups, 1, lanes), jnp.float32),
        ),
    ]
    scratch = [(width, lanes), (1, lanes), (1, lanes)]
    arrays = (at, keys.enter, keys.exit, q, k, v.swapaxes(2, 3))
    out, log_sum = _call(_forward_kernel, options, plan[0], inputs, outputs, scratch, arrays)
    # With a remat policy that keeps these two, the backward pass does not run this kernel again.
    out, log_sum = checkpoint_name(out, KEPT), checkpoint_name(log_sum, KEPT)
    return out, (q, k, v, at, keys, plan, out, log_sum)


def _backward(options, kept, d_out):
    """Two kernels, for dq and for dk with dv; both recompute p and ds.

    With p = exp(scores - log_sum), and d for gradients: dv = p^T do, ds = p (do v^T - sum(o do))
    scale, dq = ds k, dk = ds^T q.
    """
    q, k, v, at, keys, plan, out, log_sum = kept
    (rows, groups, stack, queries, width), (blocks, _, lanes) = q.shape, at.shape
    slots, block = keys.enter.shape[2], lanes // stack
    by_query = _by_query(queries // block, stack, block, width)
    by_key = _by_key(k.shape[2] // slots, slots, width)
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)
    delta = delta.reshape(rows, groups, stack, -1, block).transpose(0, 3, 1, 2, 4)
    delta = delta.reshape(blocks, groups, 1, lanes)
    arrays = (at, keys.enter, keys.exit, q, k, v, d_out, log_sum, delta)
    inputs = [
        _by(_query, lanes),
        _by(_key, slots),
        _by(_key, slots),
        by_query,
        by_key,
        by_key,
        by_query,
        _by(_query, 1, lanes),
        _by(_query, 1, lanes),
    ]
    [dq] = _call(
        _query_kernel,
        options,
        plan[0],
        [*inputs, _by_key(k.shape[2] // slots, width, slots, transposed=True)],
        [(by_query, jax.ShapeDtypeStruct(q.shape, q.dtype))],
        [(width, lanes)],
        (*arrays, k.swapaxes(2, 3)),
    )
    dk, dv = _call(
        _key_kernel,
        options,
        plan[1],
        inputs,
        [(by_key, jax.ShapeDtypeStruct(x.shape, x.dtype)) for x in (k, v)],
        [(slots, width)] * 2,
        arrays,
    )
    return dq, dk, dv, None, None, None


_attend = jax.custom_vjp(_folded, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)
