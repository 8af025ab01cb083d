"""Log-probs through the parent pointer against plain sequences; memory; exact denominators."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import path_network
from train import stub

from tw_jax.contracts import Span
from tw_jax.train.loss import accumulate, token_logp, weighted_mean
from tw_jax.train.sft import nll_sums
from tw_jax.trie.batch import stack_rows
from tw_jax.trie.tree import flat_labels


@pytest.fixture(scope="module")
def network():
    return path_network(stub.VOCAB, stub.WIDTH)


@pytest.fixture(scope="module")
def params(network):
    return network.init(jax.random.key(0))


@pytest.fixture(scope="module")
def packed():
    """Five trajectories, two to a row with padding behind; the last row is one and padding."""
    groups, tries = stub.random_tries(seed=1, num_tries=5)
    calls = [call for calls in groups for call in calls]
    return calls, tries, stub.rows_of([tries[:2], tries[2:4], tries[4:]])


def said(network, params, batch, **kwargs):
    hidden, _ = network.apply(params, batch.tokens, batch.depth, batch.span)
    kwargs = {"chunk_tokens": 16} | kwargs
    return jax.jit(partial(token_logp, network, **kwargs))(params, hidden, batch=batch)


def ancestors(trie, node):
    chain = []
    while node >= 0:
        chain.append(node)
        node = trie.parent[node]
    return chain[::-1]


def sub_arrays(jaxpr):
    """The shapes of everything that a program computes, in all programs inside it."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in (*eqn.invars, *eqn.outvars) if hasattr(v.aval, "shape"))
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from sub_arrays(inner)


# Values.


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_a_node_is_scored_given_the_plain_sequence_of_its_ancestors(
    network, params, packed, temperature, close
):
    _, tries, batch = packed
    logp = said(network, params, batch, temperature=temperature, with_entropy=True)
    start = 0
    assert len(tries[0]) > 5
    for trie in tries[:2]:  # both tries of the first row, the second behind the first
        for node in np.flatnonzero(trie.parent >= 0):
            chain = ancestors(trie, node)
            want = stub.logp_after(params, trie.tokens[chain[:-1]], temperature)
            at = (0, start + node)
            close("module", logp.logp[at], want[trie.tokens[node]], of=1.0)
            assert logp.is_argmax[at] == (want.argmax() == trie.tokens[node])
            close("module", logp.entropy[at], -(np.exp(want) * want).sum(), of=1.0)
        start += len(trie)


def test_packed_loss_is_that_of_the_calls_one_by_one(network, params, packed, close):
    calls, _, batch = packed
    total, sums = jax.jit(partial(nll_sums, network, chunk_tokens=13))(params, batch)
    assert float(sums["weight"]) == sum(weight.sum() for _, weight in calls)
    close("equality_loss", total, stub.nll(params, calls))


def test_packed_gradients_are_those_of_the_calls_one_by_one(network, params, packed, close):
    calls, _, batch = packed
    got = jax.jit(jax.grad(lambda p: nll_sums(network, p, batch, chunk_tokens=13)[0]))(params)

    length = max(len(tokens) for tokens, _ in calls)
    tokens, weight = (
        np.stack([np.pad(part, (0, length - len(part))) for part in parts])
        for parts in zip(*calls, strict=True)
    )
    depth = np.broadcast_to(np.arange(length), tokens.shape)
    causal = Span(enter=depth, exit=np.full_like(depth, length))

    @jax.jit
    def direct(p):  # no trie, no parent: each call in its own row, shifted by one
        hidden, _ = network.apply(p, tokens, depth, causal)
        logp = jax.nn.log_softmax(network.unembed(p, hidden[:, :-1]))
        return -(weight[:, 1:] * jnp.take_along_axis(logp, tokens[:, 1:, None], 2)[..., 0]).sum()

    jax.tree.map(
        lambda mine, want: close.norm("equality_gradient", mine, want),
        got,
        jax.grad(direct)(params),
    )


