"""Advantages and token weights by hand; rows hold the same tokens however they are packed."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from trajectories import PROMPT_TOKENS, rollouts

from tw_jax.forkjoin.calls import Call, Provenance, StopReason, Trajectory
from tw_jax.forkjoin.tries import group_tries
from tw_jax.train.groups import (
    Aggregation,
    Scored,
    advantages,
    has_signal,
    pack_groups,
    token_weights,
)
from tw_jax.train.loss import split_rows
from tw_jax.trie.pack import Packing, PackingStats

# Advantages.


def test_advantages_are_centred_and_not_scaled(close):
    got = advantages(np.array([[1.1, 1.0, -1.0, -1.0], [1.1, 1.0, 1.0, 1.0]]))
    want = [[1.075, 0.975, -1.025, -1.025], [0.075, -0.025, -0.025, -0.025]]
    close("rounding", got, want, of=1.1)  # the rewards
    assert got.dtype == np.float32


def test_the_ablation_divides_by_the_unbiased_deviation(close):
    got = advantages(np.array([[1.0, 3.0], [1.0, 1.0]]), "std")
    unit = 1 / (np.sqrt(2) + 1e-6)
    close("rounding", got, [[-unit, unit], [0, 0]])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_advantage_of_what_is_no_number_is_refused(bad):
    with pytest.raises(ValueError, match=f"reward of rollout 1 of group 1 is {bad}"):
        advantages(np.array([[0.0, 1.0], [0.0, bad]]))


def test_one_rollout_has_nothing_to_be_compared_with():
    with pytest.raises(ValueError, match="K = 1 rollouts for each prompt must be at least 2"):
        advantages(np.ones((3, 1)))


def test_a_group_has_signal_where_its_rewards_vary_and_not_where_its_mean_is_inside():
    reward = np.array([[1.1, 1.1, 1.1], [1.1, 1.0, 1.05], [-1, -1, -1], [1, -1, -1]])
    assert has_signal(reward).tolist() == [False, True, False, True]
    # The computed variance of three times 0.1 is above 0.
    assert np.full((1, 3), 0.1).std() > 0
    assert not has_signal(np.full((1, 3), 0.1)).any()


# Token weights.


def sequential(*sizes: int, first: int = 5) -> Trajectory:
    """A rollout after the prompt [1, 2]: parent calls of these sizes, a forced token in between."""
    path, calls = [1, 2], []
    for size in sizes:
        context = np.array(path, np.int32)
        sampled = np.arange(first, first + size, dtype=np.int32)
        logp = -np.ones(size, np.float32)
        calls.append(
            Call((), context, np.zeros(len(path), np.int8), sampled, logp, StopReason.STOP)
        )
        path += [*sampled.tolist(), 3]
    ids = np.array(path, np.int32)
    marks = np.full(len(ids), Provenance.SAMPLED, np.int8)
    return Trajectory(2, tuple(calls), ids, marks, 0, "eos", {})


@pytest.fixture(scope="module")
def two_groups():
    """Group 0: rollouts of 3, and of 2 + 1 tokens. Group 1: rollouts of 4, and of none."""
    groups = [
        group_tries([sequential(3), sequential(2, 1)])[0],
        group_tries([sequential(4), sequential()])[0],
    ]
    return [Scored(group, np.array([1.0, -1.0], np.float32)) for group in groups]


def by_call(scored, weights):
    """{(group, rollout, call): its weights}."""
    found = {}
    for g, (one, weight) in enumerate(zip(scored, weights, strict=True)):
        assert weight.dtype == np.float32
        assert (weight[one.group.call < 0] == 0).all()
        for node in np.flatnonzero(one.group.call >= 0):
            key = (g, int(one.group.rollout[node]), int(one.group.call[node]))
            found.setdefault(key, []).append(float(weight[node]))
    return found


@pytest.mark.parametrize(
    ("cfg", "want"),
    [
        (Aggregation(), [1 / 10] * 4),
        (Aggregation(mean="sequence_mean"), [1 / 9, 1 / 9, 1 / 9, 1 / 12]),
        (Aggregation(mean="sequence_sum"), [1 / 3] * 4),
        (Aggregation(mean="sequence_sum", norm_tokens=50), [1 / 150] * 4),
        # Calls of 5, 4, 6 and 6 tokens with their contexts, 21 in all: two micro-batches. The last
        # and the first make 11, with 4 + 3 drawn; the others 10, with 1 + 2 drawn.
        (Aggregation(mean="micro_batch", micro_batch_tokens=12), [1 / 14, 1 / 6, 1 / 6, 1 / 14]),
        (Aggregation(mean="micro_batch", micro_batch_tokens=21), [1 / 10] * 4),
    ],
)
def test_tokens_weigh_what_the_mean_says(two_groups, cfg, want, close):
    found = by_call(two_groups, token_weights(two_groups, cfg))
    calls = {(0, 0, 0): 3, (0, 1, 0): 2, (0, 1, 1): 1, (1, 0, 0): 4}
    assert {call: len(weights) for call, weights in found.items()} == calls
    for call, weight in zip(calls, want, strict=True):
        close("rounding", found[call], weight)


@pytest.mark.parametrize("padding", [0, 3])
def test_item_32_weights_differ_from_the_releases_by_the_factors_of_the_page(
    two_groups, padding, tolerance
):
    """The release averages over rows, which are calls and padding, and weighs micro-batches."""
    calls = {(0, 0, 0): 3, (0, 1, 0): 2, (0, 1, 1): 1, (1, 0, 0): 4}
    micro_batches = [[(0, 0, 0), (1, 0, 0)], [(0, 1, 0), (0, 1, 1)]]  # of 12 tokens at most
    rows, longest = len(calls) + padding, 50
    of_rollout = {key[:2]: sum(n for k, n in calls.items() if k[:2] == key[:2]) for key in calls}

    def ours(mean, **sizes):
        found = by_call(two_groups, token_weights(two_groups, Aggregation(mean=mean, **sizes)))
        return {key: weights[0] for key, weights in found.items()}

    micro_batch = ours("micro_batch", micro_batch_tokens=12)
    sequence_mean = ours("sequence_mean")
    sequence_sum = ours("sequence_sum", norm_tokens=longest)
    for batch in micro_batches:
        share, tokens = len(batch) / rows, sum(calls[key] for key in batch)
        for key in batch:
            # Means over the rows of a micro-batch, times its share of all rows.
            theirs = {
                "token-mean": share / tokens,
                "seq-mean-token-mean": share * 1 / len(batch) / calls[key],
                "seq-mean-token-sum": share * 1 / len(batch),
                "seq-mean-token-sum-norm": share / longest,
            }
            factors = {
                "token-mean": (micro_batch, 4 / rows),
                "seq-mean-token-mean": (sequence_mean, 3 * of_rollout[key[:2]] / rows / calls[key]),
                "seq-mean-token-sum": (sequence_sum, 3 * longest / rows),
                "seq-mean-token-sum-norm": (
                    sequence_sum,
                    3 * len(batch) * longest / rows / longest,
                ),
            }
            for name, (weights, factor) in factors.items():
                assert theirs[name] == pytest.approx(
                    factor * weights[key], rel=tolerance["rounding"]
                ), name


@pytest.mark.parametrize(
    ("mean", "want"),
    [("token", 1 / 7), ("sequence_mean", [1 / 6, 1 / 8]), ("micro_batch", 1 / 7)],
)
def test_a_rollout_left_out_is_in_no_denominator(two_groups, mean, want, close):
    scored = [two_groups[0]._replace(is_trained=np.array([True, False])), two_groups[1]]
    found = by_call(scored, token_weights(scored, Aggregation(mean=mean)))
    assert found.pop((0, 1, 0)) == [0, 0]
    assert found.pop((0, 1, 1)) == [0]
    one, other = want if isinstance(want, list) else (want, want)
    close("rounding", found[0, 0, 0], one)
    close("rounding", found[1, 0, 0], other)


@pytest.mark.parametrize("mean", ["token", "sequence_mean", "sequence_sum", "micro_batch"])
def test_weights_do_not_depend_on_how_groups_are_cut(mean, close):
    """Rollouts of one prompt in one trie, or in several that each repeat the prompt."""
    made = rollouts(seed=3, count=5)

    def weights(max_tokens):
        parts = group_tries(made, max_tokens=max_tokens)
        scored = [Scored(part, np.ones(5, np.float32)) for part in parts]
        cfg = Aggregation(mean=mean, micro_batch_tokens=200)
        return len(parts), np.concatenate(
            [
                weight[part.rollout >= 0]
                for part, weight in zip(parts, token_weights(scored, cfg), strict=True)
            ]
        )

    count, whole = weights(None)
    more, cut = weights(200)
    assert (count, more > 1) == (1, True)
    close("rounding", cut, whole, of=whole)


@pytest.mark.parametrize("mean", ["token", "sequence_mean", "sequence_sum", "micro_batch"])
def test_nothing_to_train_weighs_nothing(mean, two_groups):
    cfg = Aggregation(mean=mean)
    assert token_weights([], cfg) == []
    none = [one._replace(is_trained=np.zeros(2, bool)) for one in two_groups]
    with np.errstate(all="raise"):
        assert all((weight == 0).all() for weight in token_weights(none, cfg))


def test_a_call_longer_than_a_micro_batch_is_refused(two_groups):
    cfg = Aggregation(mean="micro_batch", micro_batch_tokens=5)
    with pytest.raises(ValueError, match="micro_batch_tokens = 5 must be at least 6"):
        token_weights(two_groups, cfg)


@pytest.mark.parametrize("name", ["norm_tokens", "micro_batch_tokens"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=rf"Aggregation.{name} = 0 must be at least 1"):
        Aggregation(**{name: 0})


# Rows.


def scored_groups(prompts=4, count=3, max_tokens=None):
    made = []
    for p in range(prompts):
        advantage = np.arange(count, dtype=np.float32) + 10 * p - 1
        made += [
            Scored(part, advantage)
            for part in group_tries(rollouts(seed=p, count=count), max_tokens=max_tokens)
        ]
    return made


def contents(batch):
    """Each trained node as its path of tokens and its numbers, whatever row it stands in."""
    found = []
    for b, node in np.argwhere(batch.trie.weight > 0):
        path, at = [], node
        while True:
            path.append(int(batch.trie.tokens[b, at]))
            if batch.trie.parent[b, at] == at:
                break
            at = batch.trie.parent[b, at]
        numbers = (batch.trie.weight, batch.advantage, batch.sampler_logp)
        found.append((path[::-1], *(float(array[b, node]) for array in numbers)))
    return sorted(found)


def test_rows_hold_the_same_tokens_however_they_are_packed():
    cfg = Aggregation(mean="sequence_mean")
    scored = scored_groups()
    longest = max(len(one.group.trie) for one in scored)
    tight = pack_groups(
        [scored], cfg, packing=Packing(row_tokens=longest), microbatch_rows=1, stats=PackingStats()
    )
    loose = pack_groups(
        [scored[::-1]],
        cfg,
        packing=Packing(row_tokens=3 * longest),
        microbatch_rows=3,
        stats=PackingStats(),
    )
    cut = pack_groups(
        [scored_groups(max_tokens=200)], cfg, packing=Packing(row_tokens=longest),
        microbatch_rows=1, stats=PackingStats(),
    )  # fmt: skip
    assert len(tight.advantage) != len(loose.advantage)
    assert contents(tight) == contents(loose) == contents(cut)
    want = sum(len(c.sampled) for p in range(4) for t in rollouts(p, 3) for c in t.calls)
    assert len(contents(tight)) == want


def test_rollouts_of_a_row_are_counted_from_zero_and_none_is_in_two_rows():
    scored = scored_groups(max_tokens=200)
    packing = Packing(row_tokens=400)
    batch = pack_groups(
        [scored], Aggregation(), packing=packing, microbatch_rows=1, stats=PackingStats()
    )
    owners = {}
    for b, row in enumerate(batch.rollout):
        trained = batch.trie.weight[b] > 0
        assert 0 <= row.min() <= row.max() < packing.row_tokens
        for number in np.unique(row[trained]):
            # Advantages tell the twelve rollouts apart.
            (advantage,) = np.unique(batch.advantage[b][trained & (row == number)])
            assert owners.setdefault(float(advantage), (b, number)) == (b, number)
    assert len(owners) == len(set(owners.values())) == 12


def test_a_batch_has_a_power_of_two_of_parts_and_fills_the_first_ones():
    scored, stats = scored_groups(), PackingStats()
    packing = Packing(row_tokens=max(len(one.group.trie) for one in scored))
    batch = pack_groups(
        [scored[:3]], Aggregation(), packing=packing, microbatch_rows=1, stats=stats
    )
    assert stats.rows == 3
    assert stats.used_tokens == sum(len(one.group.trie) for one in scored[:3])
    assert batch.trie.weight.any(axis=1).tolist() == [True, True, True, False]
    batch = pack_groups(
        [scored], Aggregation(), packing=packing, microbatch_rows=3, stats=PackingStats()
    )
    parts = split_rows(batch, 2).trie.weight.any(axis=2)
    assert parts.tolist() == [[True, True, True], [True, False, False]]
    empty = pack_groups(
        [[]], Aggregation(), packing=packing, microbatch_rows=3, stats=PackingStats()
    )
    assert empty.advantage.shape == (3, packing.row_tokens)
    assert not empty.trie.weight.any()


def test_each_inner_step_is_the_batch_of_its_groups_alone():
    scored, cfg = scored_groups(), Aggregation()
    packing = Packing(row_tokens=max(len(one.group.trie) for one in scored))
    both = pack_groups(
        [scored[:3], scored[3:]], cfg, packing=packing, microbatch_rows=1, stats=PackingStats()
    )
    for number, groups in enumerate([scored[:3], scored[3:]]):
        alone = pack_groups([groups], cfg, packing=packing, microbatch_rows=1, stats=PackingStats())
        here = jax.tree.map(lambda x, n=number: x[n], split_rows(both, 2))
        assert contents(here) == contents(alone)


def test_a_group_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="and a row has 20"):
        pack_groups(
            [scored_groups()],
            Aggregation(),
            packing=Packing(row_tokens=20),
            microbatch_rows=1,
            stats=PackingStats(),
        )


def test_b2_advantages_stay_centred_over_rollouts_however_many_rows_are_padding(close):
    reward = np.array([[1.1, -1.0, -1.0], [1.0, 1.05, -1.0]])
    want = advantages(reward)
    groups = [group_tries(rollouts(seed=p, count=3))[0] for p in range(2)]
    scored = [Scored(group, row) for group, row in zip(groups, want, strict=True)]
    longest = max(len(group.trie) for group in groups)
    for rows in (1, 7):
        packing = Packing(row_tokens=longest)
        batch = pack_groups(
            [scored], Aggregation(), packing=packing, microbatch_rows=rows, stats=PackingStats()
        )
        assert len(batch.advantage) == max(2, rows)
        trained = np.argwhere(batch.trie.weight > 0)
        found = {
            (int(b), int(batch.rollout[b, node])): float(batch.advantage[b, node])
            for b, node in trained
        }
        assert sorted(found.values()) == sorted(want.ravel().tolist())
        close("rounding", sum(found.values()), 0.0, of=sum(map(abs, found.values())))


def test_prompts_and_padding_carry_no_advantage():
    batch = pack_groups(
        [scored_groups()],
        Aggregation(),
        packing=Packing(row_tokens=900),
        microbatch_rows=1,
        stats=PackingStats(),
    )
    assert (batch.trie.weight[:, :PROMPT_TOKENS] == 0).all()
    assert (batch.advantage[batch.trie.weight == 0] == 0).all()
    assert batch.old_logp is None
    assert batch.ref_logp is None
