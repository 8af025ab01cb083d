"""The step: one mean whatever the parts and the mesh, baselines as other batches, donation."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import path_network
from train import stub

from tw_jax import sharding
from tw_jax.train.sft import make_sft_step
from tw_jax.train.state import Optim, abstract_state, create, jit_step
from tw_jax.trie.batch import stack_rows
from tw_jax.trie.tree import build

OPTIM = Optim(peak_lr=5e-2, warmup_steps=0)
ROWS, TOKENS = 16, 64


@pytest.fixture(scope="module")
def network():
    return path_network(stub.VOCAB, stub.WIDTH)


@pytest.fixture(scope="module")
def batches():
    """Tries of random sizes, and one row without any: every device has another weight."""
    return [rows_of(stub.random_tries(seed=seed, num_tries=ROWS - 1)[1]) for seed in (1, 2)]


def rows_of(tries):
    """A batch of the one shape that is compiled for: a trie to a row, empty rows behind."""
    return stack_rows([*([trie] for trie in tries), *[[]] * (ROWS - len(tries))], TOKENS)


def fresh(network):
    return create(network.init(jax.random.key(0)), OPTIM, key=jax.random.key(1))


@pytest.fixture(scope="module")
def step(network):
    return jax.jit(make_sft_step(network, OPTIM, steps=60, chunk_tokens=16))


@pytest.fixture(scope="module")
def alone(network, step, batches):
    """State and metrics after two steps, in one piece on one device."""
    state, metrics = fresh(network), {}
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def test_the_loss_is_the_mean_over_all_calls_of_the_batch(network, close):
    groups, tries = stub.random_tries(seed=1, num_tries=3)
    batch = rows_of(tries)
    state = fresh(network)
    step = jax.jit(make_sft_step(network, OPTIM, steps=60, chunk_tokens=16, accumulation_steps=2))
    _, metrics = step(state, batch)
    calls = [call for calls in groups for call in calls]
    weight = sum(weight.sum() for _, weight in calls)
    want = stub.nll(state.params, calls) / weight
    close("equality_loss", metrics["loss"], want)
    assert float(metrics["weight"]) == weight


def test_metrics_are_float32_scalars(alone):
    _, metrics = alone
    assert set(metrics) == {
        *("loss", "accuracy", "tokens", "weight"),
        *("grad_norm", "param_norm", "lr", "skipped"),
    }
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())


def test_accuracy_is_the_share_of_trained_nodes_that_are_likeliest(network, step, batches, close):
    state = fresh(network)
    batch = batches[0]
    _, metrics = step(state, batch)
    hidden, _ = network.apply(state.params, batch.tokens, batch.depth, batch.span)
    guess = np.asarray(network.unembed(state.params, hidden)).argmax(-1)
    hits = np.take_along_axis(guess, batch.parent, axis=1) == batch.tokens
    trained = batch.weight > 0
    assert float(metrics["tokens"]) == trained.sum()
    close("rounding", metrics["accuracy"], hits[trained].mean())


def test_a_chain_is_the_sequential_baseline(network, step, close):
    """On tries without a branch the step is ordinary next-token training, shifted by one."""
    rng = np.random.default_rng(4)
    texts = [rng.integers(0, stub.VOCAB, n).astype(np.int32) for n in (9, 14, 5)]
    weights = [(np.arange(len(t)) >= 3).astype(np.float32) for t in texts]
    tries = [build([t], [w]) for t, w in zip(texts, weights, strict=True)]
    batch = rows_of(tries)
    state = fresh(network)
    _, metrics = step(state, batch)
    nll = [-stub.logp_after(state.params, t[:i])[t[i]] for t in texts for i in range(3, len(t))]
    close("equality_loss", metrics["loss"], np.mean(nll))
    assert float(metrics["tokens"]) == len(nll)


def test_a_batch_without_weight_has_loss_zero_and_only_decays(network, step, batches, close):
    batch = batches[0].replace(weight=np.zeros((ROWS, TOKENS), np.float32))
    state = fresh(network)
    after, metrics = step(state, batch)
    assert (float(metrics["loss"]), float(metrics["accuracy"])) == (0, 0)
    assert (float(metrics["grad_norm"]), float(metrics["skipped"])) == (0, 0)
    shrunk = 1 - OPTIM.peak_lr * OPTIM.weight_decay
    want = shrunk * np.asarray(state.params["out"], np.float64)
    close("rounding", after.params["out"], want, of=want)


def test_training_learns_a_batch_by_heart(network, step, batches):
    state, losses = fresh(network), []
    for _ in range(60):
        state, metrics = step(state, batches[0])
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.3 * losses[0]


def test_the_same_step_twice_is_bit_equal(network, step, batches, alone):
    state = fresh(network)
    for batch in batches:
        state, metrics = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, state.params, alone[0].params)
    assert float(metrics["loss"]) == float(alone[1]["loss"])


# On a mesh.


@pytest.mark.parametrize(
    ("sizes", "accumulation_steps"),
    [
        ((8, 1, 1), 1),
        ((8, 1, 1), 2),
        ((2, 2, 2), 2),
        ((1, 4, 2), 4),
        ((1, 8, 1), 1),
        ((4, 1, 2), 1),
    ],
)
def test_a_step_on_a_mesh_is_the_step_on_one_device(
    network, batches, alone, sizes, accumulation_steps, close
):
    data, fsdp, tensor = sizes
    mesh = sharding.make_mesh(sharding.Mesh(data=data, fsdp=fsdp, tensor=tensor))
    rules = sharding.Rules()
    abstract = abstract_state(network, OPTIM, mesh=mesh, rules=rules)
    step = make_sft_step(
        network, OPTIM, steps=60, chunk_tokens=16, accumulation_steps=accumulation_steps
    )
    with sharding.use(mesh, rules):
        compiled = jit_step(step, abstract, mesh=mesh, rules=rules)
        state = jax.device_put(fresh(network), jax.tree.map(lambda leaf: leaf.sharding, abstract))
        metrics = {}
        for batch in batches:
            given = state
            state, metrics = compiled(given, sharding.to_global(batch, mesh, rules))
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given.params))
    want, want_metrics = alone
    close.norm("sharded", state.params, want.params)
    close.norm("sharded", state.opt_state, want.opt_state)
    for name, value in want_metrics.items():
        close("sharded", metrics[name], value, what=name)
    jax.tree.map(
        lambda leaf, want: leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim) or 1 / 0,
        state,
        abstract,
    )


def program_text(network, batch, sizes, accumulation_steps):
    """The compiled step for a mesh."""
    mesh, rules = sharding.make_mesh(sharding.Mesh(**sizes)), sharding.Rules()
    abstract = abstract_state(network, OPTIM, mesh=mesh, rules=rules)
    step = make_sft_step(
        network, OPTIM, steps=60, chunk_tokens=16, accumulation_steps=accumulation_steps
    )
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    with sharding.use(mesh, rules):
        program = jit_step(step, abstract, mesh=mesh, rules=rules).lower(abstract, shapes)
    return program.compile().as_text()


COLLECTIVE = re.compile(r" (all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter)\(")


def test_data_parallel_devices_exchange_sums_and_no_tokens(network, batches):
    """Neither the read at the parent nor the split into parts moves a row off its device."""
    text = program_text(network, batches[0], {"data": 8, "fsdp": 1}, accumulation_steps=2)
    assert set(COLLECTIVE.findall(text)) == {"all-reduce"}


def test_devices_exchange_gradients_once_and_not_in_every_chunk(network, batches):
    text = program_text(network, batches[0], {"fsdp": 8}, accumulation_steps=1)
    assert "while(" in text  # the chunks
    loops, main = text.split("\nENTRY ")
    assert COLLECTIVE.findall(loops) == []
    assert COLLECTIVE.findall(main) != []


def test_a_bfloat16_model_trains_on_a_mesh(network, batches):
    low = network._replace(
        init=lambda key: jax.tree.map(lambda p: p.astype(jnp.bfloat16), network.init(key)),
        unembed=lambda params, hidden: network.unembed(params, hidden).astype(jnp.float32),
    )
    mesh, rules = sharding.make_mesh(sharding.Mesh(data=2, fsdp=2, tensor=2)), sharding.Rules()
    abstract = abstract_state(low, OPTIM, mesh=mesh, rules=rules)
    step = make_sft_step(low, OPTIM, steps=60, chunk_tokens=16)
    state = jax.device_put(fresh(low), jax.tree.map(lambda leaf: leaf.sharding, abstract))
    with sharding.use(mesh, rules):
        compiled = jit_step(step, abstract, mesh=mesh, rules=rules)
        state, metrics = compiled(state, sharding.to_global(batches[0], mesh, rules))
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert np.isfinite(float(metrics["loss"]))
    assert float(metrics["skipped"]) == 0
