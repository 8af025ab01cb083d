"""Muon against singular value decompositions, on the real model's leaves and on a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tw_jax import sharding
from tw_jax.models.transformer import network
from tw_jax.train.state import Optim, abstract_state, create, initial_state, update

MODEL = tiny.model(vocab_size=32, width=16, mlp_width=24, head_width=4, attention="auto")
MATRICES = {
    ("attention", "q"): (16, 16),
    ("attention", "k"): (16, 8),
    ("attention", "v"): (16, 8),
    ("attention", "out"): (16, 16),
    ("mlp", "gate"): (16, 24),
    ("mlp", "up"): (16, 24),
    ("mlp", "down"): (24, 16),
}
MUON = Optim(
    algorithm="muon",
    peak_lr=1.0,
    schedule="constant",
    warmup_steps=0,
    weight_decay=0.0,
    clip_norm=None,
    beta1=0.8,
)


def gradients_of(params, count):
    rng = np.random.default_rng(0)
    return [
        jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def two_steps():
    """The move of the second step, and the two gradients."""
    params = network(MODEL).init(jax.random.key(0))
    gradients = gradients_of(params, 2)
    state, _ = update(create(params, MUON, key=jax.random.key(1)), gradients[0], MUON, steps=9)
    after, _ = update(state, gradients[1], MUON, steps=9)
    return jax.tree.map(lambda a, b: np.asarray(a - b), state.params, after.params), gradients


@pytest.mark.parametrize("name", MATRICES)
def test_a_matrix_moves_along_the_singular_vectors_of_its_nesterov_momentum(two_steps, name, close):
    moved, (first, second) = two_steps
    moved, first, second = (tree["blocks"][name[0]][name[1]] for tree in (moved, first, second))
    beta, shape = MUON.beta1, MATRICES[name]
    momentum = (beta * (1 - beta) * first + (1 - beta) * second) / (1 - beta**3)
    ahead = beta * momentum + (1 - beta) * second / (1 - beta**2)
    for layer in range(MODEL.num_layers):
        u, _, v = np.linalg.svd(ahead[layer], full_matrices=False)
        inside = u.T @ moved[layer] @ v.T / (0.2 * np.sqrt(max(shape)))
        values = np.diag(inside)
        close("module", inside, np.diag(values), of=1.0)
        # Newton-Schulz with the usual coefficients ends between 0.68 and 1.14; small values lower.
        assert values.max() < 1.2
        assert np.median(values) > 0.68


def test_embeddings_and_norms_move_as_under_adamw(two_steps, close):
    moved, gradients = two_steps
    adamw = Optim(**(vars(MUON) | {"algorithm": "adamw"}))
    state = create(network(MODEL).init(jax.random.key(0)), adamw, key=jax.random.key(1))
    for gradient in gradients:
        before, (state, _) = state.params, update(state, gradient, adamw, steps=9)
    want = jax.tree.map(lambda a, b: np.asarray(a - b), before, state.params)
    for path in (("embed",), ("unembed",), ("norm", "scale"), ("blocks", "mlp_norm", "scale")):
        leaf, other = moved, want
        for key in path:
            leaf, other = leaf[key], other[key]
        close("rounding", leaf, other)
    assert not np.allclose(moved["blocks"]["mlp"]["up"], want["blocks"]["mlp"]["up"], atol=0.1)


def test_decay_under_muon_spares_what_it_spares_under_adamw(close):
    params = jax.tree.map(jnp.ones_like, network(MODEL).init(jax.random.key(0)))
    optim = Optim(**(vars(MUON) | {"weight_decay": 0.1}))
    state = create(params, optim, key=jax.random.key(1))
    after, _ = update(state, jax.tree.map(np.zeros_like, params), optim, steps=9)
    close("rounding", after.params["blocks"]["attention"]["q"], 0.9)
    close("rounding", after.params["embed"], 0.9)
    close("rounding", after.params["blocks"]["attention_norm"]["scale"], 1.0)


def test_a_step_of_muon_is_the_same_on_a_mesh(close):
    """Also: its momentum lies where its matrices lie, and nowhere for what AdamW moves."""
    net, rules = network(MODEL), sharding.Rules()
    after = []
    for mesh in (
        sharding.make_mesh(sharding.Mesh(), jax.devices()[:1]),
        sharding.make_mesh(sharding.Mesh(data=2, fsdp=2, tensor=2)),
    ):
        abstract = abstract_state(net, MUON, mesh=mesh, rules=rules)
        state = initial_state(net, MUON, mesh=mesh, rules=rules, key=jax.random.key(2))
        assert jax.tree.structure(abstract) == jax.tree.structure(state)
        places = {leaf.sharding.spec for leaf in jax.tree.leaves(abstract.params["blocks"]["mlp"])}
        moments = jax.tree.leaves(abstract.opt_state)
        assert places <= {leaf.sharding.spec for leaf in moments}
        where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        with sharding.use(mesh, rules):
            step = jax.jit(lambda s, g: update(s, g, MUON, steps=9)[0], out_shardings=where)
            after.append(jax.device_get(step(state, gradients_of(state.params, 1)[0]).params))
    close("gradient", *after)
