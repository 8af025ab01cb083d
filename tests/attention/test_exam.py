"""One exam for all attention backends: values, gradients, transformations, memory and lowering.

A backend may refuse a question (NotImplementedError, shown as a skip); it never chooses them. The
oracle is numpy in float64 over an explicit ancestry matrix, found by walking parent pointers; it
knows no intervals. A new backend enters through `dispatch.BACKENDS`.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import subjaxprs

from tw_jax.attention import blockwise, dispatch, pallas_tpu, reference
from tw_jax.contracts import Span

# Rows of the exam are short, so blockwise also sits it with the smallest blocks.
CANDIDATES = {
    **dispatch.BACKENDS,
    "blockwise of 32": functools.partial(blockwise.attend, block=32),
    # A simulated TPU: races end the test, and memory that was never written is NaN.
    "pallas_tpu of 128, interpreted": functools.partial(
        pallas_tpu.attend,
        query_block=128,
        key_block=128,
        interpret=pltpu.InterpretParams(
            detect_races=True, uninitialized_memory="nan", num_cores_or_threads=2
        ),
    ),
}
SCALE = 0.3


@pytest.fixture(params=CANDIDATES)
def attend(request):
    backend = CANDIDATES[request.param]

    def run(*args, **kwargs):
        try:
            return backend(*args, **kwargs)
        except NotImplementedError as refusal:
            pytest.skip(f"{request.param} refuses: {refusal}")

    yield run
    if "interpreted" in request.param:
        assert interpret_pallas_call.races is not None, "no kernel was interpreted"
        assert not interpret_pallas_call.races.races_found


each_backend = pytest.mark.parametrize("attend", dispatch.BACKENDS, indirect=True)


def forest(rng: np.random.Generator, tokens: int, tries: int) -> np.ndarray:
    """Parent pointers of a packed row in preorder: tries with forks, and padding at the end."""
    padding = tokens // 10
    roots = {0, *rng.choice(np.arange(1, tokens - padding), tries - 1, replace=False).tolist()}
    parent = np.arange(-1, tokens - 1)
    for node in range(1, tokens):
        if node in roots or node >= tokens - padding:
            parent[node] = -1
        elif rng.random() < 0.15:  # a sibling branch: leave the path of the last node further up
            for _ in range(rng.integers(1, 20)):
                up = parent[parent[node]]
                parent[node] = up if up >= 0 else parent[node]
    return parent


def spans(visible: np.ndarray) -> Span:
    """Intervals of a row, read off its ancestry matrix: the last node that sees me ends me."""
    end = len(visible) - visible[::-1].argmax(axis=0)
    return Span(enter=jnp.arange(len(visible), dtype=jnp.int32), exit=jnp.int32(end))


def brute_force(q, k, v, d_out, visible):
    """Output and the gradients of sum(output * d_out), in float64; visible is [B, T, S]."""
    q, k, v, d_out = (np.asarray(x.astype(jnp.float32), np.float64) for x in (q, k, v, d_out))
    group = q.shape[1] // k.shape[1]
    out, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    for b, n in np.ndindex(q.shape[:2]):
        g = n // group
        scores = np.where(visible[b], SCALE * q[b, n] @ k[b, g].T, -np.inf)
        top = scores.max(axis=1, keepdims=True, initial=-1e9)
        p = np.exp(scores - top)
        p /= np.maximum(p.sum(axis=1, keepdims=True), 1e-300)
        out[b, n] = p @ v[b, g]
        dp = d_out[b, n] @ v[b, g].T
        ds = SCALE * p * (dp - (p * dp).sum(axis=1, keepdims=True))
        dq[b, n] = ds @ k[b, g]
        dk[b, g] += ds.T @ q[b, n]
        dv[b, g] += p.T @ d_out[b, n]
    return out, dq, dk, dv


def normal(rng, dtype, *shape):
    return jnp.asarray(rng.normal(size=shape), dtype)


def answers(attend, q, k, v, d_out, at, keys):
    """Output and gradients of a backend, for the same loss as `brute_force`."""

    @jax.jit
    def run(q, k, v):
        out, pull = jax.vjp(lambda *x: attend(*x, at=at, keys=keys, scale=SCALE), q, k, v)
        return out, *pull(d_out)

    return run(q, k, v)


def check(got, want, dtype, close):
    for name, ours, truth in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert ours.dtype == dtype, name
        error = np.abs(np.asarray(ours.astype(jnp.float32)) - truth) / np.abs(truth).max()
        if dtype == jnp.float32:
            close.error("module", error.max(), name)
        else:
            close.error("bf16_most", np.quantile(error, 0.99), name)
            close.error("bf16_all", error.max(), name)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "tokens", "tries", "heads", "groups"),
    [(1, 96, 1, 4, 4), (3, 150, 3, 4, 2), (2, 77, 4, 4, 1), (1, 300, 2, 2, 1)],
    ids=["one trie", "three rows of three", "one kv head", "longer than a block"],
)
def test_packed_tries(attend, rows, tokens, tries, heads, groups, dtype, close):
    rng = np.random.default_rng(tokens)
    visible = np.stack(
        [oracles.visible_by_parents(forest(rng, tokens, tries)) for _ in range(rows)]
    )
    keys = jax.tree.map(lambda *x: jnp.stack(x), *map(spans, visible))
    q, d_out = (normal(rng, dtype, rows, heads, tokens, 16) for _ in range(2))
    k, v = (normal(rng, dtype, rows, groups, tokens, 16) for _ in range(2))
    got = answers(attend, q, k, v, d_out, keys.enter, keys)
    check(got, brute_force(q, k, v, d_out, visible), dtype, close)


def test_a_cache_of_shuffled_and_unused_slots_and_queries_that_see_nothing(attend, close):
    rng = np.random.default_rng(5)
    tokens, slots, queries = 90, 130, 41
    ancestry = oracles.visible_by_parents(forest(rng, tokens, 2))
    numbers = spans(ancestry)
    place = rng.permutation(slots)[:tokens]
    # An unused slot may hold any numbers as long as its interval is empty.
    enter = rng.integers(0, tokens, (1, slots)).astype(np.int32)
    exits = enter.copy()
    enter[0, place], exits[0, place] = numbers.enter, numbers.exit
    asking = rng.choice(tokens, queries)
    at = np.int32(asking)[None]
    visible = np.zeros((1, queries, slots), bool)
    visible[0][:, place] = ancestry[asking]
    blind = [3, 17, 40]
    at[0, blind], visible[0, blind] = -1, False

    q, d_out = (normal(rng, jnp.float32, 1, 4, queries, 8) for _ in range(2))
    k, v = (normal(rng, jnp.float32, 1, 2, slots, 8) for _ in range(2))
    keys = Span(enter=jnp.asarray(enter), exit=jnp.asarray(exits))
    got = answers(attend, q, k, v, d_out, jnp.asarray(at), keys)
    check(got, brute_force(q, k, v, d_out, visible), jnp.float32, close)
    out, dq, _, _ = got
    assert not np.any(out[:, :, blind])
    assert not np.any(dq[:, :, blind])


def row_of_chains(lengths: list[int], rows: int = 1) -> Span:
    """Tries without forks, side by side."""
    end = np.repeat(np.cumsum(lengths), lengths).astype(np.int32)
    enter = np.arange(len(end), dtype=np.int32)
    tiled = (jnp.asarray(np.tile(x, (rows, 1))) for x in (enter, end))
    return Span(*tiled)


@each_backend
def test_scores_of_any_size_stay_finite(attend):
    keys = row_of_chains([20, 30])
    q, k, v = (normal(np.random.default_rng(i), jnp.float32, 1, 2, 50, 8) for i in range(3))
    for size in (1e4, 1e-20):
        got = answers(attend, q * size, k * size, v, v, keys.enter, keys)
        assert all(bool(jnp.isfinite(x).all()) for x in got)


@each_backend
def test_transformations_leave_values_and_gradients_alone(attend, close):
    rng = np.random.default_rng(0)
    keys = row_of_chains([40, 41], rows=3)
    x, k, v = (normal(rng, jnp.float32, 3, 2, 81, 8) for _ in range(3))

    def layer(x, k, v, keys):
        return x + attend(x, k, v, at=keys.enter, keys=keys, scale=SCALE)

    def twice(x, k, v):
        return layer(layer(x, k, v, keys), k, v, keys).sum()

    def scanned(x, k, v):
        body = jax.checkpoint(lambda x, _: (layer(x, k, v, keys), None))
        return jax.lax.scan(body, x, None, length=2)[0].sum()

    def mapped(x, k, v):
        one = jax.vmap(lambda *row: layer(*jax.tree.map(lambda a: a[None], row))[0])
        return one(one(x, k, v, keys), k, v, keys).sum()

    want = jax.jit(jax.value_and_grad(twice, (0, 1, 2)))(x, k, v)
    for other in (scanned, mapped):
        got = jax.jit(jax.value_and_grad(other, (0, 1, 2)))(x, k, v)
        (value, gradients), (truth, others) = got, want
        close("module", value, truth, of=jnp.abs(k).sum())  # a sum of about as many of about 1
        close("module", gradients, others)


@each_backend
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_it_lowers_for_accelerators_from_this_host(attend, platform):
    keys = row_of_chains([100, 412])
    q = jax.ShapeDtypeStruct((1, 4, 512, 64), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, 2, 512, 64), jnp.bfloat16)

    def loss(q, k, v):
        return attend(q, k, v, at=keys.enter, keys=keys, scale=SCALE).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k)
    assert "stablehlo" in traced.lower(lowering_platforms=(platform,)).as_text()


def test_blockwise_never_reads_blocks_that_no_query_needs():
    rng = np.random.default_rng(0)
    keys = row_of_chains([64, 50])  # two blocks of 32 each, the last one ragged
    at = keys.enter[:, 64:]
    q, d_out = (normal(rng, jnp.float32, 1, 2, 50, 8) for _ in range(2))
    k, v = (normal(rng, jnp.float32, 1, 1, 114, 8) for _ in range(2))
    attend = CANDIDATES["blockwise of 32"]
    want = answers(attend, q, k, v, d_out, at, keys)
    got = answers(attend, q, *(x.at[:, :, :64].set(jnp.nan) for x in (k, v)), d_out, at, keys)
    for poisoned, clean in zip(got, want, strict=True):
        np.testing.assert_array_equal(poisoned, clean)
    assert not np.any(got[2][:, :, :64])


def largest(jaxpr) -> int:
    """Entries of the largest array in a jaxpr, those inside its loops and calls included."""
    arrays = [v.aval for eqn in jaxpr.eqns for v in (*eqn.invars, *eqn.outvars)]
    inner = [largest(sub) for sub in subjaxprs(jaxpr)]
    return max([math.prod(array.shape) for array in arrays] + inner, default=0)


def test_blockwise_makes_no_array_of_all_pairs():
    tokens = 2048
    keys = row_of_chains([1000, 1048])
    q = jax.ShapeDtypeStruct((1, 2, tokens, 16), jnp.float32)
    k = jax.ShapeDtypeStruct((1, 1, tokens, 16), jnp.float32)

    def gradients(attend):
        def loss(q, k, v):
            return attend(q, k, v, at=keys.enter, keys=keys, scale=SCALE).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k)

    # The reference shows that the search would find such an array.
    assert largest(gradients(reference.attend).jaxpr.jaxpr) >= tokens**2
    traced = gradients(blockwise.attend)
    assert largest(traced.jaxpr.jaxpr) <= tokens**2 // 16
    compiled = traced.lower().compile()
    assert compiled.memory_analysis().temp_size_in_bytes < tokens**2
