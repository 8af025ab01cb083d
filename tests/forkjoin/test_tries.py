"""Groups of rollouts: every sampled token once, under its own call, and only the prompt shared."""

import dataclasses

import hypothesis
import hypothesis.strategies as st
import numpy as np
import oracles
import pytest
from trajectories import PROMPT_TOKENS, rollouts

from tw_jax.forkjoin import tries


def path(trie, node: int) -> list[int]:
    tokens = []
    while node >= 0:
        tokens.append(int(trie.tokens[node]))
        node = trie.parent[node]
    return tokens[::-1]


@pytest.mark.parametrize("max_tokens", [None, 150])
def test_every_sampled_token_is_one_node_with_its_context_call_and_log_prob(max_tokens):
    made = rollouts(seed=1, count=4)
    parts = tries.group_tries(made, max_tokens=max_tokens)
    assert (len(parts) == 1) == (max_tokens is None)
    found = [
        (
            int(part.rollout[node]),
            int(part.call[node]),
            path(part.trie, node),
            float(part.logp[node]),
        )
        for part in parts
        for node in np.flatnonzero(part.trie.weight)
    ]
    want = [
        (k, n, [*call.context.tolist(), *call.sampled[: i + 1].tolist()], float(call.logp[i]))
        for k, trajectory in enumerate(made)
        for n, call in enumerate(trajectory.calls)
        for i in range(len(call.sampled))
    ]
    assert sorted(found) == sorted(want)
    for part in parts:
        assert set(part.trie.weight.tolist()) == {0, 1}
        np.testing.assert_array_equal(part.call >= 0, part.trie.weight > 0)
        assert (part.logp[part.call < 0] == 0).all()


@hypothesis.given(st.integers(0, 200))
@hypothesis.settings(max_examples=10)
def test_rollouts_see_their_prompt_and_themselves_and_no_other(seed):
    (group,) = tries.group_tries(rollouts(seed, count=3))
    sees = oracles.visible_by_parents(group.trie.parent)
    assert (group.rollout[:PROMPT_TOKENS] == -1).all()
    assert sees[PROMPT_TOKENS:, :PROMPT_TOKENS].all()
    other = group.rollout[:, None] != group.rollout[None, :]
    assert not (sees & other & (group.rollout[None, :] >= 0)).any()
    tags = group.rollout[PROMPT_TOKENS:]
    assert tags.tolist() == sorted(tags.tolist())


def test_two_rollouts_that_drew_the_same_share_the_prompt_alone():
    one = rollouts(seed=2, count=1)[0]
    alone = tries.trajectory_trie(one)
    (group,) = tries.group_tries([one, one])
    assert len(group.trie) == 2 * len(alone) - one.prompt_tokens
    assert group.trie.source_tokens == 2 * alone.source_tokens
    drawn = [int((group.rollout[group.call >= 0] == k).sum()) for k in (0, 1)]
    assert drawn == [int(alone.weight.sum())] * 2


def test_parts_hold_whole_rollouts_in_order_and_no_more_than_fits():
    made = rollouts(seed=3, count=6)
    sizes = [len(tries.trajectory_trie(trajectory)) - PROMPT_TOKENS for trajectory in made]
    limit = PROMPT_TOKENS + max(sizes) + min(sizes)
    parts = tries.group_tries(made, max_tokens=limit)
    held = [sorted(set(part.rollout.tolist()) - {-1}) for part in parts]
    assert [k for part in held for k in part] == list(range(6))
    assert max(len(part) for part in held) > 1
    for part, numbers in zip(parts, held, strict=True):
        assert len(part.trie) == PROMPT_TOKENS + sum(sizes[k] for k in numbers) <= limit
    for part, following in zip(parts, held[1:], strict=False):
        assert len(part.trie) + sizes[following[0]] > limit


def test_a_group_is_cut_where_it_is_one_token_too_long():
    made = rollouts(seed=3, count=2)
    size = len(tries.group_tries(made)[0].trie)
    assert [len(tries.group_tries(made, max_tokens=n)) for n in (size, size - 1)] == [1, 2]


def test_a_rollout_longer_than_a_row_is_left_out_and_the_others_keep_their_numbers():
    made = rollouts(seed=3, count=4)
    sizes = [len(tries.trajectory_trie(t)) for t in made]
    longest = int(np.argmax(sizes))
    parts = tries.group_tries(made, max_tokens=max(sizes) - 1)
    held = {k for part in parts for k in part.rollout.tolist()} - {-1}
    assert held == {k for k, size in enumerate(sizes) if size < max(sizes)}
    assert longest not in held
    assert tries.group_tries(made, max_tokens=min(sizes) - 1) == []


@pytest.mark.parametrize("logp", [None, np.zeros(1, np.float32), "nan"])
def test_calls_without_log_probs_are_refused(logp):
    trajectory = next(t for t in rollouts(seed=4, count=4) if t.rounds)
    call = trajectory.calls[1]
    logp = np.full(len(call.sampled), np.nan, np.float32) if isinstance(logp, str) else logp
    calls = (trajectory.calls[0], dataclasses.replace(call, logp=logp), *trajectory.calls[2:])
    with pytest.raises(ValueError, match=r"Call \(0, '1'\) of rollout 0 lacks log-probs"):
        tries.group_tries([dataclasses.replace(trajectory, calls=calls)])


def test_a_token_that_two_calls_drew_in_one_context_is_refused():
    trajectory = rollouts(seed=4, count=1)[0]
    again = dataclasses.replace(trajectory, calls=(trajectory.calls[0], *trajectory.calls))
    with pytest.raises(ValueError, match="Two calls of rollout 0 drew the same token"):
        tries.group_tries([again])


def test_rollouts_of_other_prompts_are_refused():
    with pytest.raises(ValueError, match="All tries of a group must have one prompt"):
        tries.group_tries([*rollouts(seed=5, count=1), *rollouts(seed=6, count=1)])
