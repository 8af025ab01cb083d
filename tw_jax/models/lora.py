"""Low-rank adapters (LoRA): their config, and which parameters are trained because of them.

An adapter is a node of the parameter tree next to its weight: `q_lora` next to `q`, with the arrays
`a` and `b`; `embed_lora` next to `embed`, an array of rows. `models/transformer.py` declares
them. This is the only place that decides what training changes: the adapters if the tree has any,
and otherwise all parameters. The functions here work on any nested dict with the names of the
parameters, so they split gradients, logical axes and shardings as well.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.contracts import Params
from tw_jax.sharding import constrain

SUFFIX = "_lora"
"""An adapter has the name of its weight with this suffix."""

Target = Literal[
    "attention.q",
    "attention.k",
    "attention.v",
    "attention.out",
    "mlp.gate",
    "mlp.up",
    "mlp.down",
]


@configurable
class Lora:
    """Low-rank adapters next to frozen weights.

    y = x W + alpha / rank * (x A) B, with A [in, rank] initialised at random with variance 1 / in
    and B [rank, out] initialised to zero, so that training starts from the function of W. All other
    parameters are frozen: they have no gradients and no optimiser moments. Source: LoRA
    (arXiv:2106.09685), section 4.1.

    New tokens are an exception, because a low-rank update of the blocks cannot teach the model an
    embedding that it never had. The rows of `token_rows` are trained in full, in the embedding and,
    unless the embeddings are tied, in the output head.

    Attributes:
      rank: Number of columns of A and of rows of B.
      alpha: Scale of the adapter's output; the product is multiplied by alpha / rank.
      targets: Weights of a block that have an adapter, as module.name.
      token_rows: Ids of the tokens whose rows are trained. () trains no rows. None takes the
        control tokens that `tw convert` added to the base model; a network that is built without a
        program trains no rows.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...] = get_args(Target)
    token_rows: tuple[int, ...] | None = None

    @property
    def scale(self) -> float:
        """Alpha / rank."""
        return self.alpha / self.rank

    def check(self) -> None:
        """Raises ValueError for adapters without effect, and for repeated names or ids."""
        require(self, "rank", least=1)
        require(self, "alpha", above=0)
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"Lora.targets = {self.targets} must name at least one weight, and each weight "
                "only once. To train all parameters, set Model.lora = None."
            )
        ids = self.token_rows or ()
        if len(set(ids)) < len(ids) or min(ids, default=0) < 0:
            raise ValueError(
                f"Lora.token_rows = {ids} must contain ids of at least 0, and each id only once. "
                "Set it to () to train no rows."
            )


def trained(tree: Params) -> Params:
    """The part of a tree that training changes: its adapters, or all of it if it has none.

    Args:
      tree: Parameters, or a nested dict with the same names, for example of logical axes.
    """
    return _adapters(tree) or tree


def without_adapters(tree: Params) -> Params:
    """The part of a tree that belongs to the base model."""
    return {
        name: without_adapters(node) if isinstance(node, dict) else node
        for name, node in tree.items()
        if not name.endswith(SUFFIX)
    }


def overlay(under: Any, over: Any) -> Any:
    """Merges two trees; where both have a leaf, the result has the leaf of `over`."""
    if not isinstance(over, dict):
        return over
    both = {name: overlay(under[name], node) for name, node in over.items() if name in under}
    return {**under, **over, **both}


def trained_before(began: Params, current: Params) -> Params:
    """The trained part of a run's first parameters, from which `overlay` restores the model.

    Args:
      began: Parameters before the first step. They may lack the adapters if these were fresh.
      current: Parameters of the run, with adapters if it trains any. Only shapes, dtypes and
        shardings of adapters are read.

    Returns:
      A tree with the structure of `trained(current)`. Missing adapters are zeros, because a fresh
      adapter and an adapter of zeros both add nothing.
    """
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding), _adapters(current)
    )
    return trained(overlay(zeros, began))


# The rows of `token_rows` are kept as float32 differences to the rows of the frozen table. They are
# selected by products with one-hot matrices instead of being written into the table, so the table
# is neither copied nor differentiated, and a vocabulary that is split over devices stays split. For
# N rows such a product costs N / D of the head's own product; N is about twelve.


def added_embeddings(rows: jax.Array, tokens: jax.Array, ids: np.ndarray) -> jax.Array:
    """The difference that trained rows make to the embeddings of tokens.

    Args:
      rows: [N, D] float32.
      tokens: [B, T] int32.
      ids: [N] int32, the tokens that the rows belong to.

    Returns:
      [B, T, D] float32, exactly 0 for all other tokens.
    """
    is_row = (tokens[..., None] == ids).astype(jnp.float32)
    rows = constrain(rows, ("rank", "width"))
    return jnp.einsum("btn,nd->btd", is_row, rows, precision=jax.lax.Precision.HIGHEST)


def added_logits(rows: jax.Array, hidden: jax.Array, ids: np.ndarray, vocab_size: int) -> jax.Array:
    """The difference that trained rows make to the logits.

    Args:
      rows: [N, D] float32.
      hidden: [..., D], in the compute dtype.
      ids: [N] int32, the tokens that the rows belong to.
      vocab_size: V.

    Returns:
      [..., V] float32, exactly 0 for all other tokens.
    """
    few = jnp.einsum(
        "...d,nd->...n", hidden, rows.astype(hidden.dtype), preferred_element_type=jnp.float32
    )
    is_row = (ids[:, None] == jnp.arange(vocab_size)).astype(jnp.float32)
    return jnp.einsum("...n,nv->...v", few, is_row, precision=jax.lax.Precision.HIGHEST)


def merged(weight: np.ndarray, adapter: Params | np.ndarray, lora: Lora) -> np.ndarray:
    """One weight with its adapter merged into it.

    Args:
      weight: [K, M], any dtype: a weight of one layer, or an embedding table [V, D].
      adapter: Either {a: [K, rank], b: [rank, M]}, or the trained rows [number of token_rows, D];
        float32.
      lora: `scale` and `token_rows` are read.

    Returns:
      [K, M] float32 for any dtype of the weight, because rounding the sum to bfloat16 would lose
      most of a small update: W + alpha / rank * A B, or the table with the trained rows added to
      its rows `token_rows`.
    """
    weight = weight.astype(np.float32)
    if not isinstance(adapter, dict):
        weight[list(lora.token_rows or ())] += np.asarray(adapter)
        return weight
    return weight + np.float32(lora.scale) * (np.asarray(adapter["a"]) @ np.asarray(adapter["b"]))


def _adapters(tree: Params) -> Params:
    """The part of a tree that belongs to adapters; {} if it has none."""
    found: Params = {}
    for name, node in tree.items():
        if name.endswith(SUFFIX):
            found[name] = node
        elif isinstance(node, dict) and (inner := _adapters(node)):
            found[name] = inner
    return found
