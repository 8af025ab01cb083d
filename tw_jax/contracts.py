"""Types that the packages share: parameters, spans, the key/value cache and the network.

Data is converted in one direction: `Trajectory` of `Call`s (ids, host) -> `Trie` (numpy, host) ->
`TrieBatch` (arrays, device).

Shape letters, used in every docstring and, in lower case, in every einsum:

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
    """The interval of each token in its trie: i attends to j iff `enter[j] <= enter[i] < exit[j]`.

    In a packed row `enter` is the index of the token, so the condition is `j <= i < end[j]`: j is i
    or one of its ancestors. In the sampler's cache the numbers are logical, because a fork reserves
    a range of numbers for each thread. A padding token has `exit = enter + 1`, so it attends only
    to itself. An unused slot of a cache has `exit <= enter`, so no query attends to it.
    """

    enter: jax.Array  # [B, T] int32
    exit: jax.Array  # [B, T] int32, one past the last descendant


class KV(struct.PyTreeNode):
    """Keys (already rotated) and values of every layer. Loops carry it; no scan slices it."""

    k: jax.Array  # [L, B, G, S, H]
    v: jax.Array  # [L, B, G, S, H]


class Network(NamedTuple):
    """A language model as pure functions, the only form in which steps and the sampler use it.

    `apply(params, tokens, depth, span, kv=None, keys=None, start=None) -> (hidden, kv)`

    - tokens: [B, T] int32 ids. depth: [B, T] int32 positions, 0 at a root. span: [B, T].
    - Without `kv` the tokens attend to each other. With `kv`, the T new entries of row b are
      written to the slots `start[b] .. start[b] + T - 1`, start: [B] int32, and the queries attend
      to all S slots through `keys`, [B, S] spans that already describe the new slots. The caller
      guarantees `start + T <= S`, because JAX would silently clamp the start of the update.
    - hidden: [B, T, D] in the compute dtype, after the final norm.

    `unembed(params, hidden [..., D]) -> logits [..., V] float32` reads only the parameters `head`,
    names of the outermost level of `params`: the table and, if `Lora.token_rows` are trained, their
    rows. The first `num_ids` logits belong to tokens. A table may have more rows so that its size
    is divisible over a mesh; their logits are a finite floor, so a softmax gives them probability 0
    and their rows get no gradient. The sampler and the losses therefore use the same distribution.
    `init(key) -> Params`, unboxed. `axes()` returns a tree like `Params` of tuples of logical axis
    names. `empty_kv(rows, slots) -> KV` of zeros.
    """

    apply: Callable[..., tuple[jax.Array, KV | None]]
    unembed: Callable[[Params, jax.Array], jax.Array]
    init: Callable[[jax.Array], Params]
    axes: Callable[[], Params]
    empty_kv: Callable[[int, int], KV]
    head: tuple[str, ...]
    num_ids: int
