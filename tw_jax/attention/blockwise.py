"""Attention by blocks, in plain XLA: memory is linear in T, and hidden blocks cost nothing.

In a packed row of tries most pairs of tokens are hidden. For each block of queries, `trie/mask.py`
lists the key blocks with a visible pair. A loop over this list, whose length is known only at run
time, adds one key block after another to an online softmax. JAX cannot differentiate a loop of
unknown length, so the backward pass is written here too. It walks the same list once, with five
matrix products for each pair of blocks. Between the two passes only the output and one log-sum for
each query are kept. No array has size T x S.

Worked example. A row holds a prompt p q, a thread a b and a sibling thread c d. Query i sees key j
iff enter[j] <= i < exit[j]:

    token      p q a b c d             keys:  p q a b c d
    enter      0 1 2 3 4 5         query p    x
    exit       6 6 4 4 6 6         query q    x x
                                   query a    x x x
                                   query b    x x x x
                                   query c    x x     x
                                   query d    x x     x x

With blocks of 2, a pair of blocks is needed iff the smallest `enter` of its keys is at most the
largest query, and the smallest query is below the largest `exit` of its keys. Queries p q need key
block 0 only; a b need blocks 0 and 1; c d need blocks 0 and 2, because 4 < 4 fails for block 1. So
index = [[0, ..], [0, 1, ..], [0, 2, ..]] and count = [1, 2, 2]: 5 pairs of blocks instead of 9.

Layout inside, after `_fold`: the leading dimension counts blocks. The queries of the M = N / G
heads that share a key head are stacked into the R = M * block rows of one matrix, so that keys and
values are read once for all of them.
Source: the online softmax of FlashAttention (arXiv:2205.14135, 2307.08691), with our mask.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tw_jax.contracts import Span
from tw_jax.trie.mask import HIDDEN, LOWEST, needed, sees, visits

KEPT = "attention"
"""Name of the output and the log-sums in remat policies; the backward pass reads both."""
BLOCK = 256
_GRAIN = 32  # Sizes of blocks are multiples of this.


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    at: jax.Array,
    keys: Span,
    scale: float,
    block: int = BLOCK,
) -> jax.Array:
    """Softmax attention over the pairs of blocks that the mask needs.

    Computes the same function as `reference.attend`, with zeros for queries that see nothing. Keys
    and values of a block that is not needed are not read, so even NaN there has no effect.

    A row is cut into the smallest number of equal blocks of at most `block` tokens, rounded up to a
    multiple of 32. Missing tokens at the end are padded with keys that no query sees.

    Args:
      q: [B, N, T, H] floating, N a multiple of G.
      k: [B, G, S, H] floating.
      v: [B, G, S, H] floating.
      at: [B, T] int32, the number of each query, which keys' intervals are compared with.
      keys: [B, S] int32 spans.
      scale: Factor of the scores, usually H ** -0.5.
      block: Largest number of queries and of keys in a block; a multiple of 32.

    Returns:
      [B, N, T, H] in the dtype of `q`.
    """
    groups, queries = k.shape[1], q.shape[2]
    query_block, key_block = blocks(queries, k.shape[2], block=block)
    # Queries are padded with copies of the last one, which need no further key block. Keys are
    # padded with the interval (0, 0), which is empty.
    at = pad(at, 1, query_block, mode="edge")
    keys = jax.tree.map(lambda x: pad(x, 1, key_block), keys)
    plan = visits(needed(at, keys, query_block=query_block, key_block=key_block))
    fold = functools.partial(_fold, groups=groups)
    stacked = at.reshape(at.shape[0], -1, query_block)
    out = _attend(
        scale,
        fold(pad(q, 2, query_block), query_block),
        fold(pad(k, 2, key_block), key_block),
        fold(pad(v, 2, key_block), key_block),
        jnp.tile(stacked, (1, 1, q.shape[1] // groups)),
        jax.tree.map(lambda x: x.reshape(x.shape[0], -1, key_block), keys),
        plan,
    )
    return _unfold(out, query_block)[:, :, :queries]


def blocks(queries: int, slots: int, stack: int = 1, *, block: int = BLOCK) -> tuple[int, int]:
    """Numbers of queries and keys in a block, see `attend`; `stack` = N / G has no effect here."""

    def size(tokens: int) -> int:
        count = -(-tokens // block)
        return -(-tokens // (count * _GRAIN)) * _GRAIN

    return size(queries), size(slots)


def pad(x: jax.Array, axis: int, multiple: int, mode: str = "constant") -> jax.Array:
    """Pads `axis` at its end to a multiple."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    return jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)], mode=mode)


