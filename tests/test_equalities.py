"""The equalities that keep one trie, one mask and one protocol true; never skipped or loosened.

(a) Loss and gradients of packed tries are those of their calls run one by one.
(b) Log-probs that the sampler recorded are those that the loss recomputes on the packed trie.
"""

import functools

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.forkjoin import replay, threadweaver, tries
from tw_jax.forkjoin.protocol import Result, steps
from tw_jax.models.rope import Rope
from tw_jax.models.transformer import Model, network
from tw_jax.sample import sampler as samplers
from tw_jax.sample.draw import settings
from tw_jax.tasks import multiplication
from tw_jax.tokenizer import Bytes, Chat, load_tokenizer
from tw_jax.train.loss import token_logp
from tw_jax.train.sft import nll_sums
from tw_jax.trie.batch import stack_rows
from tw_jax.trie.tree import build

TOKENIZER = fakes.Characters()
LIMITS = threadweaver.ForkJoin(max_context=600, max_new=500, max_thread=40, max_threads=4)


def protocol_of(tokenizer, limits=LIMITS):
    return threadweaver.ThreadWeaver(threadweaver.make_table(tokenizer), limits)


@functools.cache
def model(vocab_size, qk_norm=True, attention="blockwise"):
    cfg = Model(
        vocab_size=vocab_size,
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
    )
    net = network(cfg)
    return net, net.init(jax.random.key(0))


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
        for problem in multiplication.problems(cfg, seed=3, count=count):
            ids = chat.document(tokenizer, problem.question, multiplication.gold(problem, cfg))
            prompt = chat.prompt(tokenizer, problem.question)
            made.append(replay.replay(protocol_of(tokenizer, limits), ids, len(prompt)))
    return tokenizer.vocab_size, made


def packed(trajectories, row_tokens):
    rows, room = [[]], row_tokens
    for trajectory in trajectories:
        trie = tries.of_trajectory(trajectory)
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


def norm(tree):
    return float(jnp.sqrt(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(tree))))


def assert_packed_equals_calls(vocab_size, trajectories, row_tokens, tolerance, **kind):
    net, params = model(vocab_size, **kind)
    mine = loss_and_gradient(net, params, packed(trajectories, row_tokens))
    longest = max(len(c.context) + len(c.sampled) for t in trajectories for c in t.calls)
    theirs = loss_and_gradient(net, params, call_by_call(trajectories, longest))
    assert mine[2] == theirs[2] == sum(len(c.sampled) for t in trajectories for c in t.calls)
    assert mine[0] == pytest.approx(theirs[0], rel=tolerance["equality_loss"])
    difference = norm(jax.tree.map(jnp.subtract, mine[1], theirs[1]))
    assert difference <= tolerance["equality_gradient"] * norm(theirs[1])


@pytest.mark.parametrize("kind", [{}, {"qk_norm": False}, {"attention": "reference"}])
def test_a_packed_random_trajectories_equal_their_calls_one_by_one(kind, tolerance):
    trajectories = [random_trajectory(seed, protocol_of(TOKENIZER)) for seed in range(6)]
    assert sum(t.rounds for t in trajectories) > 6
    assert_packed_equals_calls(TOKENIZER.vocab_size, trajectories, 1024, tolerance, **kind)


def test_a_packed_multiplications_equal_their_calls_one_by_one(tolerance):
    vocab_size, trajectories = task_trajectories(2)
    assert_packed_equals_calls(vocab_size, trajectories, 4096, tolerance)


def test_a_the_reference_labels_differ_from_the_calls(tolerance):
    """The comparison above can fail: flat labels are another loss on the same trie."""
    trajectory = random_trajectory(1, protocol_of(TOKENIZER))
    from tw_jax.trie.tree import flat_labels

    net, params = model(TOKENIZER.vocab_size)
    trie = tries.of_trajectory(trajectory)
    flat = flat_labels(trie, trajectory.prompt_tokens)
    losses = [loss_and_gradient(net, params, stack_rows([[t]], 1024))[0] for t in (trie, flat)]
    assert abs(losses[0] - losses[1]) > 100 * tolerance["equality_loss"] * losses[0]


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


@pytest.mark.parametrize(("qk_norm", "temperature"), [(True, 1.0), (False, 0.6)])
def test_b_sampler_log_probs_equal_those_of_the_loss(qk_norm, temperature, tolerance):
    net, params = model(TOKENIZER.vocab_size, qk_norm)
    protocol = protocol_of(
        TOKENIZER, threadweaver.ForkJoin(max_new=300, max_thread=24, max_threads=4)
    )
    scripted = [random_trajectory(seed, protocol) for seed in range(4)]
    calls = max(len(t.calls) for t in scripted)
    script = np.full((4, calls, 40), TOKENIZER.eos_ids[0], np.int32)
    for b, trajectory in enumerate(scripted):
        for n, call in enumerate(trajectory.calls):
            script[b, n, : len(call.sampled)] = call.sampled[:40]

    def half_given(logits, how, call, position):
        """Calls follow the script in form and the model in their words."""
        own, _ = samplers.draw(logits, how[0], call, position)
        row = jnp.arange(logits.shape[0])[:, None]
        given = how[1][row, jnp.minimum(call, calls - 1), jnp.minimum(position, 39)]
        is_word = given >= TOKENIZER.id_of("a")
        own_word = own >= TOKENIZER.id_of("a")
        tokens = jnp.where(is_word & own_word, own, given)
        logp = jax.nn.log_softmax(logits / how[0].temperature[:, None, None], axis=-1)
        return tokens, jnp.take_along_axis(logp, tokens[..., None], -1)[..., 0]

    cfg = samplers.Sampler(rows=4, max_prompt=16, prefill_chunk=16)
    sampler = samplers.make_sampler(net, protocol, cfg, draw=half_given)
    how = (settings(4, temperature=temperature, top_p=1.0, top_k=0, seed=2), jnp.asarray(script))
    prompts = [t.ids[: t.prompt_tokens] for t in scripted]
    made = sampler(params, prompts, how)
    assert sum(t.rounds for t in made) >= 4
    for trajectory in made:
        trie = tries.of_trajectory(trajectory)
        batch = stack_rows([[trie]], 1024)
        hidden, _ = net.apply(params, batch.tokens, batch.depth, batch.span)
        said = token_logp(
            net, params, hidden, batch=batch, chunk_tokens=256, temperature=temperature
        )
        want = sampled_log_probs(trajectory, np.asarray(said.logp)[0], trie)
        drawn = np.concatenate([call.logp for call in trajectory.calls])
        np.testing.assert_allclose(drawn, want, atol=tolerance["sampler_logp"], rtol=0)
