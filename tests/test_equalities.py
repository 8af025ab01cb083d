"""The equalities that keep one trie, one mask and one protocol true; never skipped or loosened.

(a) Loss and gradients of packed tries are those of their calls run one by one, in supervised
    training and in P-GRPO.
(b) Log-probs that the sampler recorded are those that the loss recomputes on the packed trie.
"""

import dataclasses
import functools
import math

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trajectories import rollouts, with_logp

from tw_jax.contracts import Span
from tw_jax.forkjoin import replay, threadweaver, tries
from tw_jax.forkjoin.protocol import Result, steps
from tw_jax.models.lora import Lora, adapters, overlay
from tw_jax.models.rope import Rope
from tw_jax.models.transformer import Model, network
from tw_jax.sample import sampler as samplers
from tw_jax.sample.draw import sampling_params
from tw_jax.tasks import multiplication
from tw_jax.tokenizer import Bytes, Chat, load_tokenizer
from tw_jax.train.groups import Aggregation, Scored, pack_groups
from tw_jax.train.loss import token_logp
from tw_jax.train.pgrpo import PolicyLoss, loss_sums
from tw_jax.train.sft import nll_sums
from tw_jax.trie.batch import stack_rows
from tw_jax.trie.pack import Packing, PackingStats
from tw_jax.trie.tree import build

TOKENIZER = fakes.Characters()
LIMITS = threadweaver.ForkJoin(max_context=600, max_new=500, max_thread=40, max_threads=4)


def protocol_of(tokenizer, limits=LIMITS):
    return threadweaver.ThreadWeaver(threadweaver.make_table(tokenizer), limits)


@functools.cache
def model(vocab_size, qk_norm=True, attention="blockwise", lora=None, spare_rows=0):
    cfg = Model(
        vocab_size=vocab_size + spare_rows,
        num_layers=2,
        width=32,
        mlp_width=64,
        num_heads=4,
        num_kv_heads=2,
        head_width=8,
        qk_norm=qk_norm,
        tie_embeddings=not qk_norm,
        rope=Rope(theta=1e4),
        attention=attention,
        lora=lora,
    )
    net = network(cfg, num_ids=vocab_size)
    params, rng = net.init(jax.random.key(0)), np.random.default_rng(0)
    # Fresh adapters add nothing.
    some = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape) / 4), adapters(params))
    return net, overlay(params, some)


LORA = Lora(rank=3, alpha=3.0)


def random_trajectory(seed, protocol):
    """ThreadWeaver's shape at a small scale: prose and blocks of threads, random ids."""
    rng = np.random.default_rng(seed)
    rollout = steps(protocol, rng.integers(15, TOKENIZER.vocab_size, 12).astype(np.int32))
    words = np.arange(TOKENIZER.id_of("a"), TOKENIZER.vocab_size)
    blocks, parents = int(rng.integers(1, 4)), 0
    requests = next(rollout)
    while True:
        results = []
        for request in requests:
            ids = rng.choice(words, rng.integers(3, 14)).tolist()
            if request.path:
                end = rng.choice(["\n</Thread>", "<eos>", ""], p=[0.8, 0.1, 0.1])
                ids += TOKENIZER.encode(str(end)).tolist()
                ids = ids if end else rng.choice(words, request.max_tokens).tolist()
            elif parents < blocks:
                listed = "".join(
                    f"<Outline>{n}: a</Outline>\n" for n in range(1, rng.integers(3, 6))
                )
                ids += TOKENIZER.encode(f"<Parallel><Outlines>{listed}</Outlines>").tolist()
            else:
                ids += TOKENIZER.encode("</Parallel>\n<eos>").tolist()
            parents += not request.path
            results.append(Result(np.array(ids[: request.max_tokens], np.int32)))
        try:
            requests = rollout.send(results)
        except StopIteration as stop:
            return stop.value


