"""The policy loss by hand, token by token; the step against what must not change it."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import path_network
from repo.sources import ROOT
from train import stub
from trajectories import rollouts, with_logp

from tw_jax import sharding
from tw_jax.forkjoin.tries import group_tries
from tw_jax.train.groups import Aggregation, PolicyBatch, Scored, pack_groups
from tw_jax.train.pgrpo import (
    PolicyLoss,
    importance,
    loss_sums,
    make_logp,
    make_pgrpo_step,
    refuse_mismatch,
    surrogate,
)
from tw_jax.train.state import Optim, abstract_state, create, jit_step
from tw_jax.trie.pack import Packing, PackingStats

OPTIM = Optim(peak_lr=2e-2, warmup_steps=0, schedule="constant", weight_decay=0.0)
NETWORK = path_network(40, stub.WIDTH)  # the tokenizer's ids and some more, which a mesh divides
PARAMS = NETWORK.init(jax.random.key(0))
NO_CORRECTION = PolicyLoss(importance="none")


def fresh():
    return create(jax.tree.map(jnp.array, PARAMS), OPTIM, key=jax.random.key(1))


@functools.cache
def step_of(cfg=NO_CORRECTION, microbatch_rows=2, temperature=1.0, inner_steps=1):
    return jax.jit(
        make_pgrpo_step(
            NETWORK, OPTIM, cfg, steps=50, chunk_tokens=64, temperature=temperature,
            microbatch_rows=microbatch_rows, inner_steps=inner_steps,
        )
    )  # fmt: skip


@functools.cache
def logp_of(microbatch_rows=2, temperature=1.0):
    return jax.jit(
        make_logp(
            NETWORK, chunk_tokens=64, temperature=temperature, microbatch_rows=microbatch_rows
        )
    )


def scored(prompts=2, count=3, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Scored(group_tries(rollouts(seed=p, count=count, longest=5))[0], drawn.astype(np.float32))
        for p, drawn in enumerate(rng.normal(size=(prompts, count)))
    ]


def packed(groups, row_tokens=512, rows=2, mean="token"):
    packing = Packing(row_tokens=row_tokens)
    return pack_groups(
        [groups],
        Aggregation(mean=mean),
        packing=packing,
        microbatch_rows=rows,
        stats=PackingStats(),
    )


@pytest.fixture(scope="module")
def batch():
    """Two rows with a group each."""
    made = packed(scored(), row_tokens=384)
    assert made.advantage.shape[0] == 2
    return made


def sizes(metrics, batch):
    """What the rounding of each metric is a share of: the sum of its terms without their signs.

    Costs of good and bad tokens cancel, and the terms of a divergence do where ratios are near 1.
    """
    weight = batch.trie.weight
    found = {name: abs(float(value)) for name, value in metrics.items()}
    found |= {name: 1 + value for name, value in found.items() if name.endswith("_kl")}
    cost = np.sum(weight * np.abs(batch.advantage)) / weight.sum()
    return found | {"loss": cost, "policy_loss": cost}


def assert_same_metrics(close, row, got, want, batch, what=""):
    size = sizes(want, batch)
    assert set(got) == set(want)
    for name, value in want.items():
        close(row, got[name], value, of=size[name], what=f"{what} {name}")


# The loss of a token.


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope", "flag"),
    [
        (2.0, 1.0, -2.0, -2.0, None),
        (2.0, 1.27, -2.54, -2.54, None),
        (2.0, 1.5, -2.56, 0.0, "clipped_high"),
        (2.0, 0.5, -1.0, -1.0, None),
        (-2.0, 1.0, 2.0, 2.0, None),
        (-2.0, 0.81, 1.62, 1.62, None),
        (-2.0, 0.5, 1.6, 0.0, "clipped_low"),
        (-2.0, 1.5, 3.0, 3.0, None),
        (-2.0, 4.0, 6.0, 0.0, "clipped_dual"),
        (0.0, 4.0, 0.0, 0.0, None),
    ],
)
def test_a_token_costs_its_clipped_surrogate(advantage, ratio, loss, slope, flag, close):
    def cost(log_ratio):
        value, flags = surrogate(log_ratio, jnp.float32(advantage), PolicyLoss())
        return value, flags

    (value, flags), got = jax.value_and_grad(cost, has_aux=True)(jnp.log(jnp.float32(ratio)))
    close("rounding", value, loss)
    close("rounding", got, slope)
    assert {name for name, is_set in flags.items() if is_set} == ({flag} - {None})


def test_without_the_dual_clip_a_bad_token_may_cost_anything(close):
    cost, flags = surrogate(jnp.log(4.0), jnp.float32(-2.0), PolicyLoss(dual_clip=None))
    close("rounding", cost, 8.0)
    assert not flags["clipped_dual"]


@pytest.mark.parametrize("log_ratio", [-1e4, 1e4])
def test_absurd_ratios_stay_finite(log_ratio):
    def cost(x):
        return surrogate(x, jnp.float32(-1.0), PolicyLoss(dual_clip=None))[0]

    assert all(map(np.isfinite, jax.value_and_grad(cost)(jnp.float32(log_ratio))))


def test_importance_weights_are_truncated_by_token_or_by_rollout(close):
    gap = jnp.log(jnp.array([[3.0, 0.5, 1.0, 1.5, 1.2, 0.25, 1.0, 1.0]]))
    rollout = jnp.array([[0, 0, 1, 1, 1, 2, 2, 0]])
    weights, capped = importance(gap, rollout, PolicyLoss())
    want = [2, 0.5, 1, 1.5, 1.2, 0.25, 1, 1]
    close("rounding", weights[0], want)
    assert capped[0].tolist() == [True] + [False] * 7
    weights, capped = importance(gap, rollout, PolicyLoss(importance="sequence"))
    want = [1.5, 1.5, 1.8, 1.8, 1.8, 0.25, 0.25, 1.5]
    close("rounding", weights[0], want)
    assert not capped.any()
    weights, capped = importance(
        gap, rollout, PolicyLoss(importance="sequence", importance_cap=1.6)
    )
    assert capped[0].tolist() == [False, False, True, True, True, False, False, False]
    close("rounding", weights[0, 2:5], 1.6)
    weights, capped = importance(gap, rollout, NO_CORRECTION)
    assert (weights == 1).all()
    assert not capped.any()


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_importance_weights_have_no_gradient(kind):
    def total(gap):
        rollout = jnp.zeros(gap.shape, jnp.int32)
        return importance(gap, rollout, PolicyLoss(importance=kind))[0].sum()

    assert not jax.grad(total)(jnp.full((1, 3), 0.1)).any()


# What must not change a step.


def uneven():
    """Prompts whose only two rollouts drew 6 tokens for +1 and 2 tokens for -1, in a row each."""
    made = []
    for count, advantage in ((6, 1.0), (2, -1.0)):
        drawn = next(
            t
            for seed in range(1000)
            for t in rollouts(seed, 1, longest=7, blocks=0)
            if len(t.calls[0].sampled) == count
        )
        made.append(Scored(group_tries([drawn])[0], np.array([advantage], np.float32)))
    return made


def test_the_loss_is_the_mean_over_all_tokens_and_no_mean_of_means(close):
    """On-policy every ratio is 1, so that a token costs -A, whatever the network."""
    batch = packed(uneven(), row_tokens=13, rows=1)
    assert batch.advantage.shape == (2, 13), "one rollout in a row, the rows in two micro-batches"
    for microbatch_rows in (1, 2):
        loss = float(step_of(microbatch_rows=microbatch_rows)(fresh(), batch)[1]["loss"])
        assert loss != pytest.approx(0.0), "0 is the mean of micro-batch means"
        assert loss != pytest.approx(-4 / 26), "-0.154 divides by padding too"
        assert loss != pytest.approx(-4 / 22), "-0.182 divides by prompts too"
        close("equality_loss", loss, (-6 + 2) / 8, of=(6 + 2) / 8)


@pytest.mark.parametrize(
    ("mean", "want", "size"),
    [("token", -0.5, 1.0), ("sequence_mean", 0.0, 1.0), ("sequence_sum", -2.0, 4.0)],
)
def test_other_means_say_so(mean, want, size, close):
    batch = packed(uneven(), row_tokens=13, rows=1, mean=mean)
    close("rounding", step_of()(fresh(), batch)[1]["loss"], want, of=size)


def test_padding_row_order_packing_and_parts_change_nothing(close):
    cfg, groups = PolicyLoss(importance="sequence"), scored(prompts=3)
    longest = max(len(one.group.trie) for one in groups)
    want, metrics = step_of(cfg, microbatch_rows=1)(fresh(), packed(groups, longest, rows=1))
    others = {
        "padding": (packed(groups, longest + 50, rows=4), 4),
        "order": (packed(groups[::-1], longest, rows=1), 1),
        "packing": (packed(groups, 3 * longest, rows=1), 1),
        "parts": (packed(groups, longest, rows=3), 3),
    }
    for name, (batch, microbatch_rows) in others.items():
        got, values = step_of(cfg, microbatch_rows=microbatch_rows)(fresh(), batch)
        assert_same_metrics(close, "equality_loss", values, metrics, batch, what=name)
        close.norm("equality_gradient", got.opt_state, want.opt_state, what=name)


def test_what_is_not_trained_has_no_say(batch, close):
    """Values of prompts, forced tokens and padding, however wild, change nothing."""
    is_trained = batch.trie.weight > 0
    wild = batch.replace(
        advantage=np.where(is_trained, batch.advantage, 1e3).astype(np.float32),
        sampler_logp=np.where(is_trained, batch.sampler_logp, -1e3).astype(np.float32),
        old_logp=np.where(is_trained, batch.sampler_logp, 1e3).astype(np.float32),
    )
    tame = batch.replace(old_logp=batch.sampler_logp)
    step = step_of(PolicyLoss(importance="sequence"))
    got, want = step(fresh(), wild), step(fresh(), tame)
    assert_same_metrics(close, "rounding", got[1], want[1], batch)
    assert np.isfinite(float(got[1]["loss"]))


def test_a_batch_that_trains_nothing_moves_nothing_after_steps_with_momentum(batch):
    nothing = batch.replace(trie=batch.trie.replace(weight=np.zeros_like(batch.trie.weight)))
    before, _ = step_of()(fresh(), batch)
    state, metrics = step_of()(before, nothing)
    told = {name: float(metrics[name]) for name in ("loss", "tokens", "skipped")}
    assert told == {"loss": 0, "tokens": 0, "skipped": 1}
    assert (float(metrics["ratio_min"]), float(metrics["ratio_max"])) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, state.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, before.opt_state)


# On- and off-policy.


def test_an_inner_step_from_the_same_parameters_is_the_on_policy_step(batch, close):
    old = batch.replace(old_logp=logp_of()(PARAMS, batch.trie))
    step = step_of(PolicyLoss())
    got, want = step(fresh(), old), step(fresh(), batch)
    close.norm("equality_gradient", got[0].opt_state, want[0].opt_state)
    assert_same_metrics(close, "module", got[1], want[1] | {"update_kl": 0.0}, batch)


@pytest.mark.parametrize(("inner_steps", "runs"), [(1, 2), (2, 2 + 2)])
def test_p6_an_on_policy_step_runs_each_part_through_the_model_once(batch, inner_steps, runs):
    """Two rows, one at a time; two updates also need what both rows were like before them."""
    ran = []

    def apply(*args):
        jax.debug.callback(lambda: ran.append(1))
        return NETWORK.apply(*args)

    step = make_pgrpo_step(
        NETWORK._replace(apply=apply), OPTIM, PolicyLoss(), steps=50, chunk_tokens=64,
        temperature=1.0, microbatch_rows=1, inner_steps=inner_steps,
    )  # fmt: skip
    jax.block_until_ready(jax.jit(step)(fresh(), batch))
    jax.effects_barrier()
    assert len(ran) == runs


def test_inner_steps_move_away_clip_more_and_do_not_touch_the_mismatch(batch):
    batch = batch.replace(old_logp=logp_of()(PARAMS, batch.trie))
    state, step, lines = fresh(), step_of(PolicyLoss()), []
    for _ in range(6):
        state, metrics = step(state, batch)
        lines.append({name: float(value) for name, value in metrics.items()})
    clipped = [line["clipped_high"] + line["clipped_low"] for line in lines]
    assert clipped[0] == 0 < clipped[-1] < 1
    assert lines[-1]["loss"] < lines[0]["loss"]
    for name in ("ratio_min", "ratio_max", "mismatch_kl", "importance_mean"):
        assert lines[0][name] == lines[-1][name]


def test_inner_steps_in_one_program_are_updates_one_after_another(close):
    first, second = scored(prompts=2), scored(prompts=4, seed=1)
    packing = Packing(row_tokens=384)
    batch = pack_groups(
        [first, second], Aggregation(), packing=packing, microbatch_rows=2, stats=PackingStats()
    )
    got, metrics = step_of(PolicyLoss(), inner_steps=2)(fresh(), batch)
    want, lines = fresh(), []
    for groups in (first, second):
        alone = packed(groups, row_tokens=384)
        alone = alone.replace(old_logp=logp_of()(PARAMS, alone.trie))
        want, line = step_of(PolicyLoss())(want, alone)
        lines.append({name: float(value) for name, value in line.items()})
    close.norm("equality_gradient", got.opt_state, want.opt_state)
    close.norm("equality_gradient", got.params, want.params)
    assert int(got.step) == 1
    tokens = [line["tokens"] for line in lines]
    assert tokens[0] != tokens[1]
    combine = {"tokens": sum, "ratio_min": min, "ratio_max": max, "skipped": np.mean}
    mean = functools.partial(np.average, weights=tokens)
    found = {n: combine.get(n, mean)([line[n] for line in lines]) for n in lines[0]}
    assert_same_metrics(close, "model", metrics, found, batch)
    assert lines[0]["update_kl"] != 0 or lines[1]["update_kl"] != 0


def test_an_update_without_signal_has_no_part_in_the_numbers_of_its_step(close):
    """One inner step has a group, the other none; the step reports what the group alone does."""
    groups, _ = sampled_by(
        PARAMS, [rollouts(seed, 2, longest=5, blocks=1) for seed in range(2)], np.array([0.2, 0.3])
    )
    packing = Packing(row_tokens=384)
    batch = pack_groups(
        [groups, []], Aggregation(), packing=packing, microbatch_rows=2, stats=PackingStats()
    )
    state, metrics = step_of(PolicyLoss(), inner_steps=2)(fresh(), batch)
    told = {name: float(value) for name, value in metrics.items()}
    assert 1.2 < told["ratio_min"] < told["ratio_max"] < 1.4, "1 belongs to no token"
    alone, line = step_of(PolicyLoss())(fresh(), packed(groups, row_tokens=384))
    for name in set(told) - {"skipped"}:
        close(
            "model", told[name], float(line[name]), of=max(abs(float(line[name])), 0.01), what=name
        )
    assert told["skipped"] == 0.5
    close.norm("equality_gradient", state.params, alone.params)
    with pytest.raises(ValueError, match="nats, and Pgrpo"):
        refuse_mismatch(0.02, 1, told)


def test_parts_without_a_trained_token_are_not_run(batch):
    """A program that ran them would return the NaN of their hidden states."""
    poison = NETWORK._replace(
        apply=lambda params, tokens, *rest: jax.tree.map(
            lambda x: jnp.where((tokens == 39).any(), jnp.nan, x),
            NETWORK.apply(params, tokens, *rest),
        )
    )
    more = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x)]), batch)
    more.trie.tokens[2:] = 39
    order = [0, 2, 1, 3]  # strided: parts are rows 0 and 2, 1 and 3
    more = jax.tree.map(lambda x: x[order], more)
    step = make_pgrpo_step(
        poison, OPTIM, NO_CORRECTION, steps=50, chunk_tokens=64, temperature=1.0, microbatch_rows=2
    )
    got, want = jax.jit(step)(fresh(), more)[1], step_of()(fresh(), batch)[1]
    assert float(got["loss"]) == float(want["loss"])
    logp = make_logp(poison, chunk_tokens=64, temperature=1.0, microbatch_rows=2)
    assert np.isfinite(jax.jit(logp)(PARAMS, more.trie)).all()


def test_steps_make_good_rollouts_likelier_than_bad_ones(batch):
    logp = logp_of()
    before = logp(PARAMS, batch.trie)
    state, step = fresh(), step_of()
    for _ in range(5):
        state, _ = step(state, batch)
    moved = np.asarray(logp(state.params, batch.trie) - before)
    is_good = (batch.advantage > 0) & (batch.trie.weight > 0)
    is_bad = (batch.advantage < 0) & (batch.trie.weight > 0)
    assert moved[is_good].mean() > moved[is_bad].mean() + 0.1
    assert (batch.trie.weight * batch.advantage * moved).sum() > 0


def test_the_extra_pass_gives_log_probs_in_the_order_of_the_rows(close):
    groups = scored(prompts=4)
    batch = packed(groups, row_tokens=max(len(one.group.trie) for one in groups), rows=2)
    got = np.asarray(logp_of(microbatch_rows=2, temperature=0.7)(PARAMS, batch.trie))
    assert (got[batch.trie.weight == 0] == 0).all()
    trained = np.argwhere(batch.trie.weight > 0)
    assert len(set(trained[:, 0])) > 2, "rows are in two parts"
    for b, node in np.random.default_rng(0).choice(trained, 30):
        want = stub.logp_of_node(PARAMS, batch.trie, b, node, temperature=0.7)
        token = batch.trie.tokens[b, node]
        close("module", got[b, node], want[token], of=max(1, -want[token]))


# What a step reports.


def sampled_by(params, groups_of_rollouts, off):
    """Groups whose recorded log-probs are the oracle's, each off by so many nats."""
    rng = np.random.default_rng(5)
    made, gaps = [], []
    for group in groups_of_rollouts:
        recorded = []
        for trajectory in group:
            logps = []
            for call in trajectory.calls:
                ids = np.concatenate([call.context, call.sampled])
                logp = [
                    stub.logp_after(params, ids[:i])[ids[i]]
                    for i in range(len(call.context), len(ids))
                ]
                gap = rng.choice(off, len(logp))
                gaps += gap.tolist()
                logps.append(np.array(logp) - gap)
            recorded.append(with_logp(trajectory, logps))
        made.append(Scored(group_tries(recorded)[0], np.ones(len(group), np.float32)))
    return made, np.array(gaps)


