"""Supervised training on packed tries: the mean negative log-likelihood of the weighted nodes.

What is trained is written in the batch: `weight` says which nodes, `parent` from where each is
predicted. So the fork-join loss, the reference's flat labels and the sequential baseline on chain
tries are the same step on other batches (`trie/tree.py` makes all three). This file knows no mesh
and no data; it hands `train/loop.py` a pure step.
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
    """The weighted negative log-likelihood of a batch, not yet divided.

    total = sum over rows and nodes of -weight * logp

    Args:
      network: the model.
      params: its parameters; the only argument to differentiate in.
      batch: [B, T]; weights at least 0.
      chunk_tokens: nodes per row unembedded at a time, see `token_logp`.

    Returns:
      (total, sums): `weight`, of all weights; `tokens`, nodes of weight above 0; `correct`, those
      of them that are the likeliest token after their parent.
    """
    hidden, _ = network.apply(params, batch.tokens, batch.depth, batch.span)
    said = token_logp(network, params, hidden, batch=batch, chunk_tokens=chunk_tokens)
    is_trained = batch.weight > 0
    return -(batch.weight * said.logp).sum(), {
        "weight": batch.weight.sum(),
        "tokens": is_trained.sum(),
        "correct": (is_trained & said.is_argmax).sum(),
    }


def make_sft_step(
    network: Network, optim: Optim, *, steps: int, chunk_tokens: int, accumulation_steps: int = 1
) -> Step:
    """Builds the train step.

    loss = sum(weight * nll) / sum(weight), both sums over every row of the global batch, whatever
    `accumulation_steps` and the mesh; 0 where no node has weight. Source: ThreadWeaver
    (arXiv:2512.07843), whose mean is over the tokens of one device.

    Args:
      network: the model.
      optim: optimiser and schedule.
      steps: steps of the whole run, for the schedule.
      chunk_tokens: nodes per row unembedded at a time, see `token_logp`.
      accumulation_steps: parts of the batch run one after another; divides its rows.

    Returns:
      step(state, batch: `TrieBatch` [R, T]) -> (state, metrics). Deterministic: no key is used.
      Metrics are float32 scalars: loss (nats per unit of weight), accuracy (share of trained nodes
      that are the likeliest token), tokens, weight, and those of `state.update`.
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
        state, moved = update(state, gradients, optim, steps=steps)
        return state, {
            "loss": weighted_mean(total, denominator=weight),
            "accuracy": weighted_mean(sums["correct"], denominator=sums["tokens"]),
            "tokens": sums["tokens"],
            "weight": weight,
            **moved,
        }

    return step