def task_trajectories(count):
    """Gold multiplications of both layouts, as the data pipeline replays them."""
    tokenizer = load_tokenizer(Bytes())
    limits = threadweaver.ForkJoin(max_context=4000, max_new=4000, max_thread=900, max_threads=4)
    chat, made = Chat(template="plain"), []
    for lone_pair in ("fork", "prose"):
        cfg = multiplication.Multiplication(
            min_value=11, max_value=99, min_factors=2 if lone_pair == "fork" else 4, max_factors=4,
            parallel=True, lone_pair=lone_pair,
        )  # fmt: skip
        for problem in cfg.problems(seed=3, count=count):
            ids = chat.document(tokenizer, problem.question, cfg.gold(problem))
            prompt = chat.prompt(tokenizer, problem.question)
            made.append(replay.replay(protocol_of(tokenizer, limits), ids, len(prompt)))
    return tokenizer.vocab_size, made


def packed(trajectories, row_tokens):
    rows, room = [[]], row_tokens
    for trajectory in trajectories:
        trie = tries.trajectory_trie(trajectory)
        if len(trie) > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(trie)
        room -= len(trie)
    return stack_rows(rows, row_tokens)


def call_by_call(trajectories, row_tokens):
    """One row per call: its context without loss, its sampled tokens with."""
    rows = []
    for trajectory in trajectories:
        for call in trajectory.calls:
            weight = np.concatenate([np.zeros(len(call.context)), np.ones(len(call.sampled))])
            ids = np.concatenate([call.context, call.sampled])
            rows.append([build([ids], [weight.astype(np.float32)])])
    return stack_rows(rows, row_tokens)


def loss_and_gradient(net, params, batch, rows_at_once=8):
    """Global token mean over all rows, a few at a time."""

    @jax.jit
    def part(params, rows):
        return jax.value_and_grad(lambda p: nll_sums(net, p, rows, chunk_tokens=256), has_aux=True)(
            params
        )

    rows_at_once = min(rows_at_once, len(batch.tokens))
    pad = -len(batch.tokens) % rows_at_once
    batch = jax.tree.map(lambda a: np.pad(a, [(0, pad), (0, 0)]), batch)
    index = np.arange(batch.tokens.shape[1], dtype=np.int32)
    if pad:
        batch.end[-pad:], batch.parent[-pad:] = index + 1, index
    total, weight, gradient = 0.0, 0.0, jax.tree.map(jnp.zeros_like, params)
    for first in range(0, len(batch.tokens), rows_at_once):
        some = jax.tree.map(lambda a, f=first: a[f : f + rows_at_once], batch)
        (value, sums), g = part(params, some)
        total, weight = total + float(value), weight + float(sums["weight"])
        gradient = jax.tree.map(jnp.add, gradient, g)
    return total / weight, jax.tree.map(lambda g: g / weight, gradient), weight


def assert_packed_equals_calls(vocab_size, trajectories, row_tokens, close, **kind):
    net, params = model(vocab_size, **kind)
    mine = loss_and_gradient(net, params, packed(trajectories, row_tokens))
    longest = max(len(c.context) + len(c.sampled) for t in trajectories for c in t.calls)
    theirs = loss_and_gradient(net, params, call_by_call(trajectories, longest))
    assert mine[2] == theirs[2] == sum(len(c.sampled) for t in trajectories for c in t.calls)
    close("equality_loss", mine[0], theirs[0])
    close.norm("equality_gradient", mine[1], theirs[1])


@pytest.mark.parametrize(
    "kind", [{}, {"qk_norm": False}, {"attention": "reference"}, {"lora": LORA}]
)
def test_a_packed_random_trajectories_equal_their_calls_one_by_one(kind, close):
    trajectories = [random_trajectory(seed, protocol_of(TOKENIZER)) for seed in range(6)]
    assert sum(t.rounds for t in trajectories) > 6
    assert_packed_equals_calls(TOKENIZER.vocab_size, trajectories, 1024, close, **kind)


def test_a_packed_multiplications_equal_their_calls_one_by_one(close):
    vocab_size, trajectories = task_trajectories(2)
    assert_packed_equals_calls(vocab_size, trajectories, 4096, close)


