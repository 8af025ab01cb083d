"""The benchmark of the step trains the same tokens both ways."""

import functools

import jax
import numpy as np
import pytest

from tw_jax.benchmarks import step
from tw_jax.data import workloads
from tw_jax.forkjoin import tries
from tw_jax.train.sft import nll_sums
from tw_jax.trie.batch import stack_rows
from tw_jax.trie.tree import build


def test_the_timed_step_has_nodes_enough_for_the_dense_comparison():
    made = workloads.trajectory(workloads.STEP.shape, workloads.STEP.seed)
    assert len(tries.trajectory_trie(made)) >= workloads.STEP.dense_nodes


def test_step_trains_the_same_tokens_both_ways(quick_network, run, close):
    _, found = run("step")
    close.error("equality_loss", found["loss_rel_diff"])
    close.error("equality_gradient", found["grad_rel_l2"])
    case = workloads.TINY_STEP
    made = workloads.trajectory(case.shape, case.seed)
    call_tokens = sum(len(call.context) + len(call.sampled) for call in made.calls)
    assert found["row_tokens"] == call_tokens
    assert found["token_ratio"] == pytest.approx(call_tokens / found["nodes"])
    assert found["rho"] == pytest.approx(1 - found["nodes"] / call_tokens)
    ms = {name: times["median_ms"] for name, times in found["times"].items()}
    assert found["time_ratio"] == pytest.approx(ms["rows"] / ms["trie"])
    assert found["blockwise_over_dense"] == pytest.approx(ms["dense"] / ms["blockwise"])
    remat = ms["dense_remat"] / ms["blockwise_remat"]
    assert found["blockwise_over_dense_remat"] == pytest.approx(remat)
    assert found["token_ratio_full"] > 1
    assert found["dense_nodes"] == case.dense_nodes


def test_the_ideals_are_tokens_and_pairs_of_blocks():
    chain = build([np.arange(512, dtype=np.int32)], [None])
    batches = {
        "trie": stack_rows([[chain]], 512),
        "rows": stack_rows([[chain, chain]], 1024),
    }
    # Blocks of 256: one chain is two of them and needs three pairs of four, two chains six of 16.
    assert step.sharing(batches, workloads.MINUTE) == {
        "rho": 1 / 2,
        "token_ratio": 2,
        "block_ratio": 2,
        "block_occupancy_trie": 3 / 4,
        "block_occupancy_rows": 6 / 16,
    }


def test_a_loss_whose_terms_cancel_is_judged_by_their_sizes():
    batches = {"trie": np.float32([1, 2, -3 + 1e-6]), "rows": np.float32([1, 2, -3 + 2e-6])}
    loss, _ = step.difference(lambda p, x: ((p * x).sum(), {}), np.float32(1), batches, size=6.0)
    assert 1e-8 < loss < 5e-7


def test_a_gradient_of_other_weights_is_seen_as_different(quick_network):
    case = workloads.TINY_STEP
    made = workloads.trajectory(case.shape, case.seed)
    trie = tries.trajectory_trie(made)
    batch = stack_rows([[trie]], len(trie))
    other = batch.replace(weight=batch.weight * (np.arange(len(trie)) % 2))
    net = step.network(case.model, num_ids=workloads.table().num_ids)
    params = net.init(jax.random.key(0))
    objective = functools.partial(nll_sums, net, chunk_tokens=64)
    loss, gradient = step.difference(objective, params, {"trie": batch, "rows": other})
    assert loss > 0.1
    assert gradient > 0.1
