"""Synthetic trajectories have the lengths that were asked for and are the protocol's own."""

import itertools

import numpy as np
import pytest

from tw_jax.data import workloads
from tw_jax.data.workloads import Shape
from tw_jax.forkjoin import tries
from tw_jax.forkjoin.calls import Provenance, StopReason
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.replay import replay
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver

SMALL = Shape().scaled(0.1)


def blocks(made):
    """The calls in runs: parent, threads, parent, threads, ..., parent."""
    runs = itertools.groupby(made.calls, key=lambda call: call.is_thread)
    return [(is_thread, list(calls)) for is_thread, calls in runs]


@pytest.mark.parametrize("seed", range(3))
def test_calls_have_the_lengths_of_their_shape(seed):
    made = workloads.trajectory(SMALL, seed)
    assert made.prompt_tokens == SMALL.prompt == 20
    assert (made.rounds, made.finish, made.counts) == (SMALL.blocks, "eos", {})
    runs = blocks(made)
    assert [is_thread for is_thread, _ in runs] == [False, True] * SMALL.blocks + [False]
    parents = [calls for is_thread, calls in runs if not is_thread]
    forks = [calls for is_thread, calls in runs if is_thread]
    assert all(len(calls) == 1 for calls in parents)
    for (parent,), threads in zip(parents[:-1], forks, strict=True):
        assert SMALL.threads[0] <= len(threads) <= SMALL.threads[1]
        text = len(parent.sampled) - 2 - len(threads) * SMALL.outline
        assert SMALL.sequential[0] <= text <= SMALL.sequential[1]
        assert [thread.path[1] for thread in threads] == [str(n + 1) for n in range(len(threads))]
        for thread in threads:
            assert SMALL.thread[0] <= len(thread.sampled) <= SMALL.thread[1]
            assert thread.stop_reason is StopReason.STOP
    assert parents[-1][0].stop_reason is StopReason.EOS


def test_the_joined_path_replays_to_the_same_calls():
    made = workloads.trajectory(SMALL, 0)
    again = replay(ThreadWeaver(workloads.table(), ForkJoin()), made.ids, made.prompt_tokens)
    for one, other in zip(made.calls, again.calls, strict=True):
        assert one.sampled.tolist() == other.sampled.tolist()
        assert one.context.tolist() == other.context.tolist()


def test_the_seed_decides():
    one, same, other = (workloads.trajectory(SMALL, seed) for seed in (4, 4, 5))
    assert one.ids.tolist() == same.ids.tolist()
    assert one.ids.tolist() != other.ids.tolist()


def test_rollouts_share_their_prompt_and_nothing_else():
    made = workloads.rollouts(SMALL, 4, count=3)
    assert made[0].ids.tolist() == workloads.trajectory(SMALL, 4).ids.tolist()
    assert len({one.ids[: SMALL.prompt].tobytes() for one in made}) == 1
    assert len({one.ids[SMALL.prompt :][:10].tobytes() for one in made}) == 3


def test_every_call_has_the_log_probs_that_p_grpo_needs():
    (group,) = tries.group_tries(workloads.rollouts(SMALL, 0, count=2))
    assert (group.logp[group.call >= 0] < 0).all()


def test_at_full_size_the_calls_have_about_seven_times_the_nodes():
    ratios, nodes = [], []
    for seed in range(8):
        trie = tries.trajectory_trie(workloads.trajectory(Shape(), seed))
        ratios.append(trie.source_tokens / len(trie))
        nodes.append(len(trie))
    assert 6.5 < np.mean(ratios) < 7.4
    assert 18_000 < np.mean(nodes) < 22_000


def test_only_sampled_tokens_are_trained_and_each_once():
    made = workloads.trajectory(SMALL, 1)
    trie = tries.trajectory_trie(made)
    assert trie.weight.sum() == sum(len(call.sampled) for call in made.calls)
    assert (made.provenance[: made.prompt_tokens] == Provenance.PROMPT).all()