def test_the_gradient_is_the_slope_of_the_plain_loss(network, params, packed, close):
    """Along a random direction, against central differences of the float64 oracle."""
    calls, _, batch = packed
    rng = np.random.default_rng(0)
    line = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
    slope = jax.jit(jax.grad(lambda p: nll_sums(network, p, batch, chunk_tokens=70)[0]))(params)
    got = sum(np.vdot(g, d) for g, d in zip(*map(jax.tree.leaves, (slope, line)), strict=True))

    def oracle(step):
        moved = jax.tree.map(lambda p, d: np.asarray(p, np.float64) + step * d, params, line)
        return stub.nll(moved, calls)

    # Along a random line, slopes of both signs add up to about the norm of the gradient.
    size = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(slope)))
    close("module", got, (oracle(1e-6) - oracle(-1e-6)) / 2e-6, of=size)


def test_flat_labels_are_another_parent_and_weight(network, params, close):
    """The reference's shift: node i is read at node i - 1, whatever their places in the trie."""
    _, (trie,) = stub.random_tries(seed=3, num_tries=1)
    prompt = 2
    batch = stub.rows_of([[flat_labels(trie, prompt)]])
    summed = jax.jit(partial(nll_sums, network, chunk_tokens=8))
    total, sums = summed(params, batch)
    want = 0.0
    for node in range(prompt, len(trie)):
        before = trie.tokens[ancestors(trie, node - 1)]
        want -= stub.logp_after(params, before)[trie.tokens[node]]
    assert float(sums["tokens"]) == len(trie) - prompt
    close("equality_loss", total, want)
    along_edges, _ = summed(params, stub.rows_of([[trie]]))
    assert abs(float(total) - float(along_edges)) > 0.1


@pytest.mark.parametrize("chunk_tokens", [1, 7, 35, 69, 70, 1000])
def test_the_size_of_a_chunk_changes_nothing(network, params, packed, chunk_tokens, close):
    batch = packed[-1]
    one = said(network, params, batch, chunk_tokens=70, with_entropy=True)
    many = said(network, params, batch, chunk_tokens=chunk_tokens, with_entropy=True)
    # Both are differences of numbers of some nats, and may be near zero.
    close("module", many.logp, one.logp, of=1.0)
    close("module", many.entropy, one.entropy, of=1.0)
    np.testing.assert_array_equal(many.is_argmax, one.is_argmax)


def test_log_probs_are_float32_whatever_the_network_says(network, params, packed):
    low = network._replace(unembed=lambda p, h: (h @ p["out"]).astype(jnp.bfloat16))
    got = said(low, params, packed[-1], with_entropy=True)
    assert got.logp.dtype == got.entropy.dtype == jnp.float32


def test_gradients_of_a_bfloat16_table_add_up_over_chunks_in_float32(
    network, params, packed, close
):
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)

    def slope(chunk_tokens):
        total = partial(nll_sums, network, batch=packed[-1], chunk_tokens=chunk_tokens)
        gradient = jax.jit(jax.grad(lambda p: total(p)[0]))(low)["out"]
        assert gradient.dtype == jnp.bfloat16
        return np.asarray(gradient, np.float32)

    # Added up in bfloat16, the difference is about 1e-2.
    close.norm("bf16_sums", slope(1), slope(1000))


def test_a_chunk_of_no_tokens_is_refused(network, params, packed):
    with pytest.raises(ValueError, match="chunk_tokens = 0 must be at least 1"):
        said(network, params, packed[-1], chunk_tokens=0)


# Memory.