def test_the_mismatch_is_told_as_range_shares_and_kl(close):
    off = np.array([-0.3, -0.03, -0.003, 0.0, 0.0005, 0.02, 0.9])
    groups, gaps = sampled_by(
        PARAMS, [rollouts(seed, 2, longest=5, blocks=1) for seed in range(3)], off
    )
    assert set(off) == set(gaps)
    batch = packed(groups, row_tokens=max(len(one.group.trie) for one in groups), rows=1)
    assert len(batch.advantage) == 4, "three rows, and an empty one that is never run"
    for microbatch_rows in (1, 2, 4):
        metrics = step_of(PolicyLoss(), microbatch_rows=microbatch_rows)(fresh(), batch)[1]
        ratio = np.exp(gaps)
        want = {
            "tokens": len(gaps),
            "ratio_min": ratio.min(),
            "ratio_max": ratio.max(),
            "mismatch_mean": np.abs(gaps).mean(),
            "mismatch_kl": (ratio - 1 - gaps).mean(),
            "mismatch_within_0.1": (np.abs(ratio - 1) <= 0.001).mean(),
            "mismatch_within_1": (np.abs(ratio - 1) <= 0.01).mean(),
            "mismatch_within_5": (np.abs(ratio - 1) <= 0.05).mean(),
            "importance_mean": np.minimum(ratio, 2).mean(),
            "importance_capped": (ratio > 2).mean(),
            "loss": -np.minimum(ratio, 2).mean(),
        }
        for name, value in want.items():
            close("gradient", metrics[name], value, what=name)


