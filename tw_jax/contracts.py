"""What the rooms hand each other: parameters, spans, the key/value cache and the network.

Ownership, in one line: `Trajectory` of `Call`s (ids, host) -> `Trie` (numpy, host) -> `TrieBatch`
(arrays, device). This file knows shapes and nothing else.

Shape letters, used in every docstring and einsum (there in lower case):

    B  rows of a batch                     L  layers
    T  tokens of a row = nodes of its      D  model width
       tries, or queries of a step         F  MLP width
    P  prompts of a step                   N  query heads
    K  rollouts per prompt                 G  key/value heads
    C  lanes = threads of one fork         H  head width
    S  slots of a cache                    V  vocabulary
    R  calls of a trajectory
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import struct

Params = dict[str, Any]
"""A nested dict of arrays with stable paths; layers are stacked on the leading axis L."""


class Span(struct.PyTreeNode):
    """Where each token stands in its trie: i sees j iff `enter[j] <= enter[i] < exit[j]`.

    In a packed row `enter` is the index itself, which makes this the stated `j <= i < end[j]`.
    In the sampler's cache the numbers are logical: a fork reserves a range for each thread.
    Padding stands alone: its `exit` is `enter + 1` as a query row, and an unused cache slot has
    `exit <= enter`, so nothing sees it.
    """

    enter: jax.Array  # [B, T] int32
    exit: jax.Array  # [B, T] int32, one past the last descendant


class KV(struct.PyTreeNode):
    """Keys (already rotated) and values of every layer; a loop carry, never scanned in and out."""

    k: jax.Array  # [L, B, G, S, H]
    v: jax.Array  # [L, B, G, S, H]


class Network(NamedTuple):
    """A language model as pure functions. Steps, losses and the sampler know no more of it.

    `apply(params, tokens, depth, span, kv=None, keys=None, start=None) -> (hidden, kv)`

    - tokens: [B, T] int32 ids. depth: [B, T] int32 positions, 0 at a root. span: [B, T].
    - Without `kv` the tokens attend among themselves. With `kv`, the T new entries of row b are
      written to the slots `start[b] .. start[b] + T - 1` (start: [B] int32; the caller guarantees
      `start + T <= S`, because an update slice would be clamped silently) and the queries attend to
      all S slots through `keys` ([B, S] spans, which already describe the new slots).
    - hidden: [B, T, D] in the compute dtype, after the final norm.

    `unembed(params, hidden [..., D]) -> logits [..., V] float32`, of all parameters reads `table`
    alone, a name of their outermost level. Only the first `num_ids` logits belong to tokens. A
    table may have more rows, so that a mesh divides them; their logits are a finite floor, so a
    softmax gives them probability 0 and their rows get no gradient. Sampler and losses therefore
    use one distribution.
    `init(key) -> Params`, unboxed. `axes() -> Params`-shaped tree of tuples of logical axis names.
    `empty_kv(rows, slots) -> KV` of zeros.
    """

    apply: Callable[..., tuple[jax.Array, KV | None]]
    unembed: Callable[[Params, jax.Array], jax.Array]
    init: Callable[[jax.Array], Params]
    axes: Callable[[], Params]
    empty_kv: Callable[[int, int], KV]
    head: tuple[str, ...]
    num_ids: int