def test_a_the_reference_labels_differ_from_the_calls(tolerance):
    """The comparison above can fail: flat labels are another loss on the same trie."""
    trajectory = random_trajectory(1, protocol_of(TOKENIZER))
    from tw_jax.trie.tree import flat_labels

    net, params = model(TOKENIZER.vocab_size)
    trie = tries.trajectory_trie(trajectory)
    flat = flat_labels(trie, trajectory.prompt_tokens)
    losses = [loss_and_gradient(net, params, stack_rows([[t]], 1024))[0] for t in (trie, flat)]
    assert abs(losses[0] - losses[1]) > 100 * tolerance["equality_loss"] * losses[0]


# P-GRPO: groups in packed rows against one plain row for each engine call, without any trie.

TEMPERATURE = 0.9
MICRO_BATCH_TOKENS = 700


@dataclasses.dataclass
class Plain:
    """Engine calls of some groups, one in a row; a column is the token after it, shifted by one."""

    groups: list  # of trajectories
    tokens: np.ndarray  # [R, T]
    drawn: np.ndarray  # [R, T - 1] bool
    rollout: np.ndarray  # [R], counted through all groups
    length: np.ndarray  # [R]
    logp: np.ndarray  # [R, T - 1] of the model
    old: np.ndarray  # of another policy
    sampler: np.ndarray  # of a third one


@functools.cache
def plain_model():
    """The model on causal rows: log-probs, and the gradient of sum(slope * logp)."""
    net, params = model(TOKENIZER.vocab_size, attention="reference")

    @jax.jit
    def pull(tokens, slope):
        index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        causal = Span(enter=index, exit=jnp.full_like(index, tokens.shape[1]))

        def logp(params):
            hidden, _ = net.apply(params, tokens, index, causal)
            logs = jax.nn.log_softmax(net.unembed(params, hidden[:, :-1]) / TEMPERATURE)
            return jnp.take_along_axis(logs, tokens[:, 1:, None], axis=2)[..., 0]

        said, back = jax.vjp(logp, params)
        return said, back(slope)[0]

    return pull


@functools.cache
def plain_calls():
    groups = [rollouts(seed, count, longest=12) for seed, count in ((0, 3), (1, 2), (3, 3))]
    owners = [
        (k, call) for k, made in enumerate(t for g in groups for t in g) for call in made.calls
    ]
    length = np.array([len(c.context) + len(c.sampled) for _, c in owners])
    tokens = np.zeros((len(owners), length.max()), np.int32)
    drawn = np.zeros((len(owners), length.max() - 1), bool)
    for row, (_, call) in enumerate(owners):
        tokens[row, : length[row]] = np.concatenate([call.context, call.sampled])
        drawn[row, len(call.context) - 1 : length[row] - 1] = True
    logp = np.asarray(plain_model()(tokens, np.zeros(drawn.shape, np.float32))[0])
    rng = np.random.default_rng(0)
    # Exact in float32, so that both sides read the same numbers.
    old = (logp + rng.normal(size=logp.shape) / 2).astype(np.float32)
    sampler = (logp + rng.normal(size=logp.shape) / 4).astype(np.float32)
    rollout = np.array([k for k, _ in owners])
    return Plain(groups, tokens, drawn, rollout, length, logp, old, sampler)


def plain_weights(calls, mean):
    """Weights [R, 1] of the tokens of each call, straight from the definitions."""
    count = calls.drawn.sum(axis=1)
    total = {k: count[calls.rollout == k].sum() for k in set(calls.rollout)}
    if mean == "token":
        weights = [1 / count.sum() for _ in count]
    elif mean == "sequence_mean":
        weights = [1 / len(total) / total[k] for k in calls.rollout]
    elif mean == "sequence_sum":
        weights = [1 / len(total) for _ in count]
    else:
        parts = [[] for _ in range(math.ceil(calls.length.sum() / MICRO_BATCH_TOKENS))]
        for row in sorted(range(len(count)), key=lambda r: (-calls.length[r], -count[r])):
            min(parts, key=lambda part: sum(calls.length[part])).append(row)
        assert len(parts) > 2
        share = {r: len(part) / len(count) / count[part].sum() for part in parts for r in part}
        weights = [share[row] for row in range(len(count))]
    return np.array(weights)[:, None]


