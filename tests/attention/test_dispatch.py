"""Which backend `attend` picks, what it says when none can, and that devices share the work."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax import sharding
from tw_jax.attention import blockwise, dispatch, pallas_tpu, reference
from tw_jax.contracts import Span
from tw_jax.trie.mask import needed


def inputs(queries, slots, rows=1, heads=2, groups=1, width=4):
    """Random q, k, v and the arguments of a plain causal row whose last tokens ask."""
    rng = np.random.default_rng(0)
    shapes = [(heads, queries), (groups, slots), (groups, slots)]
    qkv = [jnp.asarray(rng.normal(size=(rows, *s, width)), jnp.float32) for s in shapes]
    enter = jnp.tile(jnp.arange(slots, dtype=jnp.int32), (rows, 1))
    keys = Span(enter=enter, exit=jnp.full((rows, slots), slots, jnp.int32))
    return qkv, {"at": enter[:, slots - queries :], "keys": keys, "scale": 0.5}


def refusing(reason):
    def backend(q, k, v, **_):
        raise NotImplementedError(reason)

    return backend


def answering(value):
    return lambda q, k, v, **_: jnp.full_like(q, value)


def picked(monkeypatch, queries, slots, platform) -> str:
    """The name of the backend that "auto" asks, found by the value it fills the answer with."""
    names = list(dispatch.BACKENDS)
    fakes = {name: answering(i) for i, name in enumerate(names)}
    if platform != "tpu":
        fakes["pallas_tpu"] = refusing(f"no TPU but {platform}.")
    monkeypatch.setattr(dispatch, "BACKENDS", fakes)
    qkv, rest = inputs(queries, slots)
    return names[int(dispatch.attend(*qkv, **rest)[0, 0, 0, 0])]


@pytest.mark.parametrize(
    ("queries", "slots", "platform", "name"),
    [
        (1, 8192, "cpu", "reference"),
        (8, 4096, "tpu", "reference"),
        (128, 128, "tpu", "reference"),
        (512, 512, "cpu", "blockwise"),
        (256, 2048, "gpu", "blockwise"),
        (512, 512, "tpu", "pallas_tpu"),
    ],
)
def test_auto_writes_out_few_pairs_and_walks_blocks_of_many(
    monkeypatch, queries, slots, platform, name
):
    assert picked(monkeypatch, queries, slots, platform) == name


def test_every_impl_is_auto_or_a_backend():
    assert typing.get_args(dispatch.Impl) == ("auto", *dispatch.BACKENDS)
    assert list(dispatch.BLOCKS) == list(dispatch.BACKENDS)


@pytest.mark.parametrize(("name", "tokens"), [("blockwise", 600), ("pallas_tpu", 2000)])
def test_a_backend_walks_the_blocks_that_it_tells(monkeypatch, name, tokens):
    module, asked = {"blockwise": blockwise, "pallas_tpu": pallas_tpu}[name], []

    def recorded(at, keys, *, query_block, key_block):
        asked.append((query_block, key_block))
        return needed(at, keys, query_block=query_block, key_block=key_block)

    monkeypatch.setattr(module, "needed", recorded)
    monkeypatch.setattr(sharding, "platform", lambda: "tpu")
    qkv, rest = inputs(tokens, tokens, heads=4, groups=2)
    jax.eval_shape(lambda *qkv: dispatch.BACKENDS[name](*qkv, **rest), *qkv)
    assert asked == [dispatch.BLOCKS[name](tokens, tokens, 2)]


@pytest.mark.parametrize("impl", ["auto", "reference", "blockwise"])
def test_all_impls_agree(impl, close):
    qkv, rest = inputs(queries=40, slots=90)
    want = reference.attend(*qkv, **rest)
    got = dispatch.attend(*qkv, impl=impl, **rest)
    close("module", got, want)


def test_auto_goes_on_to_the_next_backend_after_a_refusal(monkeypatch):
    backends = {"reference": refusing("no pairs today."), "blockwise": answering(7.0)}
    monkeypatch.setattr(dispatch, "BACKENDS", backends)
    qkv, rest = inputs(4, 8)
    assert np.all(dispatch.attend(*qkv, **rest) == 7.0)


def test_if_all_refuse_every_reason_is_told(monkeypatch):
    backends = {"reference": refusing("too many pairs."), "blockwise": refusing("heads of 4.")}
    monkeypatch.setattr(dispatch, "BACKENDS", backends)
    qkv, rest = inputs(4, 8)
    with pytest.raises(NotImplementedError, match=r"reference: too many.*blockwise: heads of 4\."):
        dispatch.attend(*qkv, **rest)


def test_a_backend_asked_for_by_name_refuses_for_itself(monkeypatch):
    backends = {"reference": answering(1.0), "blockwise": refusing("heads of 4.")}
    monkeypatch.setattr(dispatch, "BACKENDS", backends)
    qkv, rest = inputs(4, 8)
    with pytest.raises(NotImplementedError, match=r"^heads of 4\.$"):
        dispatch.attend(*qkv, impl="blockwise", **rest)


def test_an_error_that_is_no_refusal_is_not_swallowed(monkeypatch):
    def broken(q, k, v, **_):
        raise ValueError("a bug")

    monkeypatch.setattr(dispatch, "BACKENDS", {"reference": broken, "blockwise": answering(0.0)})
    qkv, rest = inputs(4, 8)
    with pytest.raises(ValueError, match="a bug"):
        dispatch.attend(*qkv, **rest)


def test_an_unknown_backend_is_answered_with_the_known_ones():
    qkv, rest = inputs(4, 8)
    with pytest.raises(
        ValueError, match="'flash' must be auto or one of reference, blockwise, pallas_tpu"
    ):
        dispatch.attend(*qkv, impl="flash", **rest)


def test_arrays_that_do_not_fit_each_other_are_refused():
    (q, k, v), rest = inputs(4, 8, heads=4, groups=2)
    wrong = [
        ((q, k, v[:, :, :-1]), {}),
        ((q[:, :3], k, v), {}),
        ((q, k.astype(jnp.bfloat16), v), {}),
        ((q, k, v), {"at": rest["at"][:, :-1]}),
        ((q, k, v), {"keys": jax.tree.map(lambda x: x[:, :-1], rest["keys"])}),
    ]
    for qkv, change in wrong:
        with pytest.raises(AssertionError):
            dispatch.attend(*qkv, **rest | change)


@pytest.mark.parametrize("impl", ["reference", "blockwise"])
@pytest.mark.parametrize(
    ("mesh", "rules", "heads", "groups"),
    [
        ({"data": 2, "fsdp": 2, "tensor": 2}, {}, 4, 2),
        # Fewer key/value heads than devices: they stay whole and each device takes what it needs.
        ({"data": 1, "fsdp": 2, "tensor": 4}, {"kv_heads": ()}, 4, 2),
        ({"data": 2, "fsdp": 1, "tensor": 4}, {}, 1, 1),
    ],
    ids=["rows and heads", "more devices than kv heads", "one head"],
)
def test_eight_devices_compute_what_one_does_and_move_no_rows(
    impl, mesh, rules, heads, groups, close
):
    (q, k, v), rest = inputs(64, 64, rows=4, heads=heads, groups=groups)

    def loss(q, k, v):
        return jnp.square(dispatch.attend(q, k, v, impl=impl, **rest)).sum()

    gradients = jax.value_and_grad(loss, (0, 1, 2))
    want = jax.jit(gradients)(q, k, v)

    table, mesh = sharding.Rules(**rules), sharding.make_mesh(sharding.Mesh(**mesh))
    axes = [("rows", axis, "tokens", "head") for axis in ("heads", "kv_heads", "kv_heads")]
    with sharding.use(mesh, table):
        places = sharding.shardings(axes, [q, k, v], mesh, table)
        placed = jax.device_put([q, k, v], places)
        compiled = jax.jit(gradients).lower(*placed).compile()
        got = compiled(*placed)
    close("sharded", got, want)
    if not rules:
        assert "all-gather" not in compiled.as_text()
        assert "all-to-all" not in compiled.as_text()
