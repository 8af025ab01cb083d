"""The benchmark of attention times one program on a row of tries and on one causal sequence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from tw_jax.attention import reference
from tw_jax.benchmarks import attention
from tw_jax.contracts import Span
from tw_jax.data import workloads
from tw_jax.forkjoin import tries

CASE = workloads.TINY_ATTENTION
PACKED = CASE.rows[0]
TOKENS = PACKED.tokens


def built(shape, seeds):
    return [tries.trajectory_trie(workloads.trajectory(shape, seed)) for seed in seeds]


@pytest.fixture(scope="module")
def sees():
    """[T, T] bool by way of the query and of the key: who sees whom, found by walking parents."""
    row, at = np.eye(TOKENS, dtype=bool), 0
    for trie in built(PACKED.shape, PACKED.seeds):
        here = slice(at, at + len(trie))
        row[here, here] = oracles.visible_by_parents(trie.parent)
        at += len(trie)
    return {"trie": row, "causal": np.tri(TOKENS, dtype=bool)}


def test_the_two_ways_are_the_row_of_tries_and_one_causal_sequence(sees):
    index = np.arange(TOKENS)
    ways = attention.spans(attention.row(PACKED)[0])
    assert list(ways) == list(sees)
    for way, keys in ways.items():
        at = index[:, None]
        seen = (np.asarray(keys.enter) <= at) & (at < np.asarray(keys.exit))
        np.testing.assert_array_equal(seen, sees[way])


def test_it_reports_what_the_mask_leaves_out_and_what_was_saved(run, sees):
    _, found = run("attention")
    made = built(PACKED.shape, PACKED.seeds)
    assert found[f"nodes_{TOKENS}"] == sum(map(len, made))
    calls = [
        len(call.context) + len(call.sampled)
        for seed in PACKED.seeds
        for call in workloads.trajectory(PACKED.shape, seed).calls
    ]
    assert found[f"rho_{TOKENS}"] == pytest.approx(1 - sum(map(len, made)) / sum(calls))

    size, blocks = 256, TOKENS // 256
    cut = {way: pairs.reshape(blocks, size, blocks, size) for way, pairs in sees.items()}
    least = {way: pairs.any(axis=(1, 3)).sum() for way, pairs in cut.items()}
    occupancy = {way: found[f"block_occupancy_{way}_{TOKENS}"] for way in sees}
    assert occupancy["causal"] == least["causal"] / blocks**2 == (blocks + 1) / (2 * blocks)
    # A pair of blocks may be walked in vain, never left out.
    assert least["trie"] <= occupancy["trie"] * blocks**2 < least["causal"]
    assert found[f"ideal_{TOKENS}"] == pytest.approx(occupancy["causal"] / occupancy["trie"])

    ms = {way: found["times"][f"blockwise_{way}_{TOKENS}"]["median_ms"] for way in sees}
    skip = ms["causal"] / ms["trie"]
    assert found[f"skip_{TOKENS}"] == pytest.approx(skip)
    over = found[f"skip_over_ideal_{TOKENS}"]
    assert over == pytest.approx(skip / found[f"ideal_{TOKENS}"])
    assert found["bars"][f"skip_over_ideal_{TOKENS}"] == {"least": 0.85, "met": over >= 0.85}
    assert found["bars"]["active_over_true_pairs_256"]["most"] == 1.08
    heads, width = CASE.model.num_heads, CASE.model.head_width
    for way, pairs in sees.items():
        # Six products of [T, H] arrays a head, 2 H operations for each pair.
        teraflops = 6 * 2 * width * heads * pairs.sum() / (ms[way] / 1e3) / 1e12
        assert found[f"tflops_{way}_{TOKENS}"] == pytest.approx(teraflops)
        assert found[f"share_of_peak_{way}_{TOKENS}"] is None, "no peak is known of a CPU"


def test_active_area_is_counted_over_true_pairs_at_full_size():
    # Each tiny trie is smaller than a block.
    made = built(CASE.full_shape, range(CASE.full_seeds))
    assert max(map(len, made)) <= 256
    pairs = sum(oracles.visible_by_parents(trie.parent).sum() for trie in made)
    assert attention._active_over_true(CASE) == pytest.approx(256**2 * len(made) / pairs)


def test_what_is_timed_is_attention_and_its_gradients(close):
    model = dataclasses.replace(CASE.model, num_heads=4, num_kv_heads=2, head_width=8)
    keys = attention.spans(attention.row(PACKED)[0])["trie"]
    q, k, v, d_out = arrays = attention._arrays(model, TOKENS)
    out, gradients = jax.jit(attention.passes, static_argnames="impl")(
        arrays, keys, impl="blockwise"
    )
    want, pull = jax.vjp(
        lambda q, k, v: reference.attend(q, k, v, at=keys.enter, keys=keys, scale=8**-0.5), q, k, v
    )
    close("module", out, want)
    close("module", gradients, pull(d_out))


def test_timed_rows_are_full_of_whole_tries():
    for packed in workloads.ATTENTION.rows:
        nodes = sum(map(len, built(packed.shape, packed.seeds)))
        assert 0.97 * packed.tokens < nodes <= packed.tokens


def test_the_last_block_of_a_row_counts_whole():
    # 600 tokens are three blocks, of 200 rounded up to a multiple of 32.
    index = jnp.arange(600, dtype=jnp.int32)[None]
    keys = Span(enter=index, exit=jnp.full_like(index, 600))
    assert attention.walked_pairs(keys, CASE.model) == (6 * 224**2, 6 / 9)
