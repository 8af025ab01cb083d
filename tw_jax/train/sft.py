"""Supervised training on packed tries: the mean negative log-likelihood of the weighted nodes.

The batch determines the objective: `weight` selects the trained nodes, and `parent` is the node
from which each is predicted. The fork-join loss, the flat labels of the PyTorch reference and the
sequential baseline on chain tries are therefore the same step on different batches, all of which
`trie/tree.py` builds.
"""

from __future__ import annotations

import jax

from tw_jax.contracts import Network, Params
from tw_jax.train.loss import Sums, accumulate, token_logp, weighted_mean
from tw_jax.train.state import Numbers, Optim, Step, TrainState, update
from tw_jax.trie.batch import TrieBatch


def nll_sums(
    network: Network, params: Params, batch: TrieBatch, *, chunk_tokens: int
) -> tuple[jax.Array, Sums]:
    """The weighted negative log-likelihood of a batch, before division.

    total = sum over rows and nodes of -weight * logp

    Args:
      network: The model.
      params: Its parameters; the only argument with a gradient.
      batch: [B, T]; weights of at least 0.
      chunk_tokens: Nodes of a row that are unembedded at a time, see `token_logp`.

    Returns:
      (total, sums). The sums are `weight`, the sum of all weights; `tokens`, the number of nodes
      with a weight above 0; and `correct`, how many of these nodes are the most likely token after
      their parent.
    """
    hidden, _ = network.apply(params, batch.tokens, batch.depth, batch.span)
    scores = token_logp(network, params, hidden, batch=batch, chunk_tokens=chunk_tokens)
    is_trained = batch.weight > 0
    return -(batch.weight * scores.logp).sum(), {
        "weight": batch.weight.sum(),
        "tokens": is_trained.sum(),
        "correct": (is_trained & scores.is_argmax).sum(),
    }


def make_sft_step(
    network: Network,
    optim: Optim,
    *,
    steps: int,
    chunk_tokens: int = 1024,
    accumulation_steps: int = 1,
) -> Step:
    """Builds the train step.

    loss = sum(weight * nll) / sum(weight). Both sums are over all rows of the global batch, for any
    `accumulation_steps` and any mesh; the loss is 0 if no node has weight. Source: ThreadWeaver
    (arXiv:2512.07843), which takes the mean over the tokens of one device.

    Args:
      network: The model.
      optim: Optimiser and schedule.
      steps: Number of steps of the whole run, for the schedule.
      chunk_tokens: Nodes of a row that are unembedded at a time, see `token_logp`.
      accumulation_steps: Number of parts of the batch that run one after another. It must divide
        the number of rows.

    Returns:
      step(state, batch: `TrieBatch` [R, T]) -> (state, metrics). It is deterministic and uses no
      key. Metrics are float32 scalars: loss (nats per unit of weight), accuracy (share of trained
      nodes that are the most likely token), tokens, weight, and those of `state.update`.
    """
    axes = network.axes()

    def step(state: TrainState, batch: TrieBatch) -> tuple[TrainState, Numbers]:
        def objective(params: Params, part: TrieBatch) -> tuple[jax.Array, Sums]:
            return nll_sums(network, params, part, chunk_tokens=chunk_tokens)

        gradients, total, sums = accumulate(
            objective, state.params, batch, accumulation_steps=accumulation_steps, axes=axes
        )
        weight = sums["weight"]
        gradients = jax.tree.map(lambda g: weighted_mean(g, denominator=weight), gradients)
        state, applied = update(state, gradients, optim, steps=steps)
        return state, {
            "loss": weighted_mean(total, denominator=weight),
            "accuracy": weighted_mean(sums["correct"], denominator=sums["tokens"]),
            "tokens": sums["tokens"],
            "weight": weight,
            **applied,
        }

    return step
