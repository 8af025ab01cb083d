"""Attention to a cache of all layers: what the one layer says, from the blocks that are needed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax import sharding
from tw_jax.attention import cached, dispatch
from tw_jax.contracts import Span

LAYERS, WIDTH, SCALE = 3, 8, 0.3
SLOTS = 2500  # blocks of 512, of which the last begins early


def case(rows, heads, groups, queries, dtype=jnp.float32, slots=SLOTS, seed=0):
    """Random arrays, spans in no order, unused slots among them, and a query that sees nothing."""
    rng = np.random.default_rng(seed)
    shapes = [(rows, heads, queries, WIDTH), *[(LAYERS, rows, groups, slots, WIDTH)] * 2]
    qkv = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    enter = rng.permuted(np.tile(np.arange(slots), (rows, 1)), axis=1)
    exits = np.where(rng.random((rows, slots)) < 0.6, enter + rng.geometric(0.02, enter.shape), 0)
    at = rng.integers(0, slots, (rows, queries))
    at[0, 0] = -1
    keys = Span(enter=jnp.int32(enter), exit=jnp.int32(exits))
    return qkv, {"at": jnp.int32(at), "keys": keys, "scale": SCALE}


def by_hand(q, k, v, layer, *, at, keys, scale):
    """[B, N, T, H] in float64, one query at a time, over an explicit list of what it sees."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k[layer], v[layer]))
    out = np.zeros(q.shape)
    for b, n, t in np.ndindex(q.shape[:3]):
        g = n // (q.shape[1] // k.shape[1])
        stands = int(at[b, t])
        seen = np.flatnonzero((np.asarray(keys.enter[b]) <= stands) & (stands < keys.exit[b]))
        if len(seen):
            scores = scale * k[b, g, seen] @ q[b, n, t]
            weights = np.exp(scores - scores.max())
            out[b, n, t] = weights @ v[b, g, seen] / weights.sum()
    return out


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize(
    ("rows", "heads", "groups", "queries"), [(1, 4, 4, 1), (3, 4, 2, 8), (2, 6, 1, 65)]
)
def test_it_reads_its_layer_of_the_cache(rows, heads, groups, queries, layer, close) -> None:
    qkv, rest = case(rows, heads, groups, queries)
    got = jax.jit(cached.attend)(*qkv, jnp.int32(layer), **rest)
    want = by_hand(*qkv, layer, **rest)
    close("module", got, want)
    assert not np.any(got[0, :, 0])


@pytest.mark.parametrize("slots", [1, 40, 256, 513])
def test_a_cache_of_any_size_is_read_once(slots, close) -> None:
    qkv, rest = case(2, 4, 2, 5, slots=slots)
    got = cached.attend(*qkv, jnp.int32(1), **rest)
    close("module", got, by_hand(*qkv, 1, **rest))


def test_bfloat16_stays_bfloat16(close) -> None:
    qkv, rest = case(2, 4, 2, 8, dtype=jnp.bfloat16)
    got = cached.attend(*qkv, jnp.int32(1), **rest)
    assert got.dtype == jnp.bfloat16
    close("bf16_all", np.asarray(got, np.float64), by_hand(*qkv, 1, **rest))


def test_blocks_that_no_row_needs_are_never_read() -> None:
    (q, k, v), rest = case(2, 4, 2, 8)
    keys = rest["keys"]
    keys = Span(enter=keys.enter, exit=keys.exit.at[:, 512:1536].set(0))
    poisoned = [x.at[:, :, :, 512:1536].set(jnp.nan) for x in (k, v)]
    got, clean = (
        cached.attend(q, *kv, jnp.int32(1), **rest | {"keys": keys}) for kv in (poisoned, (k, v))
    )
    np.testing.assert_array_equal(got, clean)
    assert np.any(clean)


def test_no_layer_is_cut_out_of_the_cache() -> None:
    slots, width = 8192, 64
    (q, *_), rest = case(4, 4, 2, 1, slots=slots)
    q = jnp.repeat(q, width // WIDTH, axis=-1)
    stack = jax.ShapeDtypeStruct((LAYERS, 4, 2, slots, width), jnp.float32)

    def temporaries(**how) -> int:
        attend = functools.partial(dispatch.attend, **rest, **how)
        compiled = jax.jit(attend).lower(q, stack, stack, layer=jnp.int32(1)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    layer = 4 * 2 * slots * width * 4
    assert temporaries() < layer // 2
    assert temporaries(impl="blockwise") > layer


def test_auto_reads_a_cache_in_place_and_a_backend_asked_for_by_name_its_layer(
    monkeypatch, close
) -> None:
    qkv, rest = case(2, 4, 2, 8)
    want = by_hand(*qkv, 2, **rest)
    for impl in ("reference", "blockwise"):
        got = dispatch.attend(*qkv, layer=jnp.int32(2), impl=impl, **rest)
        close("module", got, want)
    monkeypatch.setattr(dispatch, "BACKENDS", {})
    got = dispatch.attend(*qkv, layer=jnp.int32(2), **rest)
    close("module", got, want)


@pytest.mark.parametrize(
    ("mesh", "rules", "groups"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, {}, 2),
        ({"data": 1, "fsdp": 2, "tensor": 4}, {"kv_heads": ()}, 2),
    ],
    ids=["rows and heads", "more devices than kv heads"],
)
def test_eight_devices_read_what_one_does_and_move_no_rows(mesh, rules, groups, close) -> None:
    qkv, rest = case(4, 4, groups, 8)
    layer = jnp.int32(1)
    want = by_hand(*qkv, 1, **rest)
    table, mesh = sharding.Rules(**rules), sharding.make_mesh(sharding.Mesh(**mesh))
    stack = ("layer", "rows", "kv_heads", "slots", "head")
    axes = [("rows", "heads", "tokens", "head"), stack, stack]
    with sharding.use(mesh, table):
        placed = jax.device_put(qkv, sharding.shardings(axes, qkv, mesh, table))
        compiled = jax.jit(functools.partial(dispatch.attend, **rest)).lower(*placed, layer=layer)
        compiled = compiled.compile()
        got = compiled(*placed, layer=layer)
    close("module", got, want)
    assert "all-to-all" not in compiled.as_text()
    if not rules:
        assert "all-gather" not in compiled.as_text()
