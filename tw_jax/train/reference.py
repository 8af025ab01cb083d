"""The reference of the KL term: the model that a run began with, as far as training moves it.

This file knows neither configs nor batches of rollouts; it is given parameters and a way to score
tokens with parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from tw_jax.contracts import Params
from tw_jax.models.lora import overlay, trained_before
from tw_jax.trie.batch import TrieBatch

Logp = Callable[[Params, TrieBatch], jax.Array]
"""(parameters, batch [R, T]) -> [R, T] float32 nats, as `make_logp` builds it."""


def reference_logp(logp: Logp, began: Params, current: Params) -> Logp:
    """Scores tokens with the parameters that the run began with.

    What training moves is kept of them, and the rest is read from the current parameters, which
    the reference shares.

    Args:
      logp: scores with any parameters; it is compiled here.
      began: parameters before the first step, without adapters if these were fresh.
      current: the present parameters, for the shapes and places of adapters.

    Returns:
      (current parameters, batch) -> log-probabilities of the reference.
    """
    kept = trained_before(began, current)
    compiled = jax.jit(logp)
    return lambda params, batch: compiled(overlay(params, kept), batch)
