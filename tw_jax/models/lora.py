"""Low-rank adapters (LoRA): which weights have one, which leaves are theirs, and how they merge.

An adapter stands beside its weight in the tree of parameters, as `q_lora` beside `q`, and holds the
arrays `a` and `b`; `models/transformer.py` declares it. Where a tree has adapters, training moves
these and nothing else. This file knows trees and paths; it hands their parts to `train/`,
`programs/` and `models/hf.py`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np

from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.contracts import Params

SUFFIX = "_lora"
"""How the name of an adapter ends, behind the name of its weight."""

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
    """Low-rank adapters beside weights that are frozen.

    y = x W + alpha / rank * (x A) B, with A [in, rank] random at first, of variance 1 / in, and B
    [rank, out] zero, so that training begins with the very function of W. All other parameters are
    frozen: they have no gradient and no moments. Source: LoRA (arXiv:2106.09685), section 4.1.

    Attributes:
      rank: columns of A and rows of B.
      alpha: times 1 / rank what an adapter adds; with it fixed, the learning rate need not follow
        the rank.
      targets: paths of the weights within a block that have an adapter.
    """

    rank: int
    alpha: float
    targets: tuple[Target, ...] = get_args(Target)

    @property
    def scale(self) -> float:
        """Alpha / rank."""
        return self.alpha / self.rank

    def check(self) -> None:
        """Refuses adapters that add nothing."""
        require(self, "rank", least=1)
        require(self, "alpha", above=0)
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ValueError(
                f"Lora.targets = {self.targets}: want at least one weight, and each once. To train "
                "all parameters, set Model.lora = None."
            )


def adapters(tree: Params) -> Params:
    """The part of a tree that belongs to adapters; {} where there are none.

    Args:
      tree: parameters, or a nested dict of the same names, of axes or shardings for instance.
    """
    found: Params = {}
    for name, node in tree.items():
        if name.endswith(SUFFIX):
            found[name] = node
        elif isinstance(node, dict) and (inner := adapters(node)):
            found[name] = inner
    return found


def without_adapters(tree: Params) -> Params:
    """The part of a tree that belongs to no adapter: the parameters of the model beneath."""
    return {
        name: without_adapters(node) if isinstance(node, dict) else node
        for name, node in tree.items()
        if not name.endswith(SUFFIX)
    }


def trained(tree: Params) -> Params:
    """The part of a tree that training moves: the adapters where there are any, else all of it."""
    return adapters(tree) or tree


def overlay(under: Any, over: Any) -> Any:
    """A tree with the leaves of two; where both have one, it is that of `over`."""
    if not isinstance(over, dict):
        return over
    both = {name: overlay(under[name], node) for name, node in over.items() if name in under}
    return {**under, **over, **both}


def merged(weight: np.ndarray, adapter: Params, lora: Lora) -> np.ndarray:
    """One layer's weight with its adapter in it: W + alpha / rank * A B.

    Args:
      weight: [K, M], any dtype.
      adapter: `a` [K, rank] and `b` [rank, M], float32.
      lora: its scale is read.

    Returns:
      [K, M] float32, whatever the dtype of the weight: in bfloat16 most of what was learnt
      would be rounded away.
    """
    added = np.asarray(adapter["a"]) @ np.asarray(adapter["b"])
    return weight.astype(np.float32) + np.float32(lora.scale) * added
