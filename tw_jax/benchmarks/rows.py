"""`tw bench rows`: the P-GRPO step on a group as one trie against one row per engine call.

The trainer of ThreadWeaver (arXiv:2512.07843) runs the second: every call with its whole context,
and nothing is shared.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import numpy as np

from tw_jax.benchmarks.measure import BenchmarkReport, interleave
from tw_jax.benchmarks.step import (
    CHUNK_TOKENS,
    OPTIM,
    STEPS,
    chains,
    difference,
    repeated,
    sharing,
)
from tw_jax.data import workloads
from tw_jax.data.workloads import RowsCase
from tw_jax.forkjoin import tries
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.tries import Group
from tw_jax.models.transformer import network
from tw_jax.train import pgrpo
from tw_jax.train.groups import PolicyBatch, Scored, advantages, pack_groups
from tw_jax.train.pgrpo import PolicyLoss
from tw_jax.trie.batch import stack_rows
from tw_jax.trie.pack import Packing

_TEMPERATURE = 1.0


def run(case: RowsCase) -> BenchmarkReport:
    """Trains the rollouts of one prompt as one trie and as one row per call.

    Both train the same tokens with the same weights, advantages and recorded log-probs by the same
    on-policy step. The calls fill one row without padding, which costs less than any packing of
    whole calls into micro-batches.
    """
    batches = batches_of(case)
    net = network(case.model, num_ids=workloads.table().num_ids)
    params = net.init(jax.random.key(0))
    objective = functools.partial(
        pgrpo.loss_sums,
        net,
        cfg=PolicyLoss(),
        chunk_tokens=CHUNK_TOKENS,
        temperature=_TEMPERATURE,
    )
    # Advantages of both signs cancel in the loss, so its difference is divided by their sizes.
    rows = batches["rows"]
    size = float(np.sum(np.asarray(rows.trie.weight) * np.abs(np.asarray(rows.advantage))))
    loss_diff, gradient_diff = difference(objective, params, batches, size)
    step = pgrpo.make_pgrpo_step(
        net,
        OPTIM,
        PolicyLoss(),
        steps=STEPS,
        chunk_tokens=CHUNK_TOKENS,
        temperature=_TEMPERATURE,
        microbatch_rows=1,
    )
    ways = {name: repeated(step, params, batch) for name, batch in batches.items()}
    times = interleave(ways, case.repeats)
    packed = {name: batch.trie for name, batch in batches.items()}
    shares = sharing(packed, case.model)
    time_ratio = times["rows"].median_ms / times["trie"].median_ms
    values = {
        "rollouts": case.rollouts,
        "nodes": packed["trie"].tokens.size,
        "row_tokens": packed["rows"].tokens.size,
        **shares,
        "time_ratio": time_ratio,
        "time_ratio_over_token_ratio": time_ratio / shares["token_ratio"],
        "loss_rel_diff": loss_diff,
        "grad_rel_l2": gradient_diff,
    }
    bars = {
        "time_ratio_over_token_ratio": ("least", 0.75),
        "loss_rel_diff": ("most", 1e-5),
        "grad_rel_l2": ("most", 1e-5),
    }
    return BenchmarkReport(times, values, bars)


def batches_of(case: RowsCase) -> dict[str, PolicyBatch]:
    """The group as "trie" and as "rows", [1, T] each."""
    made = workloads.rollouts(case.shape, case.seed, count=case.rollouts)
    reward = np.random.default_rng(case.seed).normal(size=(1, case.rollouts))
    (group,) = tries.group_tries(made)
    trie = pack_groups(
        [[Scored(group, advantages(reward)[0])]],
        packing=Packing(row_tokens=len(group.trie)),
    )
    return {"trie": trie, "rows": _of_calls(made, group, trie)}


def _of_calls(made: Sequence[Trajectory], group: Group, batch: PolicyBatch) -> PolicyBatch:
    """The calls as chains in one row, with the values of the trie's row at each drawn token."""
    calls = chains(made)
    trie = stack_rows([calls], sum(map(len, calls)))
    is_drawn = np.asarray(trie.weight) > 0
    # Sort by call like the chains. The nodes of one call lie on one path, so preorder keeps order.
    nodes = np.flatnonzero(group.call >= 0)
    nodes = nodes[np.lexsort((group.call[nodes], group.rollout[nodes]))]

    def to_chains(values: jax.Array) -> jax.Array:
        chained = np.zeros(is_drawn.shape, values.dtype)
        chained[is_drawn] = np.asarray(values)[0, nodes]
        return chained  # pyright: ignore[reportReturnType]  # numpy stands in for jax.Array

    return PolicyBatch(
        trie=trie.replace(weight=to_chains(batch.trie.weight)),
        advantage=to_chains(batch.advantage),
        sampler_logp=to_chains(batch.sampler_logp),
        rollout=to_chains(batch.rollout),
    )