@pytest.mark.parametrize("with_entropy", [False, True])
def test_no_array_of_all_logits_exists_forward_or_backward(with_entropy):
    rows, length, vocab, chunk = 2, 64, 1000, 8
    network = path_network(vocab, stub.WIDTH)
    params = jax.eval_shape(network.init, jax.random.key(0))
    batch = stack_rows([[]] * rows, length)

    def loss(params):
        hidden, _ = network.apply(params, batch.tokens, batch.depth, batch.span)
        got = token_logp(
            network,
            params,
            hidden,
            batch=batch,
            chunk_tokens=chunk,
            with_entropy=with_entropy,
        )
        return got.logp.sum() + (got.entropy.sum() if with_entropy else 0)

    shapes = set(sub_arrays(jax.make_jaxpr(jax.value_and_grad(loss))(params).jaxpr))
    with_vocab = {shape for shape in shapes if vocab in shape}
    tables = {(vocab, stub.WIDTH), (stub.WIDTH, vocab)}
    assert (rows * chunk, vocab) in with_vocab, "the walk must see the chunks, or it sees nothing"
    assert max(np.prod(shape) for shape in with_vocab - tables) <= rows * chunk * vocab
    assert max(np.prod(shape) for shape in shapes) < rows * length * vocab


# Sums and means.


def test_a_mean_without_weight_is_zero_and_so_is_its_gradient():
    mean, slope = jax.value_and_grad(
        lambda total: weighted_mean(total, denominator=jnp.float32(0)).sum()
    )(jnp.ones(3))
    assert float(mean) == 0
    np.testing.assert_array_equal(slope, 0)


@pytest.fixture(scope="module")
def uneven():
    """Six rows of very different weight, one of none at all."""
    _, tries = stub.random_tries(seed=5, num_tries=9)
    return stub.rows_of([tries[:2], tries[2:3], tries[3:5], [], tries[5:6], tries[6:]])


@pytest.fixture(scope="module")
def whole(network, params, uneven):
    total = partial(nll_sums, network, chunk_tokens=100)
    return jax.jit(jax.value_and_grad(total, has_aux=True))(params, uneven)


@pytest.mark.parametrize("accumulation_steps", [1, 3, 6])
def test_accumulated_sums_and_gradients_are_those_of_the_whole_batch(
    network, params, uneven, whole, accumulation_steps, close
):
    total = partial(nll_sums, network, chunk_tokens=100)
    summed = partial(accumulate, total, accumulation_steps=accumulation_steps, axes=network.axes())
    got, loss, sums = jax.jit(summed)(params, uneven)
    (want_loss, want_sums), want = whole
    close("rounding", loss, want_loss)
    assert {k: float(v) for k, v in sums.items()} == {k: float(v) for k, v in want_sums.items()}
    for mine, leaf in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        close.norm("module", mine, leaf)


def test_extremes_are_combined_over_parts_and_all_else_adds_up():
    batch = np.array([3.0, -1, 5, 2], np.float32)

    def objective(params, part):
        sums = {"most": part.max(), "least": part.min(), "n": jnp.float32(part.size)}
        return params["x"] * part.sum(), sums

    summed = accumulate(
        objective,
        {"x": jnp.ones(())},
        batch,
        accumulation_steps=2,
        axes={"x": ()},
        extremes={"most": (jnp.maximum, -jnp.inf), "least": (jnp.minimum, jnp.inf)},
    )
    assert {k: float(v) for k, v in summed[2].items()} == {"most": 5, "least": -1, "n": 4}
    assert float(summed[1]) == float(summed[0]["x"]) == 9


def test_gradients_of_bfloat16_parameters_add_up_in_float32():
    params = {"x": jnp.ones((), jnp.bfloat16)}
    batch = np.array([1, 2**-9, 2**-9, 2**-9], np.float32)  # in bfloat16, 1 + 2^-9 is 1

    def objective(params, part):
        return (params["x"].astype(jnp.float32) * part).sum(), {}

    gradient, _, _ = accumulate(objective, params, batch, accumulation_steps=4, axes={"x": ()})
    assert gradient["x"].dtype == jnp.float32
    assert float(gradient["x"]) == 1 + 3 * 2**-9


@pytest.mark.parametrize("accumulation_steps", [0, 4])
def test_parts_that_do_not_divide_the_rows_are_refused(accumulation_steps):
    with pytest.raises(ValueError, match="does not divide the batch's 6 rows"):
        accumulate(
            lambda p, b: (b.sum(), {}),
            {},
            np.ones((6, 2)),
            accumulation_steps=accumulation_steps,
            axes={},
        )
