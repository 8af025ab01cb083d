"""The decoder, Qwen3 or Llama by config, and `network(cfg)`, which returns it as pure functions.

This is the only file that imports flax.linen. Modules have a single collection, `params`, and
declare the logical axes of a parameter together with the parameter. The position of a token in its
trie is given by its depth and span, and the key/value cache is an argument and a result.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.attention import sequence
from tw_jax.attention.blockwise import KEPT
from tw_jax.attention.dispatch import Impl, attend
from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.contracts import KV, Network, Params, Span
from tw_jax.models.layout import pinned, write_cache
from tw_jax.models.lora import SUFFIX, Lora, added_embeddings, added_logits
from tw_jax.models.rope import Llama3Rope, Rope, YarnRope, rotate, rotation
from tw_jax.sharding import LogicalAxes, constrain

Dtype = Literal["float32", "bfloat16"]

_NO_TOKEN = -1e30
"""Logit of a row without a token. It stays finite after division by a low temperature."""

_KV_AXES = ("layer", "rows", "kv_heads", "slots", "head")


@configurable
class Model:
    """Sizes and numerics of a decoder.

    Norms, rotations, softmax and logits are float32 for all dtypes.

    Attributes:
      vocab_size: Rows of the embedding table, at least the number of ids of the tokenizer.
      num_layers: Number of blocks.
      width: Model width D.
      mlp_width: Width F of the gated MLP.
      num_heads: Query heads N.
      num_kv_heads: Key/value heads G, a divisor of num_heads.
      head_width: Width H of a head, even.
      qk_norm: Whether the queries and keys of each head are normalised, as in Qwen3.
      tie_embeddings: Whether logits are computed with the embedding table.
      rope: Rotary embedding.
      norm_epsilon: Added to the mean square in norms.
      param_dtype: Dtype of stored parameters.
      compute_dtype: Dtype of activations, matrix products and cache.
      remat: Activations that the backward pass recomputes: "none"; "dots", all except products with
        weights and the residuals of attention; "attention", all except the input of each block and
        the residuals of attention, which are of the same size; "full", all except the input of each
        block.
      attention: Attention backend; "auto" takes the first one that supports the case.
      lora: Adapters. With them only the adapters are trained; None trains all parameters.
    """

    vocab_size: int
    num_layers: int
    width: int
    mlp_width: int
    num_heads: int
    num_kv_heads: int
    head_width: int
    qk_norm: bool
    tie_embeddings: bool
    rope: Rope | Llama3Rope | YarnRope
    norm_epsilon: float = 1e-6
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "float32"
    remat: Literal["none", "dots", "attention", "full"] = "none"
    attention: Impl = "auto"
    lora: Lora | None = None

    def check(self) -> None:
        """Raises ValueError for sizes that contradict each other."""
        sizes = ("vocab_size", "num_layers", "width", "mlp_width", "num_heads", "num_kv_heads")
        require(self, *sizes, "head_width", least=1)
        require(self, "norm_epsilon", above=0)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"Model.num_kv_heads = {self.num_kv_heads} must divide Model.num_heads = "
                f"{self.num_heads}."
            )
        if self.head_width % 2:
            raise ValueError(
                f"Model.head_width = {self.head_width} must be even, because the rotary embedding "
                "rotates pairs of entries."
            )
        ids = () if self.lora is None else self.lora.token_rows or ()
        if max(ids, default=0) >= self.vocab_size:
            raise ValueError(
                f"Lora.token_rows = {ids} must be below Model.vocab_size = {self.vocab_size}. Give "
                "ids of the tokenizer of this model."
            )


class RmsNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis, computed in float32."""

    cfg: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[..., W] to [..., W] in the same dtype."""
        scale = _declare(self, "scale", x.shape[-1:], ("norm",), nn.initializers.ones)
        y = x.astype(jnp.float32)
        y *= jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.cfg.norm_epsilon)
        return (y * scale.astype(jnp.float32)).astype(x.dtype)


class Attention(nn.Module):
    """Grouped-query attention with the interval mask of a trie, with or without a cache."""

    cfg: Model

    @nn.compact
    def __call__(
        self,
        x: jax.Array,  # [B, T, D]
        kv: KV | None,
        layer: jax.Array,  # [] int32
        cos_sin: tuple[jax.Array, jax.Array],  # [B, T, H / 2] each
        at: jax.Array,  # [B, T] int32
        keys: Span,  # [B, T], or [B, S] with a cache
        start: jax.Array | None,  # [B] int32
    ) -> tuple[jax.Array, KV | None]:
        """The output for the T tokens of each row, [B, T, D], and the updated cache."""
        cfg = self.cfg
        heads, kv_heads, head = cfg.num_heads, cfg.num_kv_heads, cfg.head_width

        def project(name: str, count: int, axis: str) -> jax.Array:
            # Weights are matrices. An array with a dimension of heads has another layout in the
            # memory of a TPU and would be copied before the product.
            y = _times(self, name, x, (cfg.width, count * head), ("embed", axis), fan_in=cfg.width)
            if kv is not None:
                # Otherwise the compiler would put heads first in memory here too. For that it would
                # copy and transpose the weights of all layers before the decoding loop.
                y = pinned(y, ("rows", "tokens", axis))
            y = constrain(y.reshape(*x.shape[:2], count, head), ("rows", "tokens", axis, None))
            return y.swapaxes(1, 2)

        q = project("q", heads, "heads")
        k = project("k", kv_heads, "kv_heads")
        v = project("v", kv_heads, "kv_heads")
        if cfg.qk_norm:
            q = RmsNorm(cfg, name="q_norm")(q)
            k = RmsNorm(cfg, name="k_norm")(k)
        q, k = rotate(q, cos_sin), rotate(k, cos_sin)
        if kv is not None and start is not None:
            kv = KV(k=write_cache(kv.k, k, layer, start), v=write_cache(kv.v, v, layer, start))
        mixed = attend(
            q,
            k if kv is None else kv.k,
            v if kv is None else kv.v,
            at=at,
            keys=keys,
            layer=None if kv is None else layer,
            impl=cfg.attention,
            scale=head**-0.5,
        )
        y = _times(
            self,
            "out",
            mixed.swapaxes(1, 2).reshape(*x.shape[:2], heads * head),
            (heads * head, cfg.width),
            ("heads", "embed"),
            fan_in=2 * cfg.num_layers * heads * head,
        )
        return constrain(y, ("rows", "tokens", "width")), kv


class Mlp(nn.Module):
    """The gated MLP: down(silu(gate(x)) * up(x))."""

    cfg: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, T, D] to [B, T, D]."""
        wide, deep = self.cfg.width, self.cfg.mlp_width
        gate = _times(self, "gate", x, (wide, deep), ("embed", "mlp"), fan_in=wide)
        up = _times(self, "up", x, (wide, deep), ("embed", "mlp"), fan_in=wide)
        y, back = jax.nn.silu(gate) * up, ("mlp", "embed")
        return _times(self, "down", y, (deep, wide), back, fan_in=2 * self.cfg.num_layers * deep)