def plain_policy(calls, advantage, mean, *, off_policy, kind):
    """Loss and gradient of P-GRPO, and both as they are where all tokens cost and none pays.

    In float64, and the slope of each token's loss is written by hand.
    """
    logp, sampler = calls.logp.astype(np.float64), calls.sampler.astype(np.float64)
    old = calls.old if off_policy else logp
    each, ratio = advantage[calls.rollout][:, None], np.exp(logp - old)
    bound = np.where(each > 0, np.minimum(ratio, 1.28), np.clip(ratio, 0.8, 3.0))
    gap = np.where(calls.drawn, old - sampler, 0)
    if kind == "sequence":
        whole = np.bincount(calls.rollout, weights=gap.sum(axis=1))
        gap = np.broadcast_to(whole[calls.rollout][:, None], gap.shape)
    scale = plain_weights(calls, mean) * np.minimum(np.exp(gap), 2.0) * calls.drawn
    slope = np.where(bound == ratio, -each * ratio, 0) * scale
    costs = scale * -each * bound
    gradient, size = (
        plain_model()(calls.tokens, s.astype(np.float32))[1] for s in (slope, np.abs(slope))
    )
    return (costs.sum(), gradient), (np.abs(costs).sum(), size)


def packed_groups(calls, recorded, advantage, mean):
    """The calls' groups in rows, with these log-probs in the place of the sampler's."""
    scored, row, first = [], 0, 0
    for group in calls.groups:
        made = []
        for trajectory in group:
            here = range(row, row + len(trajectory.calls))
            made.append(with_logp(trajectory, [recorded[r][calls.drawn[r]] for r in here]))
            row += len(trajectory.calls)
        group_advantages = advantage[first : first + len(group)].astype(np.float32)
        scored += [
            Scored(part, group_advantages) for part in tries.group_tries(made, max_tokens=260)
        ]
        first += len(group)
    cfg = Aggregation(mean=mean, micro_batch_tokens=MICRO_BATCH_TOKENS)
    return pack_groups(
        [scored], cfg, packing=Packing(row_tokens=260), microbatch_rows=1, stats=PackingStats()
    )


@functools.cache
def packed_policy(kind):
    net, params = model(TOKENIZER.vocab_size)

    def loss(params, batch):
        cfg = PolicyLoss(importance=kind)
        return loss_sums(net, params, batch, cfg, chunk_tokens=256, temperature=TEMPERATURE)

    return functools.partial(jax.jit(jax.value_and_grad(loss, has_aux=True)), params)


ADVANTAGE = np.array([0.7, -0.4, 1.1, -0.9, 0.3, 0.5, -1.2, 0.8])
"""One for each rollout of `plain_calls`."""


@pytest.mark.parametrize("kind", ["token", "sequence"])
@pytest.mark.parametrize("off_policy", [False, True], ids=["on_policy", "off_policy"])
@pytest.mark.parametrize(
    ("mean", "sign"),
    [
        ("token", "both"),
        ("sequence_mean", "both"),
        ("sequence_sum", "both"),
        ("micro_batch", "both"),
        ("token", "positive"),
        ("token", "negative"),
    ],
)
def test_a_packed_groups_equal_their_calls_one_by_one(mean, sign, off_policy, kind, close):
    calls = plain_calls()
    signs = {"positive": abs(ADVANTAGE), "negative": -abs(ADVANTAGE)}
    advantage = signs.get(sign, ADVANTAGE)
    batch = packed_groups(calls, calls.sampler, advantage, mean)
    assert len(batch.advantage) > 2
    if off_policy:
        old = packed_groups(calls, calls.old, advantage, mean).sampler_logp
        batch = batch.replace(old_logp=old)
    (loss, sums), gradient = packed_policy(kind)(batch)
    (want, plain_gradient), (size, of) = plain_policy(
        calls, advantage, mean, off_policy=off_policy, kind=kind
    )
    tokens = calls.drawn.sum()
    assert float(sums["tokens"]) == tokens
    clipped = [float(sums[name]) for name in ("clipped_high", "clipped_low", "clipped_dual")]
    assert [count > 0 for count in clipped] == [
        off_policy and sign != "negative",
        *[off_policy and sign != "positive"] * 2,
    ]
    assert sum(clipped) < tokens
    assert 0 < float(sums["importance_capped"]) < tokens
    # Good and bad tokens cancel in both, the roundings of their costs and slopes do not.
    close("equality_loss", loss, want, of=size)
    close.norm("equality_gradient", gradient, plain_gradient, of=of)


