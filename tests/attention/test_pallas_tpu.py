"""The TPU kernels besides the exam: their list of pairs, what they read, and that they compile."""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from attention.test_exam import SCALE, answers, forest, normal, row_of_chains, spans
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

from tw_jax import sharding
from tw_jax.attention import pallas_tpu
from tw_jax.contracts import Span

BLOCK = 128
interpreted = functools.partial(
    pallas_tpu.attend, query_block=BLOCK, key_block=BLOCK, interpret=pltpu.InterpretParams()
)


def decoded(plan):
    """[(query block, key block, first, last, cut)] of a list."""
    pairs, count = plan
    return [
        (p >> 17, p >> 4 & (2**13 - 1), bool(p & 1), bool(p & 2), bool(p & 4))
        for p in np.asarray(pairs)[: int(count)].tolist()
    ]


def test_the_list_has_each_pair_that_someone_sees_once_and_in_both_orders():
    rows, tokens = 2, 1024
    rng = np.random.default_rng(0)
    visible = np.stack([oracles.visible_by_parents(forest(rng, tokens, 5)) for _ in range(rows)])
    keys = jax.tree.map(lambda *x: jnp.stack(x), *map(spans, visible))
    by_query, by_key = pallas_tpu._plan(keys.enter, keys, BLOCK, BLOCK)
    count = tokens // BLOCK
    seen = visible.reshape(rows, count, BLOCK, count, BLOCK).transpose(0, 1, 3, 2, 4)
    some, all_ = seen.any((3, 4)), seen.all((3, 4))
    queries = decoded(by_query)
    assert len({pair[:2] for pair in queries}) == len(queries)
    assert queries == sorted(queries)
    assert sorted(pair[:2] for pair in decoded(by_key)) == [pair[:2] for pair in queries]
    assert [pair[1::-1] for pair in decoded(by_key)] == sorted(
        pair[1::-1] for pair in decoded(by_key)
    )
    listed = {(i // count, i % count, j % count): cut for i, j, _, _, cut in queries}
    assert all(i // count == j // count for i, j, *_ in queries)
    assert set(map(tuple, np.argwhere(some))) <= set(listed)
    assert {where for where, cut in listed.items() if not cut} == set(map(tuple, np.argwhere(all_)))
    for order, major in ((queries, 0), (decoded(by_key), 1)):
        for before, pair, after in zip([None, *order], order, [*order[1:], None], strict=False):
            assert pair[2] == (before is None or before[major] != pair[major])
            assert pair[3] == (after is None or after[major] != pair[major])


def test_blocks_that_no_query_needs_are_never_read():
    rng = np.random.default_rng(0)
    keys = row_of_chains([2 * BLOCK, 200])
    at = keys.enter[:, 2 * BLOCK :]
    q, d_out = (normal(rng, jnp.float32, 1, 2, 200, 8) for _ in range(2))
    k, v = (normal(rng, jnp.float32, 1, 1, 2 * BLOCK + 200, 8) for _ in range(2))
    want = answers(interpreted, q, k, v, d_out, at, keys)
    poison = (x.at[:, :, BLOCK : 2 * BLOCK].set(jnp.nan) for x in (k, v))
    got = answers(interpreted, q, *poison, d_out, at, keys)
    for poisoned, clean in zip(got, want, strict=True):
        np.testing.assert_array_equal(poisoned, clean)


def test_one_program_serves_rows_with_other_tries():
    traces = []

    @jax.jit
    def run(q, k, v, keys):
        traces.append(1)
        return interpreted(q, k, v, at=keys.enter, keys=keys, scale=SCALE)

    rng = np.random.default_rng(0)
    q, k = (normal(rng, jnp.float32, 1, heads, 512, 8) for heads in (2, 1))
    for lengths in ([512], [100, 412], [128] * 4):
        run(q, k, k, row_of_chains(lengths))
    assert len(traces) == 1


def test_devices_that_are_no_tpus_are_refused():
    keys = row_of_chains([128])
    q = jnp.ones((1, 1, 128, 8))
    with pytest.raises(NotImplementedError, match="the devices are cpu"):
        pallas_tpu.attend(q, q, q, at=keys.enter, keys=keys, scale=SCALE)


def test_more_pairs_than_scalar_memory_holds_are_refused():
    tokens = 8192
    keys = row_of_chains([tokens], rows=64)
    q = jax.ShapeDtypeStruct((64, 1, tokens, 8), jnp.float32)
    with pytest.raises(NotImplementedError, match="64 rows of 64 x 64 pairs"):
        jax.eval_shape(lambda q: interpreted(q, q, q, at=keys.enter, keys=keys, scale=SCALE), q)


@pytest.mark.aot
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("heads", "groups", "width", "dtype"),
    [(32, 8, 128, jnp.bfloat16), (8, 8, 64, jnp.bfloat16), (4, 2, 128, jnp.float32)],
    ids=["qwen3_8b", "no groups", "float32"],
)
def test_it_compiles_for_rows_of_40960(topology, heads, groups, width, dtype, monkeypatch):
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5p-8")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = sharding.make_mesh(sharding.Mesh(), devices[:1])
    tokens = 40_960

    def pull(q, k, v, enter, exit, d_out):
        keys = Span(enter, exit)
        attend = functools.partial(pallas_tpu.attend, at=enter, keys=keys, scale=SCALE)
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_out)

    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    q, k = (
        jax.ShapeDtypeStruct((1, n, tokens, width), dtype, sharding=where) for n in (heads, groups)
    )
    numbers = jax.ShapeDtypeStruct((1, tokens), jnp.int32, sharding=where)
    with sharding.use(mesh, sharding.Rules()):
        compiled = jax.jit(pull).lower(q, k, k, numbers, numbers, q).compile()
    # Inputs, outputs and their transposes, in tiles of 128 lanes; all pairs would be 30 times more.
    one = heads * tokens * 128 * jnp.dtype(dtype).itemsize
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * one
