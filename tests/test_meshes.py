"""SFT, P-GRPO and the sampler, with a real decoder, on eight devices as on one."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sharding
from trajectories import PROTOCOL, TOKENIZER, rollouts

from tw_jax import sharding
from tw_jax.attention import sequence
from tw_jax.contracts import Span
from tw_jax.data import workloads
from tw_jax.forkjoin.tries import group_tries, trajectory_trie
from tw_jax.models.transformer import network
from tw_jax.sample.draw import scripted
from tw_jax.sample.sampler import Sampler, make_sampler
from tw_jax.sharding import Mesh, Rules
from tw_jax.train import sft
from tw_jax.train.groups import Aggregation, Scored, pack_groups
from tw_jax.train.pgrpo import PolicyLoss, make_logp
from tw_jax.train.pgrpo import make_pgrpo_step as make_policy_step
from tw_jax.train.state import Optim, abstract_state, create, jit_step
from tw_jax.trie.batch import stack_rows
from tw_jax.trie.mask import dense
from tw_jax.trie.pack import Packing, PackingStats, truncate

MODEL = dataclasses.replace(test_sharding.MODEL, attention="blockwise")
NETWORK = network(MODEL, num_ids=TOKENIZER.vocab_size)
OPTIM = Optim(peak_lr=1e-2, warmup_steps=0)
ROWS, TOKENS = 8, 512
MESHES = {
    "data": Mesh(data=8, fsdp=1),
    "fsdp": Mesh(fsdp=8),
    "tensor": Mesh(fsdp=2, tensor=4),
    "cube": Mesh(data=2, fsdp=2, tensor=2),
    "sequence": Mesh(fsdp=1, sequence=8),
    "sequence and fsdp": Mesh(fsdp=2, sequence=4),
    "sequence and tensor": Mesh(data=2, fsdp=1, sequence=2, tensor=2),
}
# Each compiles a program for eight devices; two kinds of splits at once are proof enough for a day.
QUICK = {"cube", "sequence and tensor"}
on_meshes = pytest.mark.parametrize(
    "cfg",
    [
        pytest.param(cfg, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, cfg in MESHES.items()
    ],
)


def fresh():
    return create(NETWORK.init(jax.random.key(0)), OPTIM, key=jax.random.key(1))


def drawn(seed: int):
    """Trajectories enough for a row."""
    return rollouts(seed, 3, longest=40)


@functools.cache
def supervised():
    """Rows of tries, and the state and metrics after a step on one device."""
    rows = [[trajectory_trie(t) for t in drawn(seed)] for seed in range(ROWS)]
    batch = stack_rows(rows, max(TOKENS, *(sum(map(len, row)) for row in rows)))
    batch = jax.tree.map(lambda x: np.asarray(x)[:, :TOKENS], batch)
    batch = batch.replace(end=np.minimum(batch.end, TOKENS))
    step = sft.make_sft_step(NETWORK, OPTIM, steps=10, chunk_tokens=100)
    return batch, step, jax.block_until_ready(jax.jit(step)(fresh(), batch))


@functools.cache
def policy():
    """Groups, and the state and metrics after an update on one device."""
    rng = np.random.default_rng(0)
    groups = []
    for seed in range(ROWS):
        made = drawn(seed)
        advantage = rng.normal(size=len(made)).astype(np.float32)
        groups += [Scored(part, advantage) for part in group_tries(made, max_tokens=TOKENS)]
    packing = Packing(row_tokens=TOKENS)
    batch = pack_groups(
        [groups], Aggregation(), packing=packing, microbatch_rows=ROWS, stats=PackingStats()
    )
    logp = jax.jit(make_logp(NETWORK, chunk_tokens=100, temperature=1.0, microbatch_rows=ROWS))(
        fresh().params, batch.trie
    )
    noise = rng.normal(size=logp.shape, scale=0.1).astype(np.float32)
    batch = batch.replace(sampler_logp=np.asarray(logp) + noise)
    step = make_policy_step(
        NETWORK,
        OPTIM,
        PolicyLoss(),
        steps=10,
        chunk_tokens=100,
        temperature=1.0,
        microbatch_rows=ROWS,
    )
    return batch, step, jax.block_until_ready(jax.jit(step)(fresh(), batch))


def assert_same_step(cfg, batch, step, alone, close):
    mesh, rules = sharding.make_mesh(cfg), Rules()
    abstract = abstract_state(NETWORK, OPTIM, mesh=mesh, rules=rules)
    want, want_metrics = alone
    with sharding.use(mesh, rules):
        compiled = jit_step(step, abstract, mesh=mesh, rules=rules)
        state = jax.device_put(fresh(), jax.tree.map(lambda leaf: leaf.sharding, abstract))
        placed = sharding.to_global(batch, mesh, rules)
        state, metrics = jax.block_until_ready(compiled(state, placed))
    # Parameters after one step of Adam hold signs of gradients; the moments hold the gradients.
    close("sharded", state.opt_state, want.opt_state)
    for name, value in want_metrics.items():
        # Costs of both signs cancel in these; advantages are of size 1.
        size = 1.0 if name in ("loss", "policy_loss", "update_kl", "mismatch_kl") else None
        close("sharded", metrics[name], value, of=size, what=name)


@on_meshes
def test_a_supervised_step_is_that_of_one_device(cfg, close):
    assert_same_step(cfg, *supervised(), close)


@on_meshes
def test_a_policy_step_is_that_of_one_device(cfg, close):
    assert_same_step(cfg, *policy(), close)


CALLS, LONGEST = 8, 24


def script(seed: int) -> np.ndarray:
    """Two forks of two or three threads each, and an end."""
    rng = np.random.default_rng(seed)
    calls = []
    for _ in range(2):
        threads = int(rng.integers(2, 4))
        outlines = "".join(f"<Outline>{n}:</Outline>" for n in range(1, threads + 1))
        calls.append(f"<Parallel><Outlines>{outlines}</Outlines>")
        calls += ["abcd"[: rng.integers(1, 4)] + "</Thread>"] * threads
    calls = [*calls, "ab<eos>"] + ["<eos>"] * CALLS
    rows = [TOKENIZER.encode(text)[:LONGEST] for text in calls[:CALLS]]
    return np.stack([np.pad(row, (0, LONGEST - len(row)), constant_values=1) for row in rows])


@functools.cache
def sampled():
    """A sampler, its prompts and script, and what it draws on one device."""
    cfg = Sampler(rows=ROWS, max_prompt=8, prefill_chunk=8)
    sampler = make_sampler(NETWORK, PROTOCOL, cfg, draw=scripted)
    prompts = [TOKENIZER.encode("abcdefgh"[: n % 3 + 1]) for n in range(ROWS)]
    scripts = np.stack([script(seed) for seed in range(ROWS)]).astype(np.int32)
    return sampler, prompts, scripts, sampler(fresh().params, prompts, scripts)


@on_meshes
def test_rollouts_are_those_of_one_device(cfg, close):
    sampler, prompts, scripts, alone = sampled()
    assert sum(trajectory.rounds for trajectory in alone) >= ROWS
    mesh, rules = sharding.make_mesh(cfg), Rules()
    where = abstract_state(NETWORK, OPTIM, mesh=mesh, rules=rules).params
    params = jax.device_put(fresh().params, jax.tree.map(lambda leaf: leaf.sharding, where))
    with sharding.use(mesh, sharding.sampling(rules)):
        made = sampler(params, prompts, scripts)
    for got, want in zip(made, alone, strict=True):
        assert [c.sampled.tolist() for c in got.calls] == [c.sampled.tolist() for c in want.calls]
        for mine, theirs in zip(got.calls, want.calls, strict=True):
            close("sampler_logp", mine.logp, theirs.logp, of=1.0)


# Rows that are split over devices.


@pytest.mark.parametrize("devices", [4, 8])
def test_devices_get_as_many_tokens_and_about_as_many_pairs(devices):
    trie = trajectory_trie(workloads.trajectory(workloads.Shape(), seed=0))  # ThreadWeaver's
    tokens = len(trie) // 4096 * 4096
    batch = stack_rows([[truncate(trie, tokens)]], tokens)
    order = np.asarray(sequence.deal(batch.span, devices))[0]
    assert sorted(order.tolist()) == list(range(tokens))
    pairs = batch.depth[0] + 1  # a token sees itself and its ancestors
    dealt = pairs[order].reshape(devices, -1).sum(1)
    in_order = pairs.reshape(devices, -1).sum(1)
    assert dealt.max() / dealt.mean() <= 1.05
    assert in_order.max() / in_order.mean() >= 1.2


def test_dealt_tokens_see_what_they_saw():
    span = jax.tree.map(lambda x: x[:1], supervised()[0].span)
    order = np.asarray(sequence.deal(span, 8))[0]
    dealt = jax.tree.map(lambda x: np.asarray(x)[:, order], span)
    before = np.asarray(dense(span.enter, span))[0]
    after = np.asarray(dense(dealt.enter, dealt))[0]
    np.testing.assert_array_equal(after, before[np.ix_(order, order)])


def test_a_row_that_does_not_divide_over_the_devices_is_refused():
    mesh = sharding.make_mesh(MESHES["sequence"])
    span = Span(enter=jnp.arange(12)[None], exit=jnp.full((1, 12), 12))
    with (
        sharding.use(mesh, Rules()),
        pytest.raises(ValueError, match="tokens = 12, which must be a multiple of 8"),
    ):
        NETWORK.apply(fresh().params, jnp.zeros((1, 12), int), span.enter, span)


def test_no_device_holds_the_scores_or_the_logits_of_a_whole_row():
    batch, step, _ = supervised()
    mesh, rules = sharding.make_mesh(MESHES["sequence"]), Rules()
    abstract = abstract_state(NETWORK, OPTIM, mesh=mesh, rules=rules)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    with sharding.use(mesh, rules):
        program = jit_step(step, abstract, mesh=mesh, rules=rules).lower(abstract, shapes)
    text = program.compile().as_text()
    wide = MODEL.mlp_width, MODEL.vocab_size
    for share, is_there in ((TOKENS // 8, True), (TOKENS, False)):
        shapes = [f"[{ROWS},{share},{n}]" for n in wide] + [f"[{ROWS * share},{n}]" for n in wide]
        assert any(shape in text for shape in shapes) == is_there
