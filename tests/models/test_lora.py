"""Adapters: nothing at first, beside the weights they belong to, and the merged model after."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.contracts import Span
from tw_jax.models import hf
from tw_jax.models.lora import Lora, merged, overlay, trained, without_adapters
from tw_jax.models.transformer import Decoder, Model, Rope, network, walk, with_token_rows

BASE = Model(
    vocab_size=40,
    num_layers=2,
    width=24,
    mlp_width=40,
    num_heads=4,
    num_kv_heads=2,
    head_width=8,
    qk_norm=True,
    tie_embeddings=False,
    rope=Rope(),
    attention="reference",
)
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
    some = jax.tree.map(lambda p: jnp.float32(rng.normal(size=p.shape) / 4), trained(params))
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
    assert {p.dtype for p in jax.tree.leaves(trained(params))} == {jnp.dtype("float32")}
    assert {p.dtype for p in jax.tree.leaves(without_adapters(params))} == {jnp.dtype(param_dtype)}


def test_only_targets_have_adapters() -> None:
    model = dataclasses.replace(BASE, lora=Lora(rank=2, alpha=2, targets=("attention.v", "mlp.up")))
    shapes = jax.eval_shape(network(model).init, jax.random.key(0))
    assert set(flat(trained(shapes))) == {
        f"blocks.{name}_lora.{side}" for name in ("attention.v", "mlp.up") for side in "ab"
    }


def test_the_sides_of_an_adapter_are_split_as_those_of_its_weight() -> None:
    axes = network(MODEL).axes()["blocks"]
    for module, name in SIDES:
        weight, adapter = axes[module][name], axes[module][f"{name}_lora"]
        assert adapter["a"][-1] == adapter["b"][1] == "rank"
        assert (*adapter["a"][:-1], *adapter["b"][2:]) == weight


def test_a_tree_is_its_adapters_and_the_rest(fresh) -> None:
    core, beside = without_adapters(fresh), trained(fresh)
    assert len(flat(beside)) == 2 * len(SIDES)
    assert flat(core).keys() | flat(beside).keys() == flat(fresh).keys()
    assert flat(core).keys() & flat(beside).keys() == set()
    assert jax.tree.structure(overlay(core, beside)) == jax.tree.structure(fresh)
    assert trained(fresh).keys() == {"blocks"}
    assert trained(core) is core


# Rows of tokens that are trained in full.

IDS = (39, 5, 31)


def with_rows(tied: bool) -> Model:
    return dataclasses.replace(
        BASE, tie_embeddings=tied, lora=dataclasses.replace(LORA, token_rows=IDS)
    )


def merged_tables(params):
    """The base tables with the trained rows in them, float32."""
    found = {}
    for name in {"embed", "unembed"} & params.keys():
        found[name] = np.array(params[name], np.float32)
        for number, token in enumerate(IDS):
            found[name][token] += np.asarray(params[f"{name}_lora"][number])
    return found


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def rows_model(request):
    """A model with trained rows, and its parameters as they might be after training."""
    model = with_rows(request.param)
    return model, moved(network(model).init(jax.random.key(0)))


def computed(model, params, num_ids=None):
    """Hidden states and logits of all tokens of the vocabulary."""
    net, tokens = network(model, num_ids=num_ids), jnp.arange(40, dtype=jnp.int32)[None]
    span = Span(enter=tokens, exit=jnp.full_like(tokens, 40))
    hidden, _ = net.apply(params, tokens, tokens, span)
    return np.asarray(hidden), np.asarray(net.unembed(params, hidden))


def test_fresh_rows_change_nothing(rows_model) -> None:
    model, _ = rows_model
    fresh = network(model).init(jax.random.key(0))
    names = {"embed_lora"} if model.tie_embeddings else {"embed_lora", "unembed_lora"}
    assert trained(fresh).keys() == {"blocks", *names}
    for name in names:
        assert fresh[name].shape == (3, BASE.width)
        assert fresh[name].dtype == jnp.float32
        assert not np.asarray(fresh[name]).any()
    base = dataclasses.replace(model, lora=None)
    for got, want in zip(
        computed(model, fresh), computed(base, without_adapters(fresh)), strict=True
    ):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("num_ids", [None, 35])
def test_trained_rows_are_read_by_embedding_and_head(rows_model, num_ids, close) -> None:
    model, params = rows_model
    lora = dataclasses.replace(LORA, token_rows=())
    plain_model = dataclasses.replace(model, lora=lora)
    names = ("embed_lora", "unembed_lora")
    plain = {name: leaf for name, leaf in params.items() if name not in names}
    want = computed(plain_model, plain | merged_tables(params), num_ids)
    for got, oracle in zip(computed(model, params, num_ids), want, strict=True):
        close("model", got[..., :num_ids], oracle[..., :num_ids])
        np.testing.assert_array_equal(got[..., 40:], oracle[..., 40:])
    if num_ids is not None:
        assert (computed(model, params, num_ids)[1][..., num_ids:] == -1e30).all()
    assert np.abs(want[1] - computed(plain_model, plain)[1])[..., list(IDS)[1:]].max() > 0.1


def test_a_bfloat16_table_is_read_with_float32_rows(rows_model) -> None:
    """The sum is rounded once, so rows that are merged at export are the rows of training."""
    model, params = rows_model
    model = dataclasses.replace(model, param_dtype="bfloat16", compute_dtype="bfloat16")
    params = params | {"embed": params["embed"].astype(jnp.bfloat16)}
    decoder = Decoder(model)
    tokens = jnp.arange(40, dtype=jnp.int32)[None]
    got = decoder.apply({"params": params}, tokens, method="lookup")
    want = jnp.asarray(merged_tables(params)["embed"]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(got[0], np.float32), np.asarray(want, np.float32))


def test_an_export_has_the_trained_rows_and_its_logits_are_equal(
    rows_model, tmp_path, close
) -> None:
    model, params = rows_model
    hf.write(tmp_path, params, model, dtype="float32")
    base = dataclasses.replace(model, lora=None)
    back = hf.read_params(tmp_path, base)
    assert flat(back).keys() == flat(without_adapters(params)).keys()
    for name, table in merged_tables(params).items():
        np.testing.assert_array_equal(back[name], table)
    for got, want in zip(computed(base, back), computed(model, params), strict=True):
        close("model", got, want)


def test_the_stages_of_a_comparison_have_the_trained_rows(rows_model) -> None:
    model, params = rows_model
    tokens = jnp.arange(40, dtype=jnp.int32)[None]
    span = Span(enter=tokens, exit=jnp.full_like(tokens, 40))
    stages = dict(walk(model, params, tokens, tokens, span))
    np.testing.assert_array_equal(stages["embed"][0], merged_tables(params)["embed"])


def test_a_row_outside_of_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must be below Model\.vocab_size = 40"):
        dataclasses.replace(BASE, lora=dataclasses.replace(LORA, token_rows=(40,)))


@pytest.mark.parametrize(
    ("given", "want"), [(None, (7, 8)), ((), ()), ((1,), (1,))], ids=["None", "none", "own"]
)
def test_rows_of_added_tokens_are_trained_unless_the_config_names_others(given, want) -> None:
    model = dataclasses.replace(BASE, lora=dataclasses.replace(LORA, token_rows=given))
    assert with_token_rows(model, [7, 8]).lora == dataclasses.replace(LORA, token_rows=want)
    assert with_token_rows(BASE, [7, 8]) is BASE


@pytest.mark.parametrize(
    ("fields", "error", "sentence"),
    [
        ({"rank": 0}, ValueError, "Lora.rank = 0 must be at least 1"),
        ({"alpha": 0.0}, ValueError, "Lora.alpha = 0.0 must be above 0"),
        ({"targets": ()}, ValueError, "must name at least one weight, and each weight only once"),
        (
            {"targets": ("mlp.up", "mlp.up")},
            ValueError,
            "must name at least one weight, and each weight only once",
        ),
        ({"token_rows": (3, 3)}, ValueError, "at least 0, and each id only once"),
        ({"token_rows": (-1,)}, ValueError, "at least 0, and each id only once"),
        ({"targets": ("attention.o",)}, TypeError, "'attention.q', 'attention.k', 'attention.v'"),
    ],
)
def test_adapters_that_cannot_be_are_refused(fields, error, sentence) -> None:
    with pytest.raises(error, match=sentence):
        Lora(**({"rank": 2, "alpha": 4.0} | fields))
