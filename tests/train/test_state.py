"""The optimiser against numpy by hand, the schedules against their formulas, shardings."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fakes import path_network
from jax.sharding import PartitionSpec
from train import stub

from tw_jax import sharding
from tw_jax.train.state import (
    Optim,
    abstract_state,
    create,
    decays,
    initial_state,
    jit_step,
    learning_rate,
    update,
)


@pytest.fixture(scope="module")
def network():
    return path_network(stub.VOCAB, stub.WIDTH)


def adamw_by_hand(params, gradients, optim, rates):
    """AdamW in float64, leaf by leaf, from its definition."""
    params = {name: np.array(p, np.float64) for name, p in params.items()}
    m = {name: np.zeros_like(p) for name, p in params.items()}
    v = {name: np.zeros_like(p) for name, p in params.items()}
    for t, (lr, gradient) in enumerate(zip(rates, gradients, strict=True), start=1):
        norm = math.sqrt(sum((np.float64(g) ** 2).sum() for g in gradient.values()))
        for name in params:
            g = np.float64(gradient[name]) * min(1, optim.clip_norm / norm)
            m[name] = optim.beta1 * m[name] + (1 - optim.beta1) * g
            v[name] = optim.beta2 * v[name] + (1 - optim.beta2) * g**2
            step = m[name] / (1 - optim.beta1**t)
            step /= np.sqrt(v[name] / (1 - optim.beta2**t)) + optim.epsilon
            if name == "kernel":
                step += optim.weight_decay * params[name]
            params[name] -= lr * step
    return params


@pytest.fixture
def three_leaves():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (4, 3), "norm_scale": (3,), "bias": (3,)}

    def draw(size):
        return {
            name: (size * rng.normal(size=shape)).astype(np.float32)
            for name, shape in shapes.items()
        }

    return draw(1), [draw(size) for size in (0.01, 3, 0.2, 10)]  # two are clipped, two are not


def test_steps_are_adamw_by_hand(three_leaves, close):
    params, gradients = three_leaves
    optim = Optim(peak_lr=0.1, weight_decay=0.3, warmup_steps=2, schedule="linear")
    steps = jax.jit(partial(update, optim=optim, steps=6))
    state = create(jax.tree.map(jnp.asarray, params), optim, key=jax.random.key(0))
    for index, gradient in enumerate(gradients):
        before = state.params
        state, metrics = steps(state, gradient)
        flat = np.concatenate([g.ravel() for g in gradient.values()])
        close("rounding", metrics["grad_norm"], np.linalg.norm(np.float64(flat)))
        flat = np.concatenate([np.ravel(p) for p in before.values()])
        close("rounding", metrics["param_norm"], np.linalg.norm(np.float64(flat)))
        assert int(state.step) == index + 1
        assert float(metrics["skipped"]) == 0
    want = adamw_by_hand(params, gradients, optim, rates=[0, 0.05, 0.1, 0.075])
    for name, leaf in want.items():
        close("module", state.params[name], leaf)


def test_without_a_clip_norm_gradients_are_taken_as_they_are(three_leaves, close):
    params, gradients = three_leaves
    optim = Optim(peak_lr=0.1, clip_norm=None, schedule="constant", warmup_steps=0)
    state = create(jax.tree.map(jnp.asarray, params), optim, key=jax.random.key(0))
    for gradient in gradients:
        state, _ = update(state, gradient, optim, steps=4)
    unbounded = Optim(peak_lr=0.1, clip_norm=1e9)
    want = adamw_by_hand(params, gradients, unbounded, rates=[0.1] * 4)
    close("module", state.params["kernel"], want["kernel"])


def test_weight_decay_spares_norms_and_biases_and_nothing_else():
    params = {
        "embed": 0,
        "blocks": {"q_norm": {"scale": 0}, "q": {"bias": 0, "kernel": 0}, "mlp": {"gate": 0}},
        "norm": {"scale": 0},
        "unembed": 0,
    }
    assert decays(params) == {
        "embed": True,
        "blocks": {
            "q_norm": {"scale": False},
            "q": {"bias": False, "kernel": True},
            "mlp": {"gate": True},
        },
        "norm": {"scale": False},
        "unembed": True,
    }


# Schedules.


def formula(step, optim, steps, warmup):
    if step < warmup:
        return optim.peak_lr * step / warmup
    left = 1 - min(1.0, (step - warmup) / (steps - warmup))
    share = {
        "constant": 1,
        "linear": left,
        "cosine": 0.5 * (1 + math.cos(math.pi * (1 - left))),
    }[optim.schedule]
    return optim.end_lr + (optim.peak_lr - optim.end_lr) * share


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("end_lr", [0.0, 2e-4])
def test_rates_follow_the_formula(schedule, end_lr, close):
    optim = Optim(peak_lr=1e-3, schedule=schedule, end_lr=end_lr, warmup_ratio=0.05)
    rates = jax.jit(jax.vmap(partial(learning_rate, optim=optim, steps=90)))(jnp.arange(100))
    want = [formula(step, optim, 90, warmup=5) for step in range(100)]  # 4.5 is rounded up
    close("rounding", rates, want)
    assert rates.dtype == jnp.float32


def test_the_named_points_of_the_reference_schedule(close):
    optim = Optim(peak_lr=1e-5)
    rate = partial(learning_rate, optim=optim, steps=100)
    assert float(rate(0)) == 0
    close("rounding", [rate(5), rate(5 + 95 / 2), rate(100)], [1e-5, 5e-6, 0.0], of=optim.peak_lr)


def test_a_schedule_with_its_own_length_does_not_depend_on_the_steps_of_the_run(close):
    for kind in ("cosine", "linear", "constant"):
        optim = Optim(peak_lr=1e-3, schedule=kind, end_lr=1e-4, decay_steps=90)
        last = 1e-3 if kind == "constant" else 1e-4
        for step in (0, 4, 5, 50, 89, 90, 150):
            want = formula(step, optim, 90, warmup=5) if step < 90 else last
            for steps in (60, 200):
                got = float(learning_rate(step, optim, steps=steps))
                close("rounding", got, want, of=optim.peak_lr)


def test_warmup_steps_go_before_the_ratio(close):
    optim = Optim(peak_lr=1.0, warmup_steps=50, warmup_ratio=0.9)
    close("rounding", learning_rate(25, optim, steps=100), 0.5)
    assert float(learning_rate(0, Optim(peak_lr=1.0, warmup_steps=0), steps=10)) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peak_lr", 0.0),
        ("end_lr", 2.0),
        ("warmup_ratio", 1.5),
        ("warmup_steps", -1),
        ("decay_steps", 0),
        ("weight_decay", -0.1),
        ("epsilon", 0.0),
        ("clip_norm", 0.0),
        ("beta1", 1.0),
        ("beta2", -0.1),
    ],
)
def test_what_adamw_cannot_run_with_is_refused(field, value):
    with pytest.raises(ValueError, match=rf"Optim\.{field} = {value} must"):
        Optim(**({"peak_lr": 1.0} | {field: value}))


# Skipping.


@pytest.mark.parametrize("poison", [np.inf, np.nan, 1e30])  # the square of 1e30 is infinite
def test_a_gradient_that_is_not_finite_changes_nothing_but_the_step(three_leaves, poison):
    params, gradients = three_leaves
    optim = Optim(peak_lr=0.1, warmup_steps=0, schedule="constant")
    state = create(jax.tree.map(jnp.asarray, params), optim, key=jax.random.key(0))
    first, _ = update(state, gradients[0], optim, steps=4)
    bad = {**gradients[1], "kernel": np.full((4, 3), poison, np.float32)}
    second, metrics = update(first, bad, optim, steps=4)
    assert float(metrics["skipped"]) == 1
    assert int(second.step) == 2
    for old, new in zip(
        jax.tree.leaves((first.params, first.opt_state)),
        jax.tree.leaves((second.params, second.opt_state)),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    third, metrics = update(second, gradients[2], optim, steps=4)
    assert float(metrics["skipped"]) == 0
    assert np.isfinite(third.params["kernel"]).all()


def test_a_gradient_of_zero_is_no_reason_to_skip(three_leaves):
    params, _ = three_leaves
    optim = Optim(peak_lr=0.1, weight_decay=0.0, warmup_steps=0)
    state = create(jax.tree.map(jnp.asarray, params), optim, key=jax.random.key(0))
    after, metrics = update(state, jax.tree.map(np.zeros_like, params), optim, steps=4)
    assert float(metrics["skipped"]) == 0
    np.testing.assert_array_equal(after.params["kernel"], params["kernel"])


# Dtypes and shardings.


def test_moments_are_float32_under_bfloat16_parameters():
    optim = Optim(peak_lr=1e-3, warmup_steps=0)
    params = {"kernel": jnp.ones((2, 3), jnp.bfloat16), "norm": jnp.ones(3, jnp.bfloat16)}
    state = create(params, optim, key=jax.random.key(1))
    gradients = jax.tree.map(lambda p: jnp.full(p.shape, 1e-3, jnp.float32), state.params)
    after, _ = update(state, gradients, optim, steps=4)
    for before_or_after in (state, after):
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(before_or_after.opt_state)}
        assert dtypes == {jnp.dtype("float32"), jnp.dtype("int32")}
        assert {leaf.dtype for leaf in jax.tree.leaves(before_or_after.params)} == {
            jnp.dtype("bfloat16")
        }


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(sharding.Mesh(data=2, fsdp=2, tensor=2))


def test_moments_lie_where_their_parameters_lie(network, mesh):
    state = abstract_state(network, Optim(peak_lr=1.0), mesh=mesh, rules=sharding.Rules())
    places = [(leaf.shape, leaf.sharding.spec) for leaf in jax.tree.leaves(state.params)]
    assert ((stub.VOCAB, stub.WIDTH), PartitionSpec(("tensor",), ("fsdp", "sequence"))) in places
    moments = [
        (leaf.shape, leaf.sharding.spec) for leaf in jax.tree.leaves(state.opt_state) if leaf.shape
    ]
    assert moments == places * 2
    assert state.key.sharding.is_fully_replicated
    assert state.step.sharding.is_fully_replicated


def test_a_state_is_born_as_its_abstract_says(network, mesh):
    optim, rules = Optim(peak_lr=1.0), sharding.Rules()
    abstract = abstract_state(network, optim, mesh=mesh, rules=rules)
    state = initial_state(network, optim, mesh=mesh, rules=rules, key=jax.random.key(3))

    def agree(want, got):
        assert (want.shape, want.dtype) == (got.shape, got.dtype)
        assert got.sharding.is_equivalent_to(want.sharding, got.ndim)

    jax.tree.map(agree, abstract, state)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)


def test_fresh_parameters_do_not_depend_on_the_mesh(network, mesh, close):
    optim, rules, key = Optim(peak_lr=1.0), sharding.Rules(), jax.random.key(3)
    alone = sharding.make_mesh(sharding.Mesh(), jax.devices()[:1])
    many = initial_state(network, optim, mesh=mesh, rules=rules, key=key)
    one = initial_state(network, optim, mesh=alone, rules=rules, key=key)
    np.testing.assert_array_equal(jax.random.key_data(many.key), jax.random.key_data(one.key))
    close("rounding", many.params, one.params)
    plain = initial_state(network, optim, key=key)
    close("rounding", plain.params, one.params)
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(plain)} == {1}


def test_pretrained_parameters_are_taken_and_given_up(network, mesh):
    optim, rules = Optim(peak_lr=1.0), sharding.Rules()
    abstract = abstract_state(network, optim, mesh=mesh, rules=rules)
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
    host = jax.tree.map(np.asarray, network.init(jax.random.key(7)))
    params = jax.device_put(host, where)
    state = initial_state(
        network, optim, mesh=mesh, rules=rules, key=jax.random.key(0), params=params
    )
    jax.tree.map(np.testing.assert_array_equal, state.params, host)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_a_step_outside_of_its_mesh_is_refused(network, mesh):
    optim, rules = Optim(peak_lr=1.0), sharding.Rules()
    abstract = abstract_state(network, optim, mesh=mesh, rules=rules)
    step = jit_step(lambda state, batch: (state, {}), abstract, mesh=mesh, rules=rules)
    batch = jax.ShapeDtypeStruct((8, 4), jnp.int32)
    with pytest.raises(ValueError, match="traced outside of its mesh"):
        step.lower(abstract, batch)
    with sharding.use(mesh, rules):
        step.lower(abstract, batch)
