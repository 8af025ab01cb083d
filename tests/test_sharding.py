"""Meshes, rules and their refusals; the decoder on eight devices against the decoder on one."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tw_jax.contracts import KV, Span
from tw_jax.models.lora import Lora, overlay, trained
from tw_jax.models.transformer import network
from tw_jax.sharding import (
    Mesh,
    Rules,
    constrain,
    current,
    make_mesh,
    put_rows,
    row_share,
    shardings,
    spec,
    to_global,
    use,
)
from tw_jax.train.sft import nll_sums
from tw_jax.trie.batch import TrieBatch

MODEL = tiny.model(vocab_size=64, width=32, mlp_width=64, num_heads=8, num_kv_heads=4)
CUBE = Mesh(data=2, fsdp=2, tensor=2)
MESHES = [CUBE, Mesh(fsdp=8), Mesh(data=2, fsdp=1, tensor=4)]
ROWS, TOKENS = 8, 12


def test_minus_one_takes_the_rest_of_the_devices() -> None:
    mesh = make_mesh(Mesh(data=2, tensor=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 2}
    alone = make_mesh(Mesh(), jax.devices()[:1])
    assert dict(alone.shape) == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            {"data": 3},
            "Mesh.data = 3 does not divide the 8 available devices. Set it to 1, 2, 4 or 8.",
        ),
        (
            {"data": 2, "fsdp": 2},
            "data 2 x fsdp 2 x sequence 1 x tensor 1 is not the 8 available devices",
        ),
        (
            {"data": 4, "tensor": 4},
            "data 4 x fsdp -1 x sequence 1 x tensor 4 is not the 8 available devices",
        ),
        ({"data": -1}, "Mesh.data = -1 and Mesh.fsdp = -1, but only one axis"),
        ({"tensor": 0}, "Mesh.tensor = 0 must be at least 1, or -1 for the rest"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_mesh(Mesh(**sizes))


def test_a_dimension_goes_where_its_rule_says_and_size_one_stays_whole() -> None:
    mesh = make_mesh(CUBE)
    assert spec(("layer", "embed", "heads"), (3, 4, 8), mesh, Rules()) == P(
        None, ("fsdp", "sequence"), ("tensor",)
    )
    assert spec(("rows", None, "heads"), (8, 5, 1), mesh, Rules()) == P(
        ("data", "fsdp"), P.UNCONSTRAINED, None
    )
    assert spec(("embed",), (4,), mesh, Rules(embed=())) == P(None)


@pytest.mark.parametrize(
    ("axes", "shape", "message"),
    [
        (("heads", "kv_heads"), (8, 4), "heads and kv_heads both go to mesh axis 'tensor'"),
        (("embed", "embed"), (8, 8), "embed and embed both go to mesh axis 'fsdp'"),
        (("heads",), (3,), "w has heads = 3, which must be a multiple of 2 (mesh tensor 2)"),
        (("rows",), (6,), "w has rows = 6, which must be a multiple of 4 (mesh data 2 x fsdp 2)"),
        (("haeds",), (8,), "w has axis 'haeds'. It must be one of layer, embed, vocab, heads"),
        (("heads",), (8, 8), "w has 2 dimensions and 1 axes ('heads',)"),
    ],
)
def test_an_array_that_does_not_fit_is_refused_by_name(axes, shape, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        spec(axes, shape, make_mesh(CUBE), Rules(), name="w")


def test_a_parameter_that_does_not_divide_is_named_by_its_path() -> None:
    net = network(dataclasses.replace(MODEL, mlp_width=60))
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"blocks\.mlp\.down has mlp = 60, which must be a multiple of 8"
    ):
        shardings(net.axes(), shapes, make_mesh(Mesh(fsdp=1, tensor=8)), Rules())


def test_a_head_is_not_cut_in_two_though_its_entries_would_divide() -> None:
    net, mesh = network(MODEL), make_mesh(Mesh(fsdp=1, tensor=8))
    one = jnp.zeros((1, 16), jnp.int32)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    message = "has kv_heads = 4, which must be a multiple of 8 .* Rules.kv_heads = \\(\\)"
    with use(mesh, Rules()), pytest.raises(ValueError, match=message):
        jax.eval_shape(net.apply, shapes, one, one, Span(enter=one, exit=one))


def test_constrain_acts_inside_use_alone_and_follows_its_rules() -> None:
    mesh = make_mesh(CUBE)

    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        return constrain(2 * x, ("rows", "tokens", "heads"))

    x = jnp.ones((4, 3, 2))
    assert current() is None
    assert len(double(x).sharding.device_set) == 1
    with use(mesh, Rules()):
        assert double(x).sharding.spec == P(("data", "fsdp"), None, "tensor")
    # The same function under other rules is traced anew.
    with use(mesh, Rules(rows=(), heads=())):
        assert double(x).sharding.is_fully_replicated
    assert len(double(x).sharding.device_set) == 1


def test_an_activation_that_does_not_divide_is_refused() -> None:
    with (
        use(make_mesh(Mesh()), Rules()),
        pytest.raises(
            ValueError, match="An activation has rows = 3, which must be a multiple of 8"
        ),
    ):
        jax.jit(lambda x: constrain(x, ("rows", "width")))(jnp.ones((3, 2)))


def test_a_host_batch_becomes_a_global_one_split_by_rows() -> None:
    mesh = make_mesh(CUBE)
    batch = {
        "tokens": np.arange(24, dtype=np.int32).reshape(8, 3),
        "weight": np.ones(8, np.float32),
    }
    made = to_global(batch, mesh, Rules())
    np.testing.assert_array_equal(made["tokens"], batch["tokens"])
    assert made["tokens"].sharding.spec == P(("data", "fsdp"))
    assert {shard.data.shape for shard in made["tokens"].addressable_shards} == {(2, 3)}
    accumulated = to_global(batch["tokens"].reshape(2, 4, 3), mesh, Rules(), rows_axis=1)
    assert {shard.data.shape for shard in accumulated.addressable_shards} == {(2, 1, 3)}
    with pytest.raises(
        ValueError, match="tokens has 6 rows on this host, which must be a multiple of 4"
    ):
        to_global({"tokens": np.ones((6, 3))}, mesh, Rules())


def test_rows_that_every_host_has_are_split_over_the_mesh_in_use() -> None:
    batch = {"tokens": np.arange(24, dtype=np.int32).reshape(8, 3), "length": np.arange(8)}
    batch["same"] = batch["length"]
    alone = put_rows(batch)
    with use(make_mesh(CUBE), Rules()):
        made = put_rows(batch)
        with pytest.raises(ValueError, match="tokens has rows = 6, which must be a multiple of 4"):
            put_rows({"tokens": np.ones((6, 3))})
    for name, array in batch.items():
        np.testing.assert_array_equal(made[name], array)
        np.testing.assert_array_equal(alone[name], array)
        assert made[name].sharding.spec == P(("data", "fsdp"))
        assert len(alone[name].sharding.device_set) == 1
    batch["tokens"][:] = 0
    assert made["tokens"][0, 1] == 1, "it is a copy"


def arguments() -> tuple[jax.Array, jax.Array, Span]:
    """Rows that fork in the middle: the second half of each cannot see the first's last part."""
    tokens = jax.random.randint(jax.random.key(1), (ROWS, TOKENS), 0, MODEL.vocab_size, jnp.int32)
    index = np.arange(TOKENS)
    depth = np.where(index < 8, index, index - 4)
    end = np.where((index >= 4) & (index < 8), 8, TOKENS)
    whole = [jnp.asarray(np.broadcast_to(x, tokens.shape), jnp.int32) for x in (index, depth, end)]
    return tokens, whole[1], Span(enter=whole[0], exit=whole[2])


