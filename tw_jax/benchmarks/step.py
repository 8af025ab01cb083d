"""`tw bench step`: the train step on a trie against the same step on one row per call."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.benchmarks.attention import walked_pairs
from tw_jax.benchmarks.measure import BenchmarkReport, interleave
from tw_jax.contracts import Network, Params
from tw_jax.data import workloads
from tw_jax.data.workloads import StepCase
from tw_jax.forkjoin import tries
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.models.transformer import Model, network
from tw_jax.train import sft
from tw_jax.train.loss import Objective
from tw_jax.train.state import Optim, Step, create
from tw_jax.trie import pack
from tw_jax.trie.batch import TrieBatch, stack_rows
from tw_jax.trie.tree import Trie, build

CHUNK_TOKENS = 1024
OPTIM = Optim(peak_lr=1e-4, schedule="constant")
STEPS = 100


def run(case: StepCase) -> BenchmarkReport:
    """Trains one trajectory as a trie and as one row per call, and a trie with dense attention.

    Both train the same tokens by the same step. The calls fill one row without padding, which costs
    less than any packing of whole calls into fixed rows. Blockwise attention is compared with dense
    attention twice, the second time with full remat on both sides. At 4,096 nodes the dense scores
    of all layers take 12 GiB, so a part of the first ratio is memory traffic. The second ratio
    leaves that out, but computes everything twice.
    """
    made = workloads.trajectory(case.shape, case.seed)
    trie, rows = tries.trajectory_trie(made), chains([made])
    batches = {
        "trie": stack_rows([[trie]], len(trie)),
        "rows": stack_rows([rows], trie.source_tokens),
    }
    net = network(case.model, num_ids=workloads.table().num_ids)
    params = net.init(jax.random.key(0))
    objective = functools.partial(sft.nll_sums, net, chunk_tokens=CHUNK_TOKENS)
    loss_diff, gradient_diff = difference(objective, params, batches)
    times = interleave({n: trainer(net, params, b) for n, b in batches.items()}, case.repeats)

    dense_nodes = min(case.dense_nodes, len(trie))
    cut = stack_rows([[pack.truncate(trie, dense_nodes)]], dense_nodes)
    for remat in ("none", "full"):
        suffix = "" if remat == "none" else "_remat"
        ways = {"dense": "reference", "blockwise": "blockwise"}
        times |= interleave(
            {
                name + suffix: trainer(_model(case.model, attention, remat), params, cut)
                for name, attention in ways.items()
            },
            case.repeats,
        )
    shares = sharing(batches, case.model)
    time_ratio = times["rows"].median_ms / times["trie"].median_ms
    full_ratio, deviation = _full_token_ratio(case)
    values = {
        "nodes": len(trie),
        "row_tokens": trie.source_tokens,
        **shares,
        "time_ratio": time_ratio,
        "time_ratio_over_token_ratio": time_ratio / shares["token_ratio"],
        "token_ratio_full": full_ratio,
        "token_ratio_full_deviation": deviation,
        "loss_rel_diff": loss_diff,
        "grad_rel_l2": gradient_diff,
        "dense_nodes": dense_nodes,
        "blockwise_over_dense": times["dense"].median_ms / times["blockwise"].median_ms,
        "blockwise_over_dense_remat": times["dense_remat"].median_ms
        / times["blockwise_remat"].median_ms,
    }
    bars = {
        "time_ratio_over_token_ratio": ("least", 0.75),
        "loss_rel_diff": ("most", 1e-5),
        "grad_rel_l2": ("most", 1e-5),
        "blockwise_over_dense": ("least", 4.0),
    }
    return BenchmarkReport(times, values, bars)


def sharing(batches: Mapping[str, TrieBatch], model: Model) -> dict[str, float]:
    """The ideal values of a time ratio: how much the rows share.

    A time ratio lies between `token_ratio`, the ideal for work that is proportional to tokens, and
    `block_ratio`, the ideal for attention. rho = 1 - 1 / token_ratio is the share of tokens saved.

    Args:
      batches: "trie" and "rows", one row each, without padding.
      model: The model, see `attention.backend`.
    """
    tokens = {name: batch.tokens.size for name, batch in batches.items()}
    pairs = {name: walked_pairs(batch.span, model) for name, batch in batches.items()}
    return {
        "rho": 1 - tokens["trie"] / tokens["rows"],
        "token_ratio": tokens["rows"] / tokens["trie"],
        "block_ratio": pairs["rows"][0] / pairs["trie"][0],
        **{f"block_occupancy_{name}": share for name, (_, share) in pairs.items()},
    }


def _full_token_ratio(case: StepCase) -> tuple[float, float]:
    """Tokens of the calls over nodes of the tries of all trajectories, and its deviation."""
    made = [workloads.trajectory(case.full_shape, seed) for seed in range(case.full_seeds)]
    full = [tries.trajectory_trie(one) for one in made]
    ratio = sum(trie.source_tokens for trie in full) / sum(map(len, full))
    return ratio, statistics.pstdev(trie.source_tokens / len(trie) for trie in full)


def _model(model: Model, attention: str, remat: str) -> Network:
    changed: dict[str, Any] = {"attention": attention, "remat": remat}
    return network(dataclasses.replace(model, **changed), num_ids=workloads.table().num_ids)


def chains(rollouts: Sequence[Trajectory]) -> list[Trie]:
    """One chain for each call: its context, and its sampled tokens, which alone have a weight."""
    made = []
    for call in (call for rollout in rollouts for call in rollout.calls):
        weight = np.repeat(np.array([0, 1], np.float32), [len(call.context), len(call.sampled)])
        made.append(build([np.concatenate([call.context, call.sampled])], [weight]))
    return made


def trainer(net: Network, params: Params, batch: TrieBatch) -> Callable[[Any], Any]:
    """SFT steps on one batch, see `repeated`."""
    pure = sft.make_sft_step(net, OPTIM, steps=STEPS, chunk_tokens=CHUNK_TOKENS)
    return repeated(pure, params, batch)


def repeated(pure: Step, params: Params, batch: Any) -> Callable[[Any], Any]:
    """A function that takes one step of `OPTIM` at each call, from the state of the last call."""
    # The step donates its state, so it gets a copy of the parameters.
    state = create(jax.tree.map(jnp.copy, params), OPTIM, key=jax.random.key(0))
    batch = jax.device_put(batch)
    step = jax.jit(pure, donate_argnums=0).lower(state, batch).compile()

    def take(_: Any) -> Any:
        nonlocal state
        state, metrics = step(state, batch)
        return state, metrics

    return take


def difference(
    objective: Objective, params: Params, batches: Mapping[str, Any], size: float | None = None
) -> tuple[float, float]:
    """Relative differences of loss and gradient between "trie" and "rows".

    Args:
      objective: The loss, a sum over tokens.
      params: Parameters at which both are computed.
      batches: "trie" and "rows".
      size: Divisor of the difference of the losses. If terms of both signs cancel, it should be the
        sum of their sizes. None divides by the loss itself.

    Returns:
      (relative difference of the losses, relative L2 distance of the gradients).
    """
    with jax.default_matmul_precision("highest"):
        summed = jax.jit(jax.value_and_grad(objective, has_aux=True))
        ((loss, _), gradient), ((expected, _), expected_gradient) = (
            jax.device_get(summed(params, batches[name])) for name in ("trie", "rows")
        )
    squares = [
        sum(float(np.square(leaf.astype(np.float64)).sum()) for leaf in jax.tree.leaves(tree))
        for tree in (jax.tree.map(np.subtract, gradient, expected_gradient), expected_gradient)
    ]
    apart = abs(float(loss) - float(expected)) / (abs(float(expected)) if size is None else size)
    return apart, (squares[0] / squares[1]) ** 0.5
