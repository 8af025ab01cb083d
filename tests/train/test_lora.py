"""Training with adapters: what moves, by which gradient, and what is never computed nor kept."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from optax.contrib import MuonDimensionNumbers
from trajectories import TOKENIZER, rollouts

from tw_jax import sharding
from tw_jax.forkjoin.tries import group_tries
from tw_jax.models.hf import add_rows
from tw_jax.models.lora import Lora, overlay, trained, without_adapters
from tw_jax.models.transformer import network
from tw_jax.train import pgrpo, sft
from tw_jax.train.groups import Aggregation, Scored, pack_groups
from tw_jax.train.loss import accumulate
from tw_jax.train.state import (
    Optim,
    abstract_state,
    create,
    initial_state,
    jit_step,
    matrices,
    update,
)
from tw_jax.trie.batch import stack_rows
from tw_jax.trie.pack import Packing, PackingStats
from tw_jax.trie.tree import build

BASE = tiny.model(vocab_size=-(-TOKENIZER.vocab_size // 8) * 8, mlp_width=56, head_width=10)
RANK = 4
IDS = (TOKENIZER.id_of("<Thread>"), TOKENIZER.id_of("a"), TOKENIZER.id_of("</Thread>"))
MODEL = dataclasses.replace(BASE, lora=Lora(rank=RANK, alpha=2.0, token_rows=IDS))
OPTIM = Optim(peak_lr=1e-2, warmup_steps=0, schedule="constant")
POLICY = pgrpo.PolicyLoss(entropy_coef=0.1)
CHUNK = 64


def objectives(net):
    """The two losses, as functions of parameters and a `PolicyBatch`."""
    return {
        "sft": lambda p, batch: sft.nll_sums(net, p, batch.trie, chunk_tokens=CHUNK),
        "pgrpo": lambda p, batch: pgrpo.loss_sums(
            net, p, batch, POLICY, chunk_tokens=CHUNK, temperature=0.9
        ),
    }


def steps(net, optim=OPTIM, rows=2):
    """The two steps, of a `PolicyBatch` both."""
    one = sft.make_sft_step(net, optim, steps=9, chunk_tokens=CHUNK)
    other = pgrpo.make_pgrpo_step(
        net, optim, POLICY, steps=9, chunk_tokens=CHUNK, temperature=0.9, microbatch_rows=rows,
        inner_steps=2,
    )  # fmt: skip
    return {"sft": lambda state, batch: one(state, batch.trie), "pgrpo": other}


@pytest.fixture(scope="module")
def batch():
    """Groups of random rollouts in four rows, the second half of them for another inner step."""
    rng = np.random.default_rng(0)
    updates = [
        [
            Scored(
                group_tries(rollouts(seed=seed, count=2, longest=4, blocks=1))[0],
                rng.normal(size=2).astype(np.float32),
            )
            for seed in seeds
        ]
        for seeds in ((0, 1), (2, 3))
    ]
    packing = Packing(row_tokens=256)
    made = pack_groups(
        updates, Aggregation(mean="token"), packing=packing, microbatch_rows=2, stats=PackingStats()
    )
    assert made.advantage.shape == (4, 256)
    return made


@pytest.fixture(scope="module")
def params():
    """Parameters whose adapters have moved: neither side is zero."""
    fresh = network(MODEL).init(jax.random.key(0))
    rng = np.random.default_rng(1)
    some = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape) / 3), trained(fresh))
    return overlay(fresh, some)


def weights_with_adapters(params):
    """(module, name, weight, adapter) of each adapted weight."""
    for module, inside in params["blocks"].items():
        for name, adapter in inside.items():
            if name.endswith("_lora"):
                plain = name.removesuffix("_lora")
                yield module, plain, inside[plain], adapter


def sides(adapter):
    """[L, K, r] and [L, r, M], float64."""
    return (np.asarray(adapter[side], np.float64) for side in "ab")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("which", ["sft", "pgrpo"])
def test_gradients_are_those_of_the_merged_model_by_the_chain_rule(
    which, tied, batch, params, close
) -> None:
    """With dW of the model without adapters, dA = s dW B^T, dB = s A^T dW, and of rows dW."""
    base, model = (dataclasses.replace(m, tie_embeddings=tied) for m in (BASE, MODEL))
    if tied:
        params = {k: v for k, v in params.items() if not k.startswith("unembed")}
    scale, plain = MODEL.lora.scale, without_adapters(params)
    tables = [name for name in ("embed", "unembed") if name in params]
    for name in tables:
        rows = np.asarray(params[f"{name}_lora"])
        plain[name] = np.array(params[name])
        plain[name][list(IDS)] += rows
    for module, name, weight, adapter in weights_with_adapters(params):
        a, b = sides(adapter)
        full = np.asarray(weight, np.float64) + scale * a @ b
        plain = overlay(plain, {"blocks": {module: {name: np.float32(full)}}})
    of_weights = jax.jit(jax.grad(objectives(network(base))[which], has_aux=True))(plain, batch)[0]
    net = network(model)
    got = jax.jit(
        lambda p, batch: accumulate(
            objectives(net)[which], p, batch, accumulation_steps=2, axes=net.axes(),
            extremes=pgrpo.EXTREMES if which == "pgrpo" else None,
        )[0]
    )(params, batch)  # fmt: skip
    want = trained(params)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for module, name, _, adapter in weights_with_adapters(params):
        a, b = sides(adapter)
        d = np.asarray(of_weights["blocks"][module][name], np.float64)
        right = {"a": scale * d @ b.swapaxes(1, 2), "b": scale * a.swapaxes(1, 2) @ d}
        for side, oracle in right.items():
            mine = got["blocks"][module][f"{name}_lora"][side]
            close.norm("gradient", mine, oracle, what=f"{module}.{name}.{side}")
    for name in tables:
        close.norm("gradient", got[f"{name}_lora"], of_weights[name][np.array(IDS)], what=name)


def test_only_adapters_move_and_the_rest_stays_bit_by_bit(batch) -> None:
    net = network(MODEL)
    for which, step in steps(net).items():
        first = create(net.init(jax.random.key(0)), OPTIM, key=jax.random.key(1))
        step, state = jax.jit(step), first
        for _ in range(2):
            state, metrics = step(state, batch)
        before, after = (without_adapters(s.params) for s in (first, state))
        jax.tree.map(np.testing.assert_array_equal, before, after)
        for old, new in zip(
            *(jax.tree.leaves(trained(s.params)) for s in (first, state)), strict=True
        ):
            assert (np.asarray(old) != np.asarray(new)).any(), which
        assert float(metrics["grad_norm"]) > 0
        assert float(metrics["skipped"]) == 0
        size = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(trained(state.params))))
        assert float(metrics["param_norm"]) == pytest.approx(size, rel=0.5)


def test_there_are_moments_of_adapters_alone() -> None:
    for algorithm in ("adamw", "muon"):
        optim = dataclasses.replace(OPTIM, algorithm=algorithm)
        state = jax.eval_shape(
            lambda key, optim=optim: create(network(MODEL).init(key), optim, key=key),
            jax.random.key(0),
        )
        moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
        own = [leaf.shape for leaf in jax.tree.leaves(trained(state.params))]
        # Muon keeps one moment of a layer's matrix; AdamW, which updates rows of tokens, two.
        once = [shape for shape in own if algorithm == "muon" and len(shape) == 3]
        assert sorted([leaf.shape for leaf in moments] + once) == sorted(own * 2)
        assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}


def made_in(jaxpr):
    """Shape and dtype of whatever an equation of a program makes, those of inner programs too."""
    for equation in jaxpr.eqns:
        yield from ((v.aval.shape, v.aval.dtype, equation.primitive) for v in equation.outvars)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from made_in(inner)


def products(step, state, batch):
    """Shapes of all matrix products in a step, and of all float32 arrays that it makes."""
    made = list(made_in(jax.make_jaxpr(step)(state, batch).jaxpr))
    return (
        {shape for shape, _, primitive in made if primitive.name == "dot_general"},
        {shape for shape, dtype, primitive in made if dtype == jnp.float32},
    )


@pytest.mark.parametrize("which", ["sft", "pgrpo"])
def test_no_gradient_of_a_frozen_weight_is_computed_nor_is_one_copied_to_float32(
    which, batch
) -> None:
    found = {}
    for model in (BASE, MODEL):
        low = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16", "remat": "full"}
        net = network(dataclasses.replace(model, **low))
        state = jax.eval_shape(lambda key, net=net: create(net.init(key), OPTIM, key=key),
                               jax.random.key(0))  # fmt: skip
        found[model] = products(steps(net)[which], state, batch)
    heads, kv = BASE.num_heads * BASE.head_width, BASE.num_kv_heads * BASE.head_width
    wide, deep, vocab = BASE.width, BASE.mlp_width, BASE.vocab_size
    gradients = {(wide, heads), (wide, kv), (heads, wide), (wide, deep), (deep, wide)}
    gradients |= {(vocab, wide)}
    assert found[BASE][0] >= gradients
    assert not found[MODEL][0] & gradients
    shapes = jax.eval_shape(network(BASE).init, jax.random.key(0))
    copies = {leaf.shape for leaf in jax.tree.leaves(shapes) if leaf.ndim > 2} | {(vocab, wide)}
    assert found[BASE][1] >= copies
    assert not found[MODEL][1] & copies


def test_a_step_on_a_mesh_is_the_step_on_one_device(batch, close) -> None:
    """The frozen weights are bfloat16: they are gathered and split as they are."""
    net = network(dataclasses.replace(MODEL, param_dtype="bfloat16", head_width=8))
    rules = sharding.Rules()
    rows = jax.tree.map(lambda x: np.concatenate([x, x]), batch.trie)
    step = sft.make_sft_step(net, OPTIM, steps=9, chunk_tokens=CHUNK, accumulation_steps=2)
    after = []
    for mesh in (
        sharding.make_mesh(sharding.Mesh(), jax.devices()[:1]),
        sharding.make_mesh(sharding.Mesh(data=2, fsdp=2, tensor=2)),
    ):
        abstract = abstract_state(net, OPTIM, mesh=mesh, rules=rules)
        state = initial_state(net, OPTIM, mesh=mesh, rules=rules, key=jax.random.key(0))
        with sharding.use(mesh, rules):
            compiled = jit_step(step, abstract, mesh=mesh, rules=rules)
            for _ in range(2):
                state, metrics = compiled(state, sharding.to_global(rows, mesh, rules))
        after.append(jax.device_get((trained(state.params), metrics)))
        q = abstract.params["blocks"]["attention"]
        assert q["q_lora"]["a"].sharding.spec[1] == q["q"].sharding.spec[1]
        assert q["q_lora"]["b"].sharding.spec[2] == q["q"].sharding.spec[2]
        head = abstract.params["unembed_lora"]
        assert head.sharding.spec[1] == abstract.params["unembed"].sharding.spec[1]
    (one, said), (many, told) = after
    close.norm("sharded", many, one)
    close("sharded", told["loss"], said["loss"])


def test_parameters_without_adapters_get_fresh_ones_and_those_with_keep_theirs(
    params, close
) -> None:
    net, rules = network(MODEL), sharding.Rules()
    alone = sharding.make_mesh(sharding.Mesh(), jax.devices()[:1])
    many = sharding.make_mesh(sharding.Mesh(data=2, fsdp=2, tensor=2), jax.devices())
    host = jax.device_get(params)

    def begun(given, mesh):
        where = abstract_state(net, OPTIM, mesh=mesh, rules=rules).params
        where = jax.tree.map(lambda leaf: leaf.sharding, where)
        if given is not host:
            where = without_adapters(where)
        return jax.device_get(
            initial_state(
                net, OPTIM, mesh=mesh, rules=rules, key=jax.random.key(5),
                params=jax.device_put(given, where),
            ).params
        )  # fmt: skip

    jax.tree.map(np.testing.assert_array_equal, begun(host, alone), host)
    one, other = (begun(without_adapters(host), mesh) for mesh in (alone, many))
    jax.tree.map(np.testing.assert_array_equal, without_adapters(one), without_adapters(host))
    close.norm("rounding", other, one)
    for _, _, _, adapter in weights_with_adapters(one):
        assert np.asarray(adapter["a"]).any()
        assert not np.asarray(adapter["b"]).any()
    assert not np.asarray(one["embed_lora"]).any()


def test_muon_reads_both_sides_of_an_adapter_as_matrices(params) -> None:
    read = matrices(trained(params))
    for module, name, _, _ in weights_with_adapters(params):
        for side in read["blocks"][module][f"{name}_lora"].values():
            assert side == MuonDimensionNumbers(reduction_axis=1, output_axis=2)


# What rows are for.


def learnt(token_rows: tuple[int, ...]) -> np.ndarray:
    """The probabilities of two new tokens after 60 steps on one sentence that needs both, [2]."""
    opened, closed = 30, 31
    sentence = np.array([1, opened, 2, closed, 3], np.int32)
    small = dataclasses.replace(BASE, vocab_size=30, num_layers=1)
    base, grown = add_rows(
        network(small).init(jax.random.key(0)), small, {opened: [4], closed: [4]}, multiple=8
    )
    model = dataclasses.replace(grown, lora=Lora(rank=8, alpha=16.0, token_rows=token_rows))
    net, optim = network(model), dataclasses.replace(OPTIM, peak_lr=3e-2)
    batch = stack_rows([[build([sentence], [np.array([0, 1, 1, 1, 1], np.float32)])]], 5)
    step = jax.jit(sft.make_sft_step(net, optim, steps=60, chunk_tokens=5))
    state = create(overlay(net.init(jax.random.key(1)), base), optim, key=jax.random.key(2))
    for _ in range(60):
        state, _ = step(state, batch)
    hidden, _ = net.apply(state.params, batch.tokens, batch.depth, batch.span)
    said = jax.nn.softmax(net.unembed(state.params, hidden[0]), axis=-1)
    return np.asarray([said[0, opened], said[2, closed]])


def test_new_tokens_with_equal_rows_are_told_apart_only_if_their_rows_are_trained() -> None:
    """An import gives <Thread> and </Thread> the same row, the mean of the pieces of "Thread"."""
    assert (learnt(()) <= 0.5).all()
    assert (learnt((30, 31)) > 0.95).all()


def test_a_side_without_gradient_stays_under_muon() -> None:
    """The first gradient of A is zero, for B is: a matrix that has no direction."""
    optim = dataclasses.replace(OPTIM, algorithm="muon", weight_decay=0.0, clip_norm=None)
    rng = np.random.default_rng(0)
    sides = {"a": rng.normal(size=(2, 8, RANK)), "b": np.zeros((2, RANK, 4, 2))}
    slopes = {"a": np.zeros((2, 8, RANK)), "b": rng.normal(size=(2, RANK, 4, 2))}
    params, gradients = (
        {"blocks": {"attention": {"q_lora": jax.tree.map(jnp.float32, tree)}}}
        for tree in (sides, slopes)
    )
    state = create(params, optim, key=jax.random.key(1))
    after = update(state, gradients, optim, steps=9)[0].params["blocks"]["attention"]["q_lora"]
    np.testing.assert_array_equal(after["a"], np.float32(sides["a"]))
    assert np.isfinite(after["b"]).all()
    assert np.asarray(after["b"]).all()