def logits_of(params, tokens, depth, span) -> jax.Array:
    net = network(MODEL)
    return net.unembed(params, net.apply(params, tokens, depth, span)[0])


FORWARD = jax.jit(logits_of)
GRADIENT = jax.jit(jax.grad(lambda *inputs: jnp.square(logits_of(*inputs)).mean()))


@pytest.fixture(scope="module")
def single():
    return network(MODEL).init(jax.random.key(0))


def place(cfg: Mesh) -> tuple[jax.sharding.Mesh, dict]:
    """A mesh, and where parameters go on it."""
    net, mesh = network(MODEL), make_mesh(cfg)
    return mesh, shardings(net.axes(), jax.eval_shape(net.init, jax.random.key(0)), mesh, Rules())


# Results are awaited before the next program starts: virtual devices share one host's threads, and
# the eight that meet in a collective should not have to wait for another program's work.
@pytest.mark.parametrize("cfg", MESHES, ids=str)
def test_eight_devices_compute_what_one_does(single, cfg, close, capfd) -> None:
    want = jax.block_until_ready(FORWARD(single, *arguments()))
    mesh, where = place(cfg)
    with use(mesh, Rules()):
        batch = to_global(jax.tree.map(np.asarray, arguments()), mesh, Rules())
        logits = jax.block_until_ready(FORWARD(jax.device_put(single, where), *batch))
    close("sharded", logits, want)
    split = spec(("rows", "tokens", "vocab"), logits.shape, mesh, Rules())
    assert logits.sharding.is_equivalent_to(NamedSharding(mesh, split), 3)
    assert "full rematerialization" not in capfd.readouterr().err


def test_gradients_on_eight_devices_are_those_on_one(single, close, capfd) -> None:
    want = jax.block_until_ready(GRADIENT(single, *arguments()))
    mesh, where = place(CUBE)
    with use(mesh, Rules()):
        batch = to_global(jax.tree.map(np.asarray, arguments()), mesh, Rules())
        gradient = jax.block_until_ready(GRADIENT(jax.device_put(single, where), *batch))
    close("sharded", gradient, want)
    # What the compiler says when it copies a whole array to every device to split it otherwise.
    assert "full rematerialization" not in capfd.readouterr().err


