"""Adapters: nothing at first, beside the weights they belong to, and the merged model after."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from tw_jax.contracts import Span
from tw_jax.models import hf
from tw_jax.models.lora import Lora, adapters, merged, overlay, trained, without_adapters
from tw_jax.models.transformer import network

BASE = tiny.MODEL
LORA = Lora(rank=3, alpha=6.0)
MODEL = dataclasses.replace(BASE, lora=LORA)
SIDES = {  # of A and B, without layers
    ("attention", "q"): ((24, 3), (3, 32)),
    ("attention", "k"): ((24, 3), (3, 16)),
    ("attention", "v"): ((24, 3), (3, 16)),
    ("attention", "out"): ((32, 3), (3, 24)),
    ("mlp", "gate"): ((24, 3), (3, 40)),
    ("mlp", "up"): ((24, 3), (3, 40)),
    ("mlp", "down"): ((40, 3), (3, 24)),
}


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def moved(params, seed=1):
    """The parameters with adapters as they might be after training."""
    rng = np.random.default_rng(seed)
    some = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape) / 4), adapters(params))
    return overlay(params, some)


def merged_by_hand(params):
    """W + 2 A B for each weight of each layer."""
    plain = without_adapters(params)
    for module, name in SIDES:
        weight, adapter = (params["blocks"][module][n] for n in (name, f"{name}_lora"))
        layers = []
        for layer in range(BASE.num_layers):
            a, b = (np.asarray(adapter[side][layer], np.float64) for side in "ab")
            layers.append(np.asarray(weight[layer], np.float64) + 2.0 * a @ b)
        new = {"blocks": {module: {name: np.stack(layers).astype(np.float32)}}}
        plain = overlay(plain, new)
    return plain


@pytest.fixture(scope="module")
def fresh():
    return network(MODEL).init(jax.random.key(0))


@pytest.fixture(scope="module")
def hidden_of():
    tokens = np.random.default_rng(0).integers(0, BASE.vocab_size, (2, 12)).astype(np.int32)
    depth = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), tokens.shape)
    span = Span(enter=depth, exit=jnp.full_like(depth, 12))
    of = {m: jax.jit(network(m).apply) for m in (BASE, MODEL)}
    return lambda model, params: np.asarray(of[model](params, tokens, depth, span)[0])


def test_a_fresh_model_is_the_model_without_adapters_bit_by_bit(fresh, hidden_of) -> None:
    base = network(BASE).init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, without_adapters(fresh), base)
    np.testing.assert_array_equal(hidden_of(MODEL, fresh), hidden_of(BASE, base))


@pytest.mark.parametrize("path", SIDES)
def test_an_adapter_has_the_sides_of_its_weight_and_begins_at_nothing(fresh, path) -> None:
    module, name = path
    a, b = (fresh["blocks"][module][f"{name}_lora"][side] for side in "ab")
    assert (a.shape[1:], b.shape[1:]) == SIDES[path]
    assert a.shape[0] == b.shape[0] == BASE.num_layers
    assert not np.asarray(b).any()
    assert float(a.std()) == pytest.approx(a.shape[1] ** -0.5, rel=0.2)


def test_a_trained_adapter_changes_what_the_model_computes_as_its_merged_weight_does(
    fresh, hidden_of, close
) -> None:
    params = moved(fresh)
    got = hidden_of(MODEL, params)
    close("model", got, hidden_of(BASE, merged_by_hand(params)))
    assert np.abs(got - hidden_of(MODEL, fresh)).max() > 100 * close.bounds["model"] * got.max()


def test_what_is_written_for_hugging_face_is_the_merged_model(fresh, tmp_path, close) -> None:
    params = moved(fresh)
    hf.write(tmp_path, params, MODEL, dtype="float32")
    got, want = flat(hf.read_params(tmp_path, BASE)), flat(merged_by_hand(params))
    assert got.keys() == want.keys()
    for name, leaf in want.items():
        close("rounding", got[name], leaf, what=name)


def test_merging_into_bfloat16_rounds_nothing_away(close) -> None:
    weight = np.ones((4, 5), jnp.bfloat16)
    adapter = {"a": np.full((4, 1), 1e-3, np.float32), "b": np.ones((1, 5), np.float32)}
    got = merged(weight, adapter, Lora(rank=1, alpha=1.0))
    assert got.shape == (4, 5)
    close("rounding", got, 1.001)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_adapters_are_float32_whatever_their_weights_are(param_dtype) -> None:
    net = network(dataclasses.replace(MODEL, param_dtype=param_dtype))
    params = jax.eval_shape(net.init, jax.random.key(0))
    assert {p.dtype for p in jax.tree.leaves(adapters(params))} == {jnp.dtype("float32")}
    assert {p.dtype for p in jax.tree.leaves(without_adapters(params))} == {jnp.dtype(param_dtype)}


def test_only_targets_have_adapters() -> None:
    model = dataclasses.replace(BASE, lora=Lora(rank=2, alpha=2, targets=("attention.v", "mlp.up")))
    shapes = jax.eval_shape(network(model).init, jax.random.key(0))
    assert set(flat(adapters(shapes))) == {
        f"blocks.{name}_lora.{side}" for name in ("attention.v", "mlp.up") for side in "ab"
    }


def test_the_sides_of_an_adapter_are_split_as_those_of_its_weight() -> None:
    axes = network(MODEL).axes()["blocks"]
    for module, name in SIDES:
        weight, adapter = axes[module][name], axes[module][f"{name}_lora"]
        assert adapter["a"][-1] == adapter["b"][1] == "rank"
        assert (*adapter["a"][:-1], *adapter["b"][2:]) == weight


def test_a_tree_is_its_adapters_and_the_rest(fresh) -> None:
    core, beside = without_adapters(fresh), adapters(fresh)
    assert len(flat(beside)) == 2 * len(SIDES)
    assert flat(core).keys() | flat(beside).keys() == flat(fresh).keys()
    assert flat(core).keys() & flat(beside).keys() == set()
    assert jax.tree.structure(overlay(core, beside)) == jax.tree.structure(fresh)
    assert trained(fresh).keys() == {"blocks"}
    assert trained(core) is core


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"rank": 0}, ValueError, "Lora.rank = 0 must be at least 1"),
        ({"alpha": 0.0}, ValueError, "Lora.alpha = 0.0 must be above 0"),
        ({"targets": ()}, ValueError, "want at least one weight, and each once"),
        ({"targets": ("mlp.up", "mlp.up")}, ValueError, "want at least one weight, and each once"),
        ({"targets": ("attention.o",)}, TypeError, "'attention.q', 'attention.k', 'attention.v'"),
    ],
)
def test_adapters_that_cannot_be_are_refused(fields, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        Lora(**({"rank": 2, "alpha": 4.0} | fields))
