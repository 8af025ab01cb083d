"""Sampler and trainer have one distribution, and the guard between them says what is wrong."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from fakes import path_network
from train import stub
from trajectories import rollouts, with_logp

from tw_jax.forkjoin.tries import group_tries
from tw_jax.train.groups import Aggregation, Scored, pack_groups
from tw_jax.train.pgrpo import PolicyLoss, loss_sums, refuse_mismatch
from tw_jax.trie.pack import Packing, PackingStats


def sampled_by(params, group):
    """The group with the log-probs that the oracle's model has of what its calls drew."""
    made = []
    for trajectory in group:
        logps = []
        for call in trajectory.calls:
            ids = np.concatenate([call.context, call.sampled])
            places = range(len(call.context), len(ids))
            logps.append([stub.logp_after(params, ids[:i])[ids[i]] for i in places])
        made.append(with_logp(trajectory, [np.array(logp) for logp in logps]))
    return Scored(group_tries(made)[0], np.ones(len(group), np.float32))


@pytest.mark.parametrize(
    ("kl", "near", "advice"),
    [
        (float("nan"), 0.0, "the parameters have diverged"),
        (0.02, 0.99, "a few to which the sampler gave a low probability"),
        (0.057, 0.1, "Most tokens disagree"),
    ],
)
def test_the_mismatch_guard_gives_the_advice_of_its_case(kl, near, advice):
    numbers = {"mismatch_kl": kl, "ratio_min": 0.5, "ratio_max": 1.5, "mismatch_within_5": near}
    with pytest.raises(ValueError, match=advice):
        refuse_mismatch(0.01, 7, numbers)
    refuse_mismatch(0.01, 7, numbers | {"mismatch_kl": 0.01})


def test_rows_that_no_token_has_have_no_part_in_log_probs_kl_and_entropy(tolerance):
    """A table of 64 rows for 40 ids, against a softmax over 40 columns in numpy."""
    wide = path_network(64, stub.WIDTH, num_ids=40)
    params = wide.init(jax.random.key(4))
    columns = {**params, "out": params["out"][:, :40]}
    batch = pack_groups(
        [[sampled_by(columns, rollouts(seed, 2, longest=5, blocks=1)) for seed in range(2)]],
        Aggregation(),
        packing=Packing(row_tokens=384),
        microbatch_rows=2,
        stats=PackingStats(),
    )
    reference = jax.tree.map(lambda leaf: leaf * 1.1, columns)
    ref_logp, kls, entropies = np.zeros(batch.advantage.shape, np.float32), [], []
    for b, node in np.argwhere(batch.trie.weight > 0):
        token = batch.trie.tokens[b, node]
        said = stub.logp_of_node(columns, batch.trie, b, node, 1.0)
        ref_logp[b, node] = stub.logp_of_node(reference, batch.trie, b, node, 1.0)[token]
        gap = ref_logp[b, node] - said[token]
        kls.append(np.exp(gap) - gap - 1)
        entropies.append(-(np.exp(said) * said).sum())
    cfg = PolicyLoss(kl_coef=0.5, entropy_coef=0.25)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        given = batch.replace(ref_logp=ref_logp)
        return loss_sums(wide, params, given, cfg, chunk_tokens=64, temperature=1.0)

    (_, sums), gradient = loss(params)
    told = {name: float(value) / float(sums["tokens"]) for name, value in sums.items()}
    assert told["mismatch_mean"] < tolerance["model"]
    assert told["reference_kl"] == pytest.approx(np.mean(kls), rel=tolerance["model"])
    assert told["entropy"] == pytest.approx(np.mean(entropies), rel=tolerance["model"])
    assert np.abs(gradient["out"][:, :40]).max() > 0
    assert not gradient["out"][:, 40:].any()
