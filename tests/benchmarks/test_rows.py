"""The benchmark of rows trains the same tokens both ways, for as much."""

import functools

import fakes
import jax
import numpy as np
import pytest

from tw_jax.benchmarks import rows, step
from tw_jax.data import workloads
from tw_jax.train.pgrpo import PolicyLoss, loss_sums

CASE = workloads.TINY_ROWS


def test_rows_trains_the_same_tokens_both_ways(run, monkeypatch, close):
    monkeypatch.setattr(
        rows,
        "network",
        lambda model, num_ids: fakes.path_network(model.vocab_size, num_ids=num_ids),
    )
    _, found = run("rows")
    close.error("equality_loss", found["loss_rel_diff"])
    close.error("equality_gradient", found["grad_rel_l2"])
    made = workloads.rollouts(CASE.shape, CASE.seed, count=CASE.rollouts)
    call_tokens = sum(len(c.context) + len(c.sampled) for one in made for c in one.calls)
    assert found["rollouts"] == len(made) == CASE.rollouts
    assert found["row_tokens"] == call_tokens
    assert found["token_ratio"] == pytest.approx(call_tokens / found["nodes"])
    assert found["rho"] == pytest.approx(1 - found["nodes"] / call_tokens)
    ms = {name: times["median_ms"] for name, times in found["times"].items()}
    assert found["time_ratio"] == pytest.approx(ms["rows"] / ms["trie"])
    share = found["time_ratio"] / found["token_ratio"]
    assert found["time_ratio_over_token_ratio"] == pytest.approx(share)


def test_each_call_stands_alone_with_what_its_tokens_are_worth(close):
    made = workloads.rollouts(CASE.shape, CASE.seed, count=CASE.rollouts)
    calls = [(k, call) for k, one in enumerate(made) for call in one.calls]
    drawn = sum(len(call.sampled) for _, call in calls)
    reward = np.random.default_rng(CASE.seed).normal(size=CASE.rollouts)
    advantage = reward - reward.mean()
    assert advantage.min() < 0 < advantage.max()
    batch, at = rows.batches_of(CASE)["rows"], 0
    for rollout, call in calls:
        first, last = at + len(call.context), at + len(call.context) + len(call.sampled)
        whole = slice(at, last)
        ids = np.concatenate([call.context, call.sampled])
        assert batch.trie.tokens[0, whole].tolist() == ids.tolist()
        assert batch.trie.depth[0, whole].tolist() == list(range(len(ids)))
        assert (batch.trie.end[0, whole] == last).all()
        assert batch.trie.parent[0, at + 1 : last].tolist() == list(range(at, last - 1))
        assert not batch.trie.weight[0, at:first].any()
        close("rounding", batch.trie.weight[0, first:last], 1 / drawn)
        close("rounding", batch.advantage[0, first:last], advantage[rollout])
        np.testing.assert_array_equal(batch.sampler_logp[0, first:last], call.logp)
        assert (batch.rollout[0, first:last] == rollout).all()
        at = last
    assert at == batch.trie.tokens.size


@pytest.mark.parametrize("field", ["advantage", "sampler_logp"])
def test_tokens_that_are_worth_something_else_are_seen_as_different(field):
    batches = rows.batches_of(CASE)
    batches["rows"] = batches["rows"].replace(
        **{field: np.roll(getattr(batches["rows"], field), 1)}
    )
    net = fakes.path_network(CASE.model.vocab_size)
    objective = functools.partial(
        loss_sums, net, cfg=PolicyLoss(), chunk_tokens=64, temperature=1.0
    )
    loss, gradient = step.difference(objective, net.init(jax.random.key(0)), batches)
    assert loss > 1e-3
    assert gradient > 1e-2