class Adapter(nn.Module):
    """The term alpha / rank * (x A) B that LoRA adds to the product with a weight; see `Lora`.

    A and B are float32 for any dtype of the weight, because they are trained. A has the logical
    axis of the weight's input and B that of its output, so both are split like the weight.
    """

    cfg: Model

    @nn.compact
    def __call__(self, x: jax.Array, shape: tuple[int, int], axes: LogicalAxes) -> jax.Array:
        """[B, T, K] to [B, T, M], for a weight [K, M] with these axes."""
        lora = self.cfg.lora
        assert lora is not None
        a = _declare(
            self,
            "a",
            (shape[0], lora.rank),
            (axes[0], "rank"),
            _normal(shape[0]),
            dtype="float32",
        )
        b = _declare(
            self,
            "b",
            (lora.rank, shape[1]),
            ("rank", axes[1]),
            nn.initializers.zeros,
            dtype="float32",
        )
        few = _product(x, a.astype(x.dtype)) * lora.scale
        return _product(few, b.astype(x.dtype))


class DecoderBlock(nn.Module):
    """One layer: attention, then the MLP, each with a norm before it and a residual connection.

    It has the signature of the body of a scan. It can also be applied to the parameters of a single
    layer.
    """

    cfg: Model

    @nn.compact
    def __call__(
        self,
        carry: tuple[jax.Array, KV | None],  # [B, T, D], and the cache of all layers
        layer: jax.Array,
        cos_sin: tuple[jax.Array, jax.Array],
        at: jax.Array,
        keys: Span,
        start: jax.Array | None,
    ) -> tuple[tuple[jax.Array, KV | None], None]:
        """(carry, layer, arguments shared by all layers) -> (carry, None); see `Attention`."""
        x, kv = carry
        normed = RmsNorm(self.cfg, name="attention_norm")(x)
        mixed, kv = Attention(self.cfg, name="attention")(
            normed, kv, layer, cos_sin, at, keys, start
        )
        x += mixed
        x += Mlp(self.cfg, name="mlp")(RmsNorm(self.cfg, name="mlp_norm")(x))
        return (x, kv), None


