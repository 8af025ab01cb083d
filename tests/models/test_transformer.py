"""The decoder against itself seen from the other side: path by path, layer by layer, unremat."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import tiny

from tw_jax.contracts import KV, Span
from tw_jax.models.presets import QWEN3_8B
from tw_jax.models.rope import rotation
from tw_jax.models.transformer import DecoderBlock, Model, RmsNorm, network
from tw_jax.trie.batch import TrieBatch, stack_rows
from tw_jax.trie.tree import build

SMALL = tiny.model(num_layers=3, width=32, mlp_width=48, head_width=16, tie_embeddings=True)


def causal(tokens: np.ndarray | jax.Array) -> tuple[jax.Array, jax.Array, Span]:
    """Arguments of `apply` for plain sequences [B, T]."""
    depth = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return jnp.asarray(tokens), depth, Span(enter=depth, exit=jnp.full_like(depth, depth.shape[1]))


def forest(seed: int) -> TrieBatch:
    """Two rows of two tries each, padded."""
    rng = np.random.default_rng(seed)

    def trie():
        sequences = oracles.random_sequences(rng, count=4, longest=7, vocabulary=SMALL.vocab_size)
        return build(sequences, [None] * len(sequences))

    rows = [[trie(), trie()], [trie(), trie()]]
    longest = max(sum(map(len, row)) for row in rows)
    return jax.tree.map(jnp.asarray, stack_rows(rows, longest + 3))


def path_to(node: int, parent: np.ndarray) -> list[int]:
    """Row indices from the root to a node."""
    path = [node]
    while parent[path[-1]] != path[-1]:
        path.append(int(parent[path[-1]]))
    return path[::-1]


@pytest.fixture(scope="module")
def small():
    net = network(SMALL)
    net = net._replace(apply=jax.jit(net.apply), unembed=jax.jit(net.unembed))
    return net, net.init(jax.random.key(0))


def test_every_node_of_a_packed_trie_sees_what_its_path_alone_shows(small, close) -> None:
    net, params = small
    batch = forest(0)
    packed, _ = net.apply(params, batch.tokens, batch.depth, batch.span)
    parent = np.asarray(batch.parent)
    longest = int(batch.depth.max()) + 1
    for row in range(2):
        leaves = set(range(parent.shape[1])) - {int(p) for i, p in enumerate(parent[row]) if p != i}
        paths = [path_to(leaf, parent[row]) for leaf in sorted(leaves)]
        alone = np.zeros((len(paths), longest), np.int32)
        for line, path in zip(alone, paths, strict=True):
            line[: len(path)] = np.asarray(batch.tokens)[row, path]
        hidden, _ = net.apply(params, *causal(alone))
        for line, path in zip(hidden, paths, strict=True):
            close("model", packed[row, path], line[: len(path)])


def test_sibling_threads_do_not_see_each_other(small) -> None:
    net, params = small
    sequences = [np.array([1, 2, 3, 4, 5], np.int32), np.array([1, 2, 6, 7], np.int32)]

    def hidden(second: np.ndarray) -> np.ndarray:
        trie = build([sequences[0], second], [None, None])
        batch = jax.tree.map(jnp.asarray, stack_rows([[trie]], 8))
        return np.asarray(net.apply(params, batch.tokens, batch.depth, batch.span)[0])

    before, after = hidden(sequences[1]), hidden(np.array([1, 2, 9, 8], np.int32))
    np.testing.assert_array_equal(before[0, :5], after[0, :5])
    assert np.abs(before[0, 5:7] - after[0, 5:7]).min(axis=-1).max() > 0


def test_scanned_layers_are_the_blocks_one_after_another(small, close) -> None:
    net, params = small
    tokens, depth, span = causal(np.arange(12, dtype=np.int32).reshape(2, 6))
    x, cos_sin = params["embed"][tokens], rotation(SMALL.rope, SMALL.head_width, depth)
    block = jax.jit(DecoderBlock(SMALL).apply)
    for layer in range(SMALL.num_layers):
        one = {"params": jax.tree.map(lambda p, layer=layer: p[layer], params["blocks"])}
        (x, _), _ = block(one, (x, None), jnp.int32(layer), cos_sin, span.enter, span, None)
    x = RmsNorm(SMALL).apply({"params": params["norm"]}, x)
    hidden, _ = net.apply(params, tokens, depth, span)
    close("module", hidden, x)


def loss_of(cfg: Model):
    """The network and the mean log-loss of a forest under it."""
    net = network(cfg)
    batch = forest(1)

    def loss(params):
        hidden, _ = net.apply(params, batch.tokens, batch.depth, batch.span)
        logp = jax.nn.log_softmax(net.unembed(params, hidden))
        return -jnp.take_along_axis(logp, batch.tokens[..., None], axis=-1).mean()

    return net, loss


@pytest.fixture(scope="module")
def plain(small):
    """Loss and gradients without remat, in float32."""
    return jax.jit(jax.value_and_grad(loss_of(SMALL)[1]))(small[1])


@pytest.mark.parametrize(
    ("remat", "attention"), [("full", "reference"), ("attention", "blockwise")]
)
def test_rematerialised_gradients_are_the_plain_ones(small, plain, close, remat, attention) -> None:
    cfg = dataclasses.replace(SMALL, remat=remat, attention=attention)
    got = jax.jit(jax.grad(loss_of(cfg)[1]))(small[1])
    close("gradient", got, plain[1])


def kept(remat, *, layers: int, attention: str = "reference") -> int:
    """Numbers that the forward pass leaves for the backward pass, parameters aside."""
    cfg = dataclasses.replace(SMALL, num_layers=layers, remat=remat, attention=attention)
    net, loss = loss_of(cfg)
    params = jax.eval_shape(net.init, jax.random.key(0))
    residuals = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    total, own = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (residuals, params))
    return total - own


def test_full_remat_keeps_little_more_than_the_input_of_each_block() -> None:
    inputs = 12 * forest(1).tokens.size * SMALL.width
    full, dots, none = (kept(remat, layers=12) for remat in ("full", "dots", "none"))
    assert inputs < full < 2 * inputs < dots < none / 2


def test_attention_remat_keeps_outputs_and_log_sums_too() -> None:
    rows, tokens = forest(1).tokens.shape
    padded = -(-tokens // 32) * 32  # whole blocks
    outputs = 12 * rows * padded * SMALL.num_heads * (SMALL.head_width + 1)
    more = [kept(remat, layers=12, attention="blockwise") for remat in ("attention", "full")]
    assert more[0] - more[1] == outputs


def test_bfloat16_compute_stays_finite_and_near_float32(small, plain, close) -> None:
    _, loss = loss_of(dataclasses.replace(SMALL, compute_dtype="bfloat16"))
    value, gradient = jax.jit(jax.value_and_grad(loss))(small[1])
    close("bf16_most", value, plain[0])
    for leaf in jax.tree.leaves(gradient):
        assert leaf.dtype == jnp.float32
        assert jnp.isfinite(leaf).all()


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_parameters_and_gradients_are_of_the_parameters_dtype(param_dtype) -> None:
    cfg = dataclasses.replace(SMALL, compute_dtype="bfloat16", param_dtype=param_dtype)
    net, loss = loss_of(cfg)
    params = jax.eval_shape(net.init, jax.random.key(0))
    value, gradient = jax.eval_shape(jax.value_and_grad(loss), params)
    assert value.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((params, gradient))} == {jnp.dtype(param_dtype)}


def test_hidden_states_and_cache_are_of_the_compute_dtype_and_logits_float32(small) -> None:
    net = network(dataclasses.replace(SMALL, compute_dtype="bfloat16"))
    hidden, _ = jax.eval_shape(net.apply, small[1], *causal(np.zeros((1, 4), np.int32)))
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(net.unembed, small[1], hidden).dtype == jnp.float32
    assert jax.eval_shape(lambda: net.empty_kv(1, 4)).k.dtype == jnp.bfloat16


def test_no_array_is_float64_even_where_that_is_allowed() -> None:
    with jax.enable_x64(True):
        net, loss = loss_of(SMALL)
        params = jax.eval_shape(net.init, jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        # Scalars of Python are; they are converted before they meet an array.
        assert not re.search(r"f64\[\d", str(jax.make_jaxpr(jax.grad(loss))(params)))


def test_axes_name_every_dimension_of_every_parameter() -> None:
    net = network(QWEN3_8B)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    axes = net.axes()

    def is_names(node: object) -> bool:
        return isinstance(node, tuple)

    assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=is_names)
    for shape, names in zip(
        jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=is_names), strict=True
    ):
        assert len(shape.shape) == len(names)
        assert (names[0] == "layer") == (shape.shape[0] == QWEN3_8B.num_layers)
    assert axes["blocks"]["attention"]["q"] == ("layer", "embed", "heads")
    assert axes["unembed"] == ("vocab", "embed")


def test_a_fresh_model_is_nearly_undecided() -> None:
    cfg = dataclasses.replace(SMALL, vocab_size=400, width=64, num_layers=4)
    net = network(cfg)
    params = net.init(jax.random.key(3))
    tokens = jax.random.randint(jax.random.key(4), (4, 32), 0, cfg.vocab_size)

    @jax.jit
    def log_loss(params, tokens):
        logits = net.unembed(params, net.apply(params, *causal(tokens))[0])
        logp = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1).mean()

    nll = log_loss(params, tokens)
    assert abs(float(nll) - math.log(cfg.vocab_size)) < 0.8
    blocks = params["blocks"]
    assert float(blocks["mlp"]["up"].std()) == pytest.approx(64**-0.5, rel=0.05)
    # Projections into the residual are smaller, so that 2 L of them add up to unit size.
    assert float(blocks["mlp"]["down"].std()) == pytest.approx((8 * 48) ** -0.5, rel=0.05)


def test_logits_may_be_read_from_any_number_of_hidden_states(small, close) -> None:
    net, params = small
    hidden = jax.random.normal(jax.random.key(0), (2, 3, SMALL.width))
    want = np.einsum("btd,vd->btv", np.asarray(hidden), np.asarray(params["embed"]))
    for part, oracle in ((hidden, want), (hidden[0], want[0]), (hidden[0, 0], want[0, 0])):
        close("module", net.unembed(params, part), oracle)


def test_half_of_a_cache_is_refused(small) -> None:
    net, params = small
    arguments = causal(np.zeros((1, 2), np.int32))
    with pytest.raises(ValueError, match="kv, keys and start some are given and some are None"):
        net.apply(params, *arguments, kv=net.empty_kv(1, 4))
    with pytest.raises(AssertionError):
        net.apply(
            params,
            *arguments,
            kv=net.empty_kv(1, 4),
            keys=arguments[2],
            start=jnp.zeros(1, jnp.int32),
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_kv_heads": 3}, "Model.num_kv_heads = 3 must divide Model.num_heads = 4"),
        ({"head_width": 15}, "Model.head_width = 15 must be even"),
        ({"num_layers": 0}, "Model.num_layers = 0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **changes)


# ---- the cache ----


def test_decoding_step_by_step_equals_one_pass(small, close) -> None:
    net, params = small
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, SMALL.vocab_size, (2, 12)).astype(np.int32)
    full, _ = net.apply(params, *causal(tokens))
    lengths, slots = np.array([6, 4]), 16  # rows stand at different slots
    kv = net.empty_kv(2, slots)
    at_slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (2, slots))

    def step(kv: KV, start: np.ndarray, count: int) -> tuple[np.ndarray, KV]:
        depth = jnp.asarray(start[:, None] + np.arange(count), jnp.int32)
        new = jnp.take_along_axis(jnp.asarray(tokens), depth, axis=1)
        keys = Span(
            enter=at_slot,
            exit=jnp.where(at_slot < jnp.asarray(start + count)[:, None], slots, 0),
        )
        span = Span(enter=depth, exit=depth + 1)
        hidden, kv = net.apply(params, new, depth, span, kv, keys, jnp.asarray(start, jnp.int32))
        return np.asarray(hidden), kv

    # A prompt of six for both rows; row 1 forgets two tokens, as a shorter prompt's padding would.
    hidden, kv = step(kv, np.array([0, 0]), 6)
    close("model", hidden, full[:, :6])
    for count in (1, 2, 1):
        hidden, kv = step(kv, lengths, count)
        for row, start in enumerate(lengths):
            want = full[row, start : start + count]
            close("model", hidden[row], want)
        lengths = lengths + count


def test_lanes_that_share_a_cache_equal_the_flattened_trie(small, close) -> None:
    net, params = small
    rng = np.random.default_rng(6)
    prompt, left, right = (rng.integers(0, SMALL.vocab_size, n).astype(np.int32) for n in (5, 4, 4))
    trie = build([np.r_[prompt, left], np.r_[prompt, right]], [None, None])
    batch = jax.tree.map(jnp.asarray, stack_rows([[trie]], 13))
    full, _ = net.apply(params, batch.tokens, batch.depth, batch.span)

    # Slots fill in time order, left and right by turns; enter and exit say who descends from whom.
    slots = 16
    enter = np.zeros((1, slots), np.int32)
    exit = np.zeros((1, slots), np.int32)
    kv = net.empty_kv(1, slots)

    def step(tokens, depth, numbers, ends, start):
        nonlocal kv
        here = slice(start, start + len(tokens))
        enter[0, here], exit[0, here] = numbers, ends
        span = Span(enter=jnp.asarray([numbers], jnp.int32), exit=jnp.asarray([ends], jnp.int32))
        keys = Span(enter=jnp.asarray(enter), exit=jnp.asarray(exit))
        hidden, kv = net.apply(
            params,
            jnp.asarray([tokens], jnp.int32),
            jnp.asarray([depth], jnp.int32),
            span,
            kv,
            keys,
            jnp.array([start], jnp.int32),
        )
        return np.asarray(hidden[0])

    got = step(prompt, np.arange(5), np.arange(5), np.full(5, 1000), 0)
    close("model", got, full[0, :5])
    for turn in range(4):
        got = step(
            [left[turn], right[turn]],
            [5 + turn] * 2,
            [100 + turn, 200 + turn],
            [200, 300],
            5 + 2 * turn,
        )
        close("model", got, full[0, [5 + turn, 9 + turn]])


def decode(net, steps: int, slots: int):
    """A greedy loop, as the sampler's: the cache is a carry of its while loop."""

    def run(params, tokens: jax.Array, start: jax.Array, kv: KV) -> tuple[jax.Array, KV]:
        rows = tokens.shape[0]
        at_slot = jnp.broadcast_to(jnp.arange(slots, dtype=jnp.int32), (rows, slots))

        def body(state):
            count, tokens, kv = state
            at = start[:, None] + count
            keys = Span(enter=at_slot, exit=jnp.where(at_slot <= at, slots, 0))
            span = Span(enter=at, exit=at + 1)
            hidden, kv = net.apply(params, tokens, at, span, kv, keys, start + count)
            return count + 1, net.unembed(params, hidden).argmax(-1).astype(jnp.int32), kv

        _, tokens, kv = jax.lax.while_loop(
            lambda state: state[0] < steps, body, (jnp.int32(0), tokens, kv)
        )
        return tokens, kv

    return run


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("remat", ["none", "full"])
def test_a_decoding_loop_never_copies_the_cache(rows, remat) -> None:
    slots = 2048
    net = network(dataclasses.replace(SMALL, num_layers=16, remat=remat))
    params = jax.eval_shape(net.init, jax.random.key(0))
    kv = jax.eval_shape(lambda: net.empty_kv(rows, slots))
    tokens, start = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((rows, 1), (rows,)))
    compiled = (
        jax.jit(decode(net, 8, slots), donate_argnums=3).lower(params, tokens, start, kv).compile()
    )
    shape = "f32[" + ",".join(map(str, kv.k.shape)) + "]"
    lines = compiled.as_text().splitlines()
    writes = (" dynamic-update-slice(", " scatter(")
    assert any(f"= {shape}" in line and op in line for line in lines for op in writes)
    copies = [line for line in lines if f"= {shape}" in line and " copy(" in line]
    assert copies == []
    memory = compiled.memory_analysis()
    cache_bytes = 2 * 4 * math.prod(kv.k.shape)
    assert memory.alias_size_in_bytes >= cache_bytes
    # What one layer reads is a sixteenth; the rest are scores of one query.
    assert memory.temp_size_in_bytes < 0.12 * cache_bytes


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_no_token_has_get_no_probability_and_no_gradient(tied):
    cfg = dataclasses.replace(SMALL, tie_embeddings=tied)
    net, every = network(cfg, num_ids=33), network(cfg)
    params = net.init(jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (2, 3, cfg.width))
    logits = np.asarray(net.unembed(params, hidden))
    np.testing.assert_array_equal(logits[..., :33], every.unembed(params, hidden)[..., :33])
    probabilities = jax.nn.softmax(logits / 1e-4, axis=-1)
    assert (probabilities[..., 33:] == 0).all()

    (name,) = net.head

    def entropy(table):
        logs = jax.nn.log_softmax(net.unembed({**params, name: table}, hidden), axis=-1)
        return -(jnp.exp(logs) * logs).sum()

    value, gradient = jax.value_and_grad(entropy)(params[name])
    assert 0 < float(value) < 6 * math.log(33)
    assert np.abs(gradient[:33]).max() > 0
    assert not gradient[33:].any()


def test_a_table_whose_rows_are_all_tokens_is_computed_as_without_a_tokenizer():
    params = network(SMALL).init(jax.random.key(0))
    hidden = jnp.zeros((1, 2, SMALL.width))
    programs = {
        str(jax.make_jaxpr(network(SMALL, num_ids=ids).unembed)(params, hidden))
        for ids in (None, SMALL.vocab_size)
    }
    assert len(programs) == 1
    assert "select" not in programs.pop()


@pytest.mark.parametrize("num_ids", [0, 41])
def test_more_ids_than_rows_are_refused(num_ids):
    with pytest.raises(ValueError, match="Give 1 to 40 ids, or raise Model"):
        network(SMALL, num_ids=num_ids)