def test_parameters_born_in_their_places_are_the_same_numbers(single, close) -> None:
    mesh, where = place(CUBE)
    with use(mesh, Rules()):
        born = jax.jit(network(MODEL).init, out_shardings=where)(jax.random.key(0))
    close("rounding", born, single)
    for leaf, there in zip(jax.tree.leaves(born), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(there, leaf.ndim)


def test_decoding_on_eight_devices_equals_one_and_never_moves_the_cache(single, close) -> None:
    net = network(MODEL)
    tokens, depth, span = arguments()
    slots = 16
    spare = ((0, 0), (0, slots - TOKENS))
    keys = Span(enter=jnp.pad(span.enter, spare), exit=jnp.pad(span.exit, spare))
    start = jnp.zeros((ROWS,), jnp.int32)
    want, filled = jax.block_until_ready(
        jax.jit(net.apply)(single, tokens, depth, span, net.empty_kv(ROWS, slots), keys, start)
    )

    mesh, where = place(CUBE)
    with use(mesh, Rules()):
        placed = jax.device_put(single, where)
        batch = to_global(jax.tree.map(np.asarray, (tokens, depth, span)), mesh, Rules())
        rest = to_global(jax.tree.map(np.asarray, (keys, start)), mesh, Rules())
        kv = jax.jit(lambda: net.empty_kv(ROWS, slots))()
        assert kv.k.sharding.spec == P(None, ("data", "fsdp"), "tensor")
        step = jax.jit(net.apply, donate_argnums=4).lower(placed, *batch, kv, *rest).compile()
        hidden, kv = step(placed, *batch, kv, *rest)
    close("sharded", (hidden, kv), (want, filled))
    assert isinstance(kv, KV)
    # One device's share of a layer is [2 rows, 2 heads, 16 slots, 8]; none of it may travel.
    moving = re.compile(r"(all-gather|all-to-all|collective-permute|all-reduce)\(")
    travels = [line for line in step.as_text().splitlines() if moving.search(line)]
    assert travels  # parameters do
    assert [line for line in travels if f",{slots},{MODEL.head_width}]" in line] == []


def mesh_of_hosts(data, fsdp, tensor, chips):
    """A mesh of fake devices, `chips` neighbours to a host."""
    shape = (data, fsdp, tensor)
    devices = [types.SimpleNamespace(process_index=i // chips) for i in range(data * fsdp * tensor)]
    grid = np.array(devices, object).reshape(shape)
    names = ("data", "fsdp", "tensor")
    return types.SimpleNamespace(
        devices=grid, axis_names=names, shape=dict(zip(names, shape, strict=True))
    )


@pytest.mark.parametrize(
    ("sizes", "shares"),
    [
        ((1, 16, 1), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((2, 8, 1), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ((1, 4, 4), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # Two hosts hold the two halves of the same heads: they read the same rows.
        ((1, 2, 8), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((1, 1, 16), [(0, 1)] * 4),
    ],
)
def test_hosts_that_hold_the_same_rows_have_one_share(sizes, shares, monkeypatch) -> None:
    mesh, found = mesh_of_hosts(*sizes, chips=4), []
    for host in range(4):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        found.append(row_share(mesh, Rules()))
    assert found == shares


def test_hosts_that_hold_some_of_the_same_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="gives two hosts rows of which they share only some"):
        row_share(mesh_of_hosts(1, 4, 3, chips=4), Rules())


@pytest.mark.parametrize(
    "lora", [None, Lora(rank=2, alpha=2.0, token_rows=(400, 3, 77))], ids=["all", "rows of tokens"]
)
def test_a_split_vocabulary_stays_split_where_rows_have_no_token(lora) -> None:
    """512 rows for 500 ids over four devices: no device holds logits of all rows."""
    cfg = dataclasses.replace(MODEL, vocab_size=512, lora=lora)
    net, mesh, rules = network(cfg, num_ids=500), make_mesh(Mesh(fsdp=2, tensor=4)), Rules()
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    where = shardings(net.axes(), shapes, mesh, rules)
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, where
    )
    ids = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    batch = TrieBatch(
        tokens=ids,
        parent=ids,
        depth=ids,
        end=ids,
        weight=jax.ShapeDtypeStruct((4, 64), jnp.float32),
    )

    def loss(moving, params, batch):
        return nll_sums(net, overlay(params, moving), batch, chunk_tokens=16)[0]

    with use(mesh, rules):
        gradient = jax.jit(jax.grad(loss))
        text = gradient.lower(trained(params), params, batch).compile().as_text()
    assert ",128]" in text, "a quarter of the rows"
    assert re.findall(r"\w+\[(?:\d+,)+512\]", text) == []