def test_the_entropy_and_the_kl_to_a_reference_enter_the_loss_with_their_coefficients(batch, close):
    reference = jax.tree.map(lambda p: p * 1.1, PARAMS)
    ref_logp = logp_of(temperature=0.8)(reference, batch.trie)
    entropies, kls = [], []
    for b, node in np.argwhere(batch.trie.weight > 0):
        token = batch.trie.tokens[b, node]
        said = stub.logp_of_node(PARAMS, batch.trie, b, node, 0.8)
        other = stub.logp_of_node(reference, batch.trie, b, node, 0.8)[token]
        entropies.append(-(np.exp(said) * said).sum())
        kls.append(np.exp(other - said[token]) - (other - said[token]) - 1)
    cfg = PolicyLoss(importance="none", kl_coef=0.5, entropy_coef=0.25)
    got = step_of(cfg, temperature=0.8)(fresh(), batch.replace(ref_logp=ref_logp))[1]
    close("model", got["entropy"], np.mean(entropies))
    # Its terms e^x - x - 1 are small differences of numbers near 1.
    close("module", got["reference_kl"], np.mean(kls), of=1.0)
    parts = [float(got["policy_loss"]), 0.5 * np.mean(kls), -0.25 * np.mean(entropies)]
    close("model", got["loss"], sum(parts), of=np.abs(parts).sum())


