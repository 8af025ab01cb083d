"""The reference model of the KL term: the model with which a run started.

Only the trained part of its parameters is kept. The frozen part is that of the current parameters.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from tw_jax.contracts import Params
from tw_jax.models.lora import overlay, trained_before
from tw_jax.trie.batch import TrieBatch

Logp = Callable[[Params, TrieBatch], jax.Array]
"""(parameters, batch [R, T]) -> [R, T] float32 log-probs in nats, as `make_logp` builds it."""


def reference_logp(logp: Logp, began: Params, current: Params) -> Logp:
    """Builds a function that scores tokens with the parameters at the start of the run.

    Args:
      logp: Scores with any parameters; it is compiled here.
      began: Parameters before the first step. They may lack the adapters if these were fresh.
      current: The current parameters; shapes, dtypes and shardings of adapters are read.

    Returns:
      (current parameters, batch) -> log-probs of the reference model.
    """
    kept = trained_before(began, current)
    compiled = jax.jit(logp)
    return lambda params, batch: compiled(overlay(params, kept), batch)