def test_a_every_aggregation_is_another_loss(tolerance):
    """The comparison above can fail: what one mean calls the loss, no other does."""
    calls = plain_calls()
    losses = [
        [part[0] for part in plain_policy(calls, ADVANTAGE, mean, off_policy=True, kind="token")]
        for mean in ("token", "sequence_mean", "sequence_sum", "micro_batch")
    ]
    for n, (one, size) in enumerate(losses):
        for other, _ in losses[:n]:
            assert abs(one - other) > 100 * tolerance["equality_loss"] * size


def sampled_log_probs(trajectory, logp, trie):
    """The loss's log-prob of each sampled token, found by walking the trie."""
    edges = {
        (int(p), int(t)): n for n, (p, t) in enumerate(zip(trie.parent, trie.tokens, strict=True))
    }
    found = []
    for call in trajectory.calls:
        node = -1
        for token in call.context.tolist():
            node = edges[node, token]
        for token in call.sampled.tolist():
            node = edges[node, token]
            found.append(float(logp[node]))
    return np.array(found)


@pytest.mark.parametrize(
    ("qk_norm", "temperature", "lora", "spare_rows"),
    [(True, 1.0, None, 0), (False, 0.6, None, 30), (True, 1.0, LORA, 0)],
)
def test_b_sampler_log_probs_equal_those_of_the_loss(qk_norm, temperature, lora, spare_rows, close):
    net, params = model(TOKENIZER.vocab_size, qk_norm, lora=lora, spare_rows=spare_rows)
    protocol = protocol_of(
        TOKENIZER, threadweaver.ForkJoin(max_new=300, max_thread=24, max_threads=4)
    )
    scripted = [random_trajectory(seed, protocol) for seed in range(4)]
    calls = max(len(t.calls) for t in scripted)
    script = np.full((4, calls, 40), TOKENIZER.eos_ids[0], np.int32)
    for b, trajectory in enumerate(scripted):
        for n, call in enumerate(trajectory.calls):
            script[b, n, : len(call.sampled)] = call.sampled[:40]

    def half_given(logits, sampling, call, position):
        """Calls follow the script in form and the model in their words."""
        own, _ = samplers.draw(logits, sampling[0], call, position)
        row = jnp.arange(logits.shape[0])[:, None]
        given = sampling[1][row, jnp.minimum(call, calls - 1), jnp.minimum(position, 39)]
        is_word = given >= TOKENIZER.id_of("a")
        own_word = own >= TOKENIZER.id_of("a")
        tokens = jnp.where(is_word & own_word, own, given)
        logp = jax.nn.log_softmax(logits / sampling[0].temperature[:, None, None], axis=-1)
        return tokens, jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]

    cfg = samplers.Sampler(rows=4, max_prompt=16, prefill_chunk=16)
    sampler = samplers.make_sampler(net, protocol, cfg, draw=half_given)
    sampling = (
        sampling_params(4, temperature=temperature, top_p=1.0, top_k=0, seed=2),
        jnp.asarray(script),
    )
    prompts = [t.ids[: t.prompt_tokens] for t in scripted]
    made = sampler(params, prompts, sampling)
    assert sum(t.rounds for t in made) >= 4
    for trajectory in made:
        trie = tries.trajectory_trie(trajectory)
        batch = stack_rows([[trie]], 1024)
        hidden, _ = net.apply(params, batch.tokens, batch.depth, batch.span)
        said = token_logp(
            net, params, hidden, batch=batch, chunk_tokens=256, temperature=temperature
        )
        want = sampled_log_probs(trajectory, np.asarray(said.logp)[0], trie)
        drawn = np.concatenate([call.logp for call in trajectory.calls])
        close("sampler_logp", drawn, want, of=1.0)