def test_terms_that_are_off_are_not_computed(batch):
    metrics = step_of()(fresh(), batch)[1]
    assert set(metrics) == {
        *("loss", "policy_loss", "tokens", "update_kl", "importance_mean", "importance_capped"),
        *("clipped_high", "clipped_low", "clipped_dual"),
        *("ratio_min", "ratio_max", "mismatch_mean", "mismatch_kl"),
        *("mismatch_within_0.1", "mismatch_within_1", "mismatch_within_5"),
        *("grad_norm", "param_norm", "lr", "skipped", "entropy"),
    }
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


def test_item_35_the_page_lists_the_metrics_of_a_step_and_no_others(batch):
    page = (ROOT / "docs" / "pgrpo.md").read_text(encoding="utf-8")
    table = page.partition("### Of the update\n")[2].partition("\n#")[0]
    firsts = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    told = [name for first in firsts for name in re.findall(r"`([^`]+)`", first)]
    step = step_of(PolicyLoss())
    metrics = step(fresh(), batch.replace(ref_logp=batch.sampler_logp))[1]
    assert sorted(told) == sorted(metrics)


# On a mesh.


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 4}])
def test_a_step_on_a_mesh_is_the_step_on_one_device(sizes, close):
    cfg = PolicyLoss(importance="sequence")
    batch = packed(scored(prompts=3), row_tokens=384, rows=8)
    batch = batch.replace(old_logp=batch.sampler_logp)
    want, want_metrics = step_of(cfg, microbatch_rows=8)(fresh(), batch)
    sizes = {"fsdp": 2, **sizes}
    mesh, rules = sharding.make_mesh(sharding.Mesh(**sizes)), sharding.Rules()
    abstract = abstract_state(NETWORK, OPTIM, mesh=mesh, rules=rules)
    step = make_pgrpo_step(
        NETWORK, OPTIM, cfg, steps=50, chunk_tokens=64, temperature=1.0, microbatch_rows=8
    )
    with sharding.use(mesh, rules):
        compiled = jit_step(step, abstract, mesh=mesh, rules=rules)
        state = jax.device_put(fresh(), jax.tree.map(lambda leaf: leaf.sharding, abstract))
        state, metrics = compiled(state, sharding.to_global(batch, mesh, rules))
    close.norm("sharded", state.opt_state, want.opt_state)
    assert_same_metrics(close, "sharded", metrics, want_metrics, batch)


