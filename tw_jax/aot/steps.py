"""The programs that `tw aot` compiles: both train steps, and the sampler's decode and prefill.

A config class holds the sizes of each. `prepare` returns the jitted function that training or
sampling runs, and the shapes and shardings of its arguments. Nothing is compiled here.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from tw_jax import sharding
from tw_jax.aot import flops
from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.contracts import Network
from tw_jax.data import workloads
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.models.transformer import Model, network
from tw_jax.sample.sampler import Sampler, make_sampler
from tw_jax.sharding import Rules
from tw_jax.train.groups import PolicyBatch
from tw_jax.train.pgrpo import PolicyLoss, make_pgrpo_step
from tw_jax.train.sft import make_sft_step
from tw_jax.train.state import Optim, abstract_state, jit_step
from tw_jax.trie.batch import TrieBatch


@configurable
class SftStep:
    """The supervised train step.

    Attributes:
      optim: The optimiser, whose moments take memory.
      batch_rows: Rows of a batch, over all devices.
      row_tokens: T, tokens of a row.
      chunk_tokens: Nodes per row that are unembedded at a time.
      accumulation_steps: Parts of a batch that run one after another.
    """

    optim: Optim
    batch_rows: int
    row_tokens: int
    chunk_tokens: int = 2048
    accumulation_steps: int = 1

    def check(self) -> None:
        """Refuses sizes that do not fit each other."""
        require(self, "batch_rows", "row_tokens", "chunk_tokens", "accumulation_steps", least=1)
        if self.batch_rows % self.accumulation_steps:
            raise ValueError(
                f"SftStep.accumulation_steps = {self.accumulation_steps} does not divide "
                f"SftStep.batch_rows = {self.batch_rows}. Set it to a divisor."
            )


@configurable
class PgrpoStep:
    """The on-policy step of P-GRPO.

    Attributes:
      optim: The optimiser, whose moments take memory.
      loss: The loss.
      batch_rows: Rows of a batch, over all devices.
      microbatch_rows: Rows that run at a time, over all devices.
      row_tokens: T, tokens of a row.
      chunk_tokens: Nodes per row that are unembedded at a time.
    """

    optim: Optim
    loss: PolicyLoss
    batch_rows: int
    microbatch_rows: int
    row_tokens: int
    chunk_tokens: int = 2048

    def check(self) -> None:
        """Refuses sizes that do not fit each other."""
        require(self, "batch_rows", "microbatch_rows", "row_tokens", "chunk_tokens", least=1)
        if self.batch_rows % self.microbatch_rows:
            raise ValueError(
                f"PgrpoStep.microbatch_rows = {self.microbatch_rows} does not divide "
                f"PgrpoStep.batch_rows = {self.batch_rows}. Set it to a divisor."
            )


@configurable
class Sampling:
    """The sampler's program.

    Attributes:
      part: "decode" is the loop that draws, forks and joins; "prefill" encodes prompts.
      sampler: The sampler; its rows are those over all devices.
      forkjoin: Limits; `max_threads` is the number of lanes.
      slots: Slots of the cache, for each row.
    """

    part: Literal["decode", "prefill"] = "decode"
    sampler: Sampler
    forkjoin: ForkJoin
    slots: int

    def check(self) -> None:
        """Refuses a cache without slots."""
        require(self, "slots", least=1)


class Prepared(NamedTuple):
    """A program that is ready to be lowered.

    Attributes:
      program: A function under `jax.jit`.
      arguments: `ShapeDtypeStruct`s with shardings.
      rules: The table of logical axes under which it is lowered.
      figures: Figures that follow from the sizes alone, such as `flops`.
    """

    program: Any
    arguments: tuple[Any, ...]
    rules: Rules
    figures: dict[str, Any]


def prepare(
    step: SftStep | PgrpoStep | Sampling, model: Model, *, mesh: jax.sharding.Mesh, rules: Rules
) -> Prepared:
    """The program of a config, for the devices of a mesh that need not be present."""
    net = network(model, num_ids=workloads.table().num_ids)
    match step:
        case SftStep():
            program, arguments = _sft(step, net, mesh, rules)
            return Prepared(program, arguments, rules, _train_flops(step, model))
        case PgrpoStep():
            program, arguments = _pgrpo(step, net, mesh, rules)
            return Prepared(program, arguments, rules, _train_flops(step, model))
        case Sampling():
            rules = sharding.sampling(rules)
            program, arguments, figures = _sampling(step, net, mesh, rules)
            figures = {**figures, "flops": _turn_flops(step, model), "block_occupancy": None}
            return Prepared(program, arguments, rules, figures)


def _train_flops(step: SftStep | PgrpoStep, model: Model) -> dict[str, float]:
    return flops.train_step(model, step.batch_rows, step.row_tokens)


def _turn_flops(step: Sampling, model: Model) -> float:
    lanes = step.forkjoin.max_threads
    queries = max(step.sampler.prefill_chunk, lanes) if step.part == "prefill" else lanes
    return flops.sampler_turn(model, step.sampler.rows, queries, slots=step.slots)


def _sft(step: SftStep, net: Network, mesh: jax.sharding.Mesh, rules: Rules):
    state = abstract_state(net, step.optim, mesh=mesh, rules=rules)
    pure = make_sft_step(
        net,
        step.optim,
        steps=1000,
        chunk_tokens=step.chunk_tokens,
        accumulation_steps=step.accumulation_steps,
    )
    batch = _trie_batch(step.batch_rows, step.row_tokens, mesh, rules)
    return jit_step(pure, state, mesh=mesh, rules=rules), (state, batch)


def _pgrpo(step: PgrpoStep, net: Network, mesh: jax.sharding.Mesh, rules: Rules):
    state = abstract_state(net, step.optim, mesh=mesh, rules=rules)
    pure = make_pgrpo_step(
        net,
        step.optim,
        step.loss,
        steps=1000,
        chunk_tokens=step.chunk_tokens,
        temperature=1.0,
        microbatch_rows=step.microbatch_rows,
    )
    trie = _trie_batch(step.batch_rows, step.row_tokens, mesh, rules)
    batch = PolicyBatch(
        trie=trie, advantage=trie.weight, sampler_logp=trie.weight, rollout=trie.tokens
    )
    return jit_step(pure, state, mesh=mesh, rules=rules), (state, batch)


def _sampling(step: Sampling, net: Network, mesh: jax.sharding.Mesh, rules: Rules):
    sampler = make_sampler(net, ThreadWeaver(workloads.table(), step.forkjoin), step.sampler)
    rows = step.sampler.rows
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    params = _with_shardings(shapes, sharding.shardings(net.axes(), shapes, mesh, rules))
    by_row = NamedSharding(mesh, PartitionSpec(rules.rows))
    by_head = NamedSharding(mesh, PartitionSpec(None, rules.rows, rules.kv_heads))
    # Keys and values are split by rows and heads, everything else of the state by rows.
    state = sampler.abstract(step.slots)
    kv = _with_shardings(state.cache.kv, jax.tree.map(lambda _: by_head, state.cache.kv))
    state = state.replace(cache=state.cache.replace(kv=None))
    state = _with_shardings(state, jax.tree.map(lambda _: by_row, state))
    state = state.replace(cache=state.cache.replace(kv=kv))
    figures = {
        "kv_bytes_per_chip": _bytes_per_chip(kv),
        "param_bytes_per_chip": _bytes_per_chip(params),
    }
    if step.part == "prefill":
        # One rollout of each prompt: as many rows encode as decode.
        prompts = jax.ShapeDtypeStruct((rows, step.sampler.max_prompt), jnp.int32, sharding=by_row)
        length = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=by_row)
        return sampler.jitted.prefill, (params, prompts, length, step.slots), figures
    turns = jax.ShapeDtypeStruct((), jnp.int32)
    return sampler.jitted.advance, (params, state, turns), figures


def _bytes_per_chip(arrays: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arrays)
    )


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
    )


def _trie_batch(rows: int, tokens: int, mesh: jax.sharding.Mesh, rules: Rules) -> TrieBatch:
    """Shapes of a batch that is split by rows."""
    by_row = NamedSharding(mesh, PartitionSpec(rules.rows))
    ids: Any = jax.ShapeDtypeStruct((rows, tokens), jnp.int32, sharding=by_row)
    weight: Any = jax.ShapeDtypeStruct((rows, tokens), jnp.float32, sharding=by_row)
    return TrieBatch(tokens=ids, parent=ids, depth=ids, end=ids, weight=weight)