def _fold(x: jax.Array, block: int, groups: int) -> jax.Array:
    """Cuts [B, N, T, H] into blocks [B, T / block, G, (N / G) * block, H]."""
    rows, heads, tokens, width = x.shape
    x = x.reshape(rows, groups, heads // groups, tokens // block, block, width)
    return x.transpose(0, 3, 1, 2, 4, 5).reshape(rows, tokens // block, groups, -1, width)


def _unfold(x: jax.Array, block: int) -> jax.Array:
    """The inverse of `_fold`: [B, Q, G, M * block, H] to [B, G * M, Q * block, H]."""
    rows, blocks, groups, stack, width = x.shape
    x = x.reshape(rows, blocks, groups, stack // block, block, width)
    return x.transpose(0, 2, 3, 1, 4, 5).reshape(rows, -1, blocks * block, width)


def _dot(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """A product with float32 sums. A float32 operand is rounded to the dtype of the other one.

    On CPU both are converted to float32 instead, because XLA for CPU fails on some bfloat16
    products whose left operand is transposed ("Unsupported element type for DotThunk::Execute: BF16
    x BF16 = F32", jax 0.10.2).
    """
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)

    def product(dtype):
        def multiply(a, b):
            return jnp.einsum(
                spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32
            )

        return multiply

    if narrow == jnp.float32:
        return product(jnp.float32)(a, b)
    return lax.platform_dependent(a, b, cpu=product(jnp.float32), default=product(narrow))


def _scores(q: jax.Array, k: jax.Array, at: jax.Array, keys: Span, scale: float) -> jax.Array:
    """Masked scores of a pair: q [G, R, H], k [G, b, H], at [R], keys [b] -> [G, R, b]."""
    scores = scale * _dot("grh,gbh->grb", q, k)
    return jnp.where(sees(at[:, None], keys), scores, HIDDEN)


def nothing(q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The initial carry of `fold_in` for queries [..., H]: no keys have been added yet."""
    lowest = jnp.full(q.shape[:-1], LOWEST, jnp.float32)
    return jnp.zeros(q.shape, jnp.float32), lowest, jnp.zeros_like(lowest)


def fold_in(carry, q, k, v, at, keys, scale) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Adds one block of keys to the online softmax of a block of queries.

    The weights of earlier keys are relative to the largest score so far. If the new block has a
    larger one, the sums are rescaled by exp(old maximum - new maximum). Source: arXiv:2205.14135,
    algorithm 1.

    Args:
      carry: Weighted sum of values [G, R, H], largest score [G, R] and sum of weights [G, R], all
        float32; weights are exp(score - largest score).
      q: [G, R, H].
      k: [G, b, H].
      v: [G, b, H].
      at: [R] int32.
      keys: [b] spans.
      scale: Factor of the scores.

    Returns:
      The carry with these keys added.
    """
    out, top, total = carry
    scores = _scores(q, k, at, keys, scale)
    new_top = jnp.maximum(top, scores.max(axis=-1))
    weights = jnp.exp(scores - new_top[..., None])
    shrink = jnp.exp(top - new_top)
    out = out * shrink[..., None] + _dot("grb,gbh->grh", weights, v)
    return out, new_top, total * shrink + weights.sum(axis=-1)


def _folded(scale, q, k, v, at, keys, plan) -> jax.Array:
    """Attention on folded arrays.

    Args:
      scale: Factor of the scores.
      q: [B, Q, G, R, H].
      k: [B, K, G, b, H].
      v: [B, K, G, b, H].
      at: [B, Q, R] int32.
      keys: [B, K, b] spans.
      plan: index [B, Q, K] and count [B, Q]: the key blocks that each query block visits are the
        first `count` of `index`, see `trie.mask.visits`.

    Returns:
      [B, Q, G, R, H] in the dtype of `q`.
    """
    return _forward(scale, q, k, v, at, keys, plan)[0]


def _forward(scale, q, k, v, at, keys, plan):
    """Returns the output and the residuals of the backward pass."""

    def row(x):
        q, k, v, at, keys, plan = x

        def query_block(x):
            q, at, (index, count) = x

            def visit(step, carry):
                j = index[step]
                key = jax.tree.map(lambda x: x[j], keys)
                return fold_in(carry, q, k[j], v[j], at, key, scale)

            out, top, total = lax.fori_loop(0, count, visit, nothing(q))
            is_seeing = total > 0
            total = jnp.where(is_seeing, total, 1.0)
            # A query that sees nothing has log-sum 0. Its weights in the backward pass are then
            # exp(HIDDEN - 0) = 0, so its gradients are 0.
            log_sum = jnp.where(is_seeing, top + jnp.log(total), 0.0)
            return (out / total[..., None]).astype(q.dtype), log_sum

        return lax.map(query_block, (q, at, plan))

    out, log_sum = lax.map(row, (q, k, v, at, keys, plan))
    # With a remat policy that keeps these two, the backward pass does not run this loop again.
    out, log_sum = checkpoint_name(out, KEPT), checkpoint_name(log_sum, KEPT)
    return out, (q, k, v, at, keys, plan, out, log_sum)


def _backward(scale, kept, d_out):
    """One pass over the same pairs of blocks.

    With p = exp(scores - log_sum), and d for gradients: dv = p^T do, ds = p (do v^T - sum(o do))
    scale, dq = ds k, dk = ds^T q. dq is complete after the pairs of one query block. dk and dv get
    contributions from many query blocks, so the loop over query blocks carries them for the whole
    row. They are computed transposed, [H, b], from blocks of q and do that are transposed once,
    because XLA on CPU contracts the leading axis of a large left operand 1.7 times more slowly.
    """
    q, k, v, at, keys, plan, out, log_sum = kept
    delta = (out.astype(jnp.float32) * d_out.astype(jnp.float32)).sum(axis=-1)

    def row(x):
        k, v, keys, *per_query = x

        def query_block(carry, x):
            q, at, (index, count), d_out, log_sum, delta = x
            q_t, d_out_t = q.swapaxes(1, 2), d_out.swapaxes(1, 2)

            def visit(step, carry):
                dq, dk, dv = carry
                j = index[step]
                key = jax.tree.map(lambda x: x[j], keys)
                weights = jnp.exp(_scores(q, k[j], at, key, scale) - log_sum[..., None])
                d_weights = _dot("grh,gbh->grb", d_out, v[j])
                d_scores = weights * (d_weights - delta[..., None]) * scale
                dq = dq + _dot("grb,gbh->grh", d_scores, k[j])
                dk = _add_at(dk, j, _dot("ghr,grb->ghb", q_t, d_scores))
                dv = _add_at(dv, j, _dot("ghr,grb->ghb", d_out_t, weights))
                return dq, dk, dv

            start = (jnp.zeros(q.shape, jnp.float32), *carry)
            dq, dk, dv = lax.fori_loop(0, count, visit, start)
            return (dk, dv), dq.astype(q.dtype)

        zeros = jnp.zeros(k.swapaxes(2, 3).shape, jnp.float32)
        (dk, dv), dq = lax.scan(query_block, (zeros, zeros), tuple(per_query))
        return dq, dk.swapaxes(2, 3).astype(k.dtype), dv.swapaxes(2, 3).astype(v.dtype)

    dq, dk, dv = lax.map(row, (k, v, keys, q, at, plan, d_out, log_sum, delta))
    return dq, dk, dv, None, None, None


def _add_at(x: jax.Array, j: jax.Array, value: jax.Array) -> jax.Array:
    """Adds to x[j] by a slice update, which a loop does in place; a scatter is slower on CPU."""
    return lax.dynamic_update_index_in_dim(x, x[j] + value, j, 0)


_attend = jax.custom_vjp(_folded, nondiff_argnums=(0,))
_attend.defvjp(_forward, _backward)