def test_data_parallel_devices_exchange_sums_and_no_tokens():
    """Sums over a rollout stay on the device that holds its row."""
    batch = packed(scored(prompts=1), row_tokens=384, rows=8)
    mesh, rules = sharding.make_mesh(sharding.Mesh(data=8, fsdp=1)), sharding.Rules()
    abstract = abstract_state(NETWORK, OPTIM, mesh=mesh, rules=rules)
    step = make_pgrpo_step(
        NETWORK, OPTIM, PolicyLoss(importance="sequence"), steps=50, chunk_tokens=384,
        temperature=1.0, microbatch_rows=8,
    )  # fmt: skip
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    with sharding.use(mesh, rules):
        program = jit_step(step, abstract, mesh=mesh, rules=rules).lower(abstract, shapes)
    found = re.findall(
        r" (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)\(",
        program.compile().as_text(),
    )
    assert set(found) == {"all-reduce"}


# Refusals.


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"clip_low": 1.5}, "clip_low = 1.5 must be at least 0 and at most 1"),
        ({"clip_high": -0.1}, "clip_high = -0.1 must be at least 0"),
        ({"entropy_coef": -0.1}, "entropy_coef = -0.1 must be at least 0"),
        ({"dual_clip": 1.0}, "dual_clip = 1.0 must be above 1"),
        ({"importance_cap": 0.0}, "importance_cap = 0.0 must be above 0"),
    ],
)
def test_bounds_without_sense_are_refused(kwargs, sentence):
    with pytest.raises(ValueError, match=sentence):
        PolicyLoss(**kwargs)


@pytest.mark.parametrize(
    ("cfg", "temperature", "sentence"),
    [
        (PolicyLoss(), 0.0, "temperature = 0.0 must be above 0"),
        (PolicyLoss(kl_coef=0.1), 1.0, "kl_coef = 0.1 and the batch has no ref_logp"),
    ],
)
def test_losses_that_cannot_be_computed_are_refused(batch: PolicyBatch, cfg, temperature, sentence):
    with pytest.raises(ValueError, match=sentence):
        loss_sums(NETWORK, PARAMS, batch, cfg, chunk_tokens=64, temperature=temperature)


def test_parts_that_do_not_divide_the_rows_are_refused(batch):
    with pytest.raises(ValueError, match="microbatch_rows = 3 does not divide the batch's 2 rows"):
        step_of(microbatch_rows=3)(fresh(), batch)