class Decoder(nn.Module):
    """Embedding, blocks and final norm; `unembed` computes logits from the result."""

    cfg: Model

    def setup(self) -> None:
        """Declares the parameters."""
        cfg = self.cfg
        table = ((cfg.vocab_size, cfg.width), ("vocab", "embed"), _normal(cfg.width))
        self.embed = _declare(self, "embed", *table)
        self.head = self.embed if cfg.tie_embeddings else _declare(self, "unembed", *table)
        self.ids = np.asarray(() if cfg.lora is None else cfg.lora.token_rows or (), np.int32)
        self.embed_rows = self.head_rows = None
        if self.ids.size:
            shape, axes = (self.ids.size, cfg.width), ("rank", "embed")
            rows = (shape, axes, nn.initializers.zeros)
            self.embed_rows = _declare(self, "embed" + SUFFIX, *rows, dtype="float32")
            self.head_rows = self.embed_rows
            if not cfg.tie_embeddings:
                self.head_rows = _declare(self, "unembed" + SUFFIX, *rows, dtype="float32")
        self.blocks = nn.scan(
            _remat(DecoderBlock, cfg),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, *(nn.broadcast,) * 4),  # pyright: ignore[reportArgumentType]
            length=cfg.num_layers,
            metadata_params={nn.PARTITION_NAME: "layer"},
        )(cfg)
        self.norm = RmsNorm(cfg)

    def __call__(
        self,
        tokens: jax.Array,
        depth: jax.Array,
        at: jax.Array,
        keys: Span,
        kv: KV | None,
        start: jax.Array | None,
    ) -> tuple[jax.Array, KV | None]:
        """Hidden states [B, T, D] after the final norm, and the cache; see `Network.apply`."""
        cfg = self.cfg
        x = self.lookup(tokens)
        cos_sin = rotation(cfg.rope, cfg.head_width, depth)
        layers = jnp.arange(cfg.num_layers, dtype=jnp.int32)
        # The cache is a carry. If it were scanned over, every step would copy all of it.
        (x, kv), _ = self.blocks((x, kv), layers, cos_sin, at, keys, start)
        return self.norm(x), kv

    def lookup(self, tokens: jax.Array) -> jax.Array:
        """Embeddings of [B, T] ids, [B, T, D] in the compute dtype."""
        # The table is not split along its width here. If it were, the lookup would bring all rows
        # to every device. The cast comes after the lookup, so that the gradients of a token that
        # occurs several times are added in the dtype of the parameter.
        table = constrain(self.embed, ("vocab", "width"))
        x = table[tokens]
        if self.embed_rows is not None:
            x = x.astype(jnp.float32) + added_embeddings(self.embed_rows, tokens, self.ids)
        return constrain(x.astype(self.cfg.compute_dtype), ("rows", "tokens", "width"))

    def unembed(self, hidden: jax.Array) -> jax.Array:
        """[..., D] to logits [..., V] float32."""
        logits = jnp.einsum(
            "...d,vd->...v",
            hidden,
            self.head.astype(hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        if self.head_rows is not None:
            logits += added_logits(self.head_rows, hidden, self.ids, self.cfg.vocab_size)
        leading = ("rows", "tokens") if hidden.ndim == 3 else (None,) * (hidden.ndim - 1)
        return constrain(logits, (*leading, "vocab"))


def with_token_rows(cfg: Model, added: Sequence[int]) -> Model:
    """Fills in `Lora.token_rows` where the config leaves them open.

    Args:
      cfg: A model, with or without adapters.
      added: Ids of the control tokens that the import added to the base model; may be empty.

    Returns:
      The model with `Lora.token_rows = added` if it has adapters and their `token_rows` are None,
      and otherwise the model as it is.
    """
    if cfg.lora is None or cfg.lora.token_rows is not None:
        return cfg
    lora = dataclasses.replace(cfg.lora, token_rows=tuple(added))
    return dataclasses.replace(cfg, lora=lora)


def network(cfg: Model, *, num_ids: int | None = None) -> Network:
    """The decoder as pure functions; see `Network` for their arguments and results.

    Args:
      cfg: Sizes and numerics. If `Lora.token_rows` is None, no rows are trained.
      num_ids: Number of ids of the tokenizer. The logits of all later rows are set to a floor. None
        keeps all `Model.vocab_size` rows, as PyTorch does.

    Returns:
      A `Network`. `init` consumes its key and runs under jit, so an enclosing `jax.jit` can shard
      its result. `empty_kv` returns a cache in the compute dtype.

    Raises:
      ValueError: If there are fewer rows than ids.
    """
    rows, num_ids = cfg.vocab_size, cfg.vocab_size if num_ids is None else num_ids
    if not 0 < num_ids <= rows:
        raise ValueError(
            f"num_ids = {num_ids}: the table has {rows} rows. Give 1 to {rows} ids, or raise "
            "Model.vocab_size."
        )
    # Flax types the result of apply as a union with mutated collections, which do not exist here.
    decoder: Any = Decoder(cfg)

    def apply(
        params: Params,
        tokens: jax.Array,
        depth: jax.Array,
        span: Span,
        kv: KV | None = None,
        keys: Span | None = None,
        start: jax.Array | None = None,
    ) -> tuple[jax.Array, KV | None]:
        chex.assert_rank(tokens, 2)
        chex.assert_equal_shape([tokens, depth, span.enter, span.exit])
        _check_cache(cfg, tokens.shape[0], kv, keys, start)
        if kv is not None:
            return decoder.apply({"params": params}, tokens, depth, span.enter, keys, kv, start)

        def whole(tokens: jax.Array, depth: jax.Array, span: Span) -> jax.Array:
            given = {"params": params}, tokens, depth, span.enter, span, None, None
            return decoder.apply(*given)[0]

        return sequence.spread(whole, tokens, depth, span), None

    def unembed(params: Params, hidden: jax.Array) -> jax.Array:
        logits = decoder.apply({"params": params}, hidden, method="unembed")
        if num_ids == rows:
            return logits
        # A select is elementwise, so a vocabulary that is split over devices stays split.
        return jnp.where(jnp.arange(rows) < num_ids, logits, _NO_TOKEN)

    def boxed(key: jax.Array) -> Params:
        one = jnp.zeros((1, 1), jnp.int32)
        span = Span(enter=one, exit=one + 1)
        return decoder.init(key, one, one, span.enter, span, None, None)["params"]

    def axes() -> Params:
        return jax.tree.map(
            lambda box: box.names,
            jax.eval_shape(boxed, jax.random.key(0)),
            is_leaf=lambda node: isinstance(node, nn.LogicallyPartitioned),
        )

    def empty_kv(rows: int, slots: int) -> KV:
        shape = (cfg.num_layers, rows, cfg.num_kv_heads, slots, cfg.head_width)
        zeros = constrain(jnp.zeros(shape, cfg.compute_dtype), _KV_AXES)
        return KV(k=zeros, v=jnp.copy(zeros))

    return Network(
        apply=apply,
        unembed=unembed,
        init=jax.jit(lambda key: nn.unbox(boxed(key))),
        axes=axes,
        empty_kv=empty_kv,
        head=_head(cfg),
        num_ids=num_ids,
    )


def _head(cfg: Model) -> tuple[str, ...]:
    """Names of the outermost parameters that `unembed` reads."""
    table = "embed" if cfg.tie_embeddings else "unembed"
    has_rows = cfg.lora is not None and cfg.lora.token_rows
    return (table, table + SUFFIX) if has_rows else (table,)


def walk(
    cfg: Model, params: Params, tokens: jax.Array, depth: jax.Array, span: Span
) -> Iterator[tuple[str, jax.Array]]:
    """The hidden states of `Network.apply` after each module, to compare implementations.

    Args:
      cfg: Sizes and numerics.
      params: Parameters.
      tokens: [B, T] int32.
      depth: [B, T] int32.
      span: [B, T].

    Yields:
      ("embed", "block.0", "block.1", ..., "norm") and [B, T, D] in the compute dtype.
    """
    cos_sin = rotation(cfg.rope, cfg.head_width, depth)

    @jax.jit
    def one(weights: Params, x: jax.Array, layer: jax.Array) -> jax.Array:
        made: Any = DecoderBlock(cfg).apply(
            {"params": weights}, (x, None), layer, cos_sin, span.enter, span, None
        )
        return made[0][0]

    x: Any = Decoder(cfg).apply({"params": params}, tokens, method="lookup")
    yield "embed", x
    for number in range(cfg.num_layers):
        weights = jax.tree.map(lambda stacked, i=number: stacked[i], params["blocks"])
        x = one(weights, x, jnp.asarray(number, jnp.int32))
        yield f"block.{number}", x
    final: Any = RmsNorm(cfg).apply({"params": params["norm"]}, x)
    yield "norm", final


def _check_cache(
    cfg: Model, rows: int, kv: KV | None, keys: Span | None, start: jax.Array | None
) -> None:
    if kv is None and keys is None and start is None:
        return
    if kv is None or keys is None or start is None:
        raise ValueError(
            "Of kv, keys and start some are given and some are None. Give all three to write into "
            "a cache, or none to attend within the tokens."
        )
    slots = kv.k.shape[3]
    shape = (cfg.num_layers, rows, cfg.num_kv_heads, slots, cfg.head_width)
    chex.assert_shape([kv.k, kv.v], shape)
    chex.assert_shape([keys.enter, keys.exit], (rows, slots))
    chex.assert_shape(start, (rows,))


def _declare(
    module: Any,
    name: str,
    shape: tuple[int, ...],
    axes: LogicalAxes,
    init: Any,
    *,
    dtype: Dtype | None = None,
) -> jax.Array:
    """Declares a parameter with its logical axes, by default in `param_dtype`."""
    boxed_init = nn.with_logical_partitioning(init, axes)
    return module.param(name, boxed_init, shape, jnp.dtype(dtype or module.cfg.param_dtype))


def _times(
    module: Any,
    name: str,
    x: jax.Array,
    shape: tuple[int, int],
    axes: LogicalAxes,
    *,
    fan_in: int,
) -> jax.Array:
    """The product of [B, T, K] with a declared weight [K, M], plus the output of its adapter."""
    cfg = module.cfg
    weight = _declare(module, name, shape, axes, _normal(fan_in)).astype(cfg.compute_dtype)
    if cfg.lora is None:
        return _product(x, weight)
    # The plain product instead of `_product`, because JAX removes the gradient of a frozen weight
    # from the former, and not from a custom derivative.
    y = x @ weight
    if f"{module.name}.{name}" in cfg.lora.targets:
        y += Adapter(cfg, name=name + SUFFIX)(x, shape, axes)
    return y


def _normal(fan_in: int) -> Any:
    """A normal of variance 1 / fan_in, truncated at two standard deviations of the full normal."""
    # 0.8796 is the standard deviation of a unit normal that is truncated at +-2.
    return nn.initializers.truncated_normal(stddev=1 / (0.87962566 * math.sqrt(fan_in)))


@jax.custom_vjp
def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """[B, T, K] times [K, M]; the gradient is that of `x @ w`, in a form that is fast on CPU.

    For the gradient of `w`, XLA for CPU would transpose the cotangent and fuse the transposition
    with the computation of the cotangent into one loop with strided access: 27 ms instead of 3 at
    [4096, 768], a sixth of the time outside of attention (jax 0.10.2). A barrier on CPU prevents
    the fusion.
    """
    return x @ w


def _product_forward(x: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
    return x @ w, (x, w)


def _product_backward(kept: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    dy = jax.lax.platform_dependent(dy, cpu=jax.lax.optimization_barrier, default=lambda dy: dy)
    return jnp.einsum("btm,km->btk", dy, w), jnp.einsum("btk,btm->km", x, dy)


_product.defvjp(_product_forward, _product_backward)


def _remat(block: type[DecoderBlock], cfg: Model) -> Any:
    if cfg.remat == "none":
        return block
    attention = jax.checkpoint_policies.save_only_these_names(KEPT)
    policies = {
        "dots": jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.dots_with_no_batch_dims_saveable, attention
        ),
        "attention": attention,
        "full": None,
    }
    # Inside a scan the compiler cannot undo the recomputation, so it needs no barrier.
    return nn.remat(block, prevent_cse=False, policy=policies[cfg.remat])
