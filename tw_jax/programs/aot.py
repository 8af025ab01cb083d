"""`tw aot`: compiles a step for a TPU topology that need not be there, and says what it needs.

libtpu compiles without hardware, so any host can tell whether a model, a mesh and a row length fit
a pod. The last line is one JSON object. It holds no times of execution: the compiler's own cost
analysis counts neither loops nor kernels, so operations are counted from the sizes instead.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from tw_jax import sharding
from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.contracts import Network, Span
from tw_jax.data import workloads
from tw_jax.forkjoin import tries
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.models.transformer import Model, network
from tw_jax.sample.sampler import Sampler, make_sampler
from tw_jax.sharding import Mesh, Rules
from tw_jax.train import sft
from tw_jax.train.groups import PolicyBatch
from tw_jax.train.pgrpo import PolicyLoss
from tw_jax.train.pgrpo import make_pgrpo_step as make_policy_step
from tw_jax.train.state import Optim, abstract_state, jit_step
from tw_jax.trie.batch import TrieBatch, stack_rows
from tw_jax.trie.mask import needed
from tw_jax.trie.pack import truncate

HBM = {"v4": 32 * 2**30, "v5e": 16 * 2**30, "v5p": 95 * 2**30, "v6e": 32 * 2**30}
"""Bytes of a chip's memory by generation, as published; a program gets a few per cent less."""
_BLOCK = 512


@configurable
class SftStep:
    """The supervised step.

    Attributes:
      optim: the optimiser, whose moments take memory.
      batch_rows: rows of a batch, over all devices.
      row_tokens: T.
      chunk_tokens: nodes per row that are unembedded at a time.
      accumulation_steps: parts of a batch that are run one after another.
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
    """The step of reinforcement, on-policy.

    Attributes:
      optim: the optimiser, whose moments take memory.
      loss: the loss.
      batch_rows: rows of a batch, over all devices.
      microbatch_rows: rows that are run at a time, over all devices.
      row_tokens: T.
      chunk_tokens: nodes per row that are unembedded at a time.
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
      sampler: rows are those over all devices.
      forkjoin: limits; `max_threads` is the number of lanes.
      slots: of the cache, for each row.
    """

    part: Literal["decode", "prefill"] = "decode"
    sampler: Sampler
    forkjoin: ForkJoin
    slots: int

    def check(self) -> None:
        """Refuses a cache without slots."""
        require(self, "slots", least=1)


@configurable
class Aot:
    """A program and the devices it is compiled for.

    Attributes:
      topology: a generation and its chips, such as "v5p:2x2x4".
      model: the model.
      program: what to compile.
      mesh: how the chips are laid out.
      rules: which logical axis is split over which axis of the mesh.
    """

    topology: str
    model: Model
    program: SftStep | PgrpoStep | Sampling
    mesh: Mesh = Mesh()
    rules: Rules = Rules()

    def check(self) -> None:
        """Refuses generations whose memory is not known."""
        if self.topology.partition(":")[0] not in HBM:
            raise ValueError(
                f"Aot.topology = {self.topology!r}: want one of {', '.join(HBM)}, a colon and the "
                "chips, such as 'v5p:2x2x4'."
            )


def run(cfg: Aot) -> None:
    """Compiles and prints one JSON object on the last line.

    Raises:
      NotImplementedError: libtpu is not installed.
    """
    devices = _devices(cfg.topology)
    mesh = sharding.make_mesh(cfg.mesh, devices)
    net = network(cfg.model, num_ids=workloads.table().num_ids)
    prepare: Callable[..., Any] = {SftStep: _sft, PgrpoStep: _pgrpo, Sampling: _sampling}[
        type(cfg.program)
    ]
    rules = sharding.sampling(cfg.rules) if isinstance(cfg.program, Sampling) else cfg.rules
    program, arguments, extra = prepare(cfg, net, mesh, rules)
    found: dict[str, Any] = {"program": type(cfg.program).__name__, "topology": cfg.topology}
    found |= {"chips": mesh.size, "hbm_bytes_per_chip": HBM[cfg.topology.partition(":")[0]]}
    began = time.monotonic()
    # A program found on disk would say nothing of how long it takes to compile.
    with sharding.use(mesh, rules), _no_cache():
        lowered = program.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            found |= {"ok": False, "error": str(error).splitlines()[0]}
        else:
            memory = compiled.memory_analysis()
            found |= {
                "ok": True,
                "error": None,
                "peak_bytes_per_chip": memory.peak_memory_in_bytes,
                "argument_bytes": memory.argument_size_in_bytes,
                "temp_bytes": memory.temp_size_in_bytes,
            }
            if "kv_bytes_per_chip" in extra:
                found["temp_over_kv"] = memory.temp_size_in_bytes / extra["kv_bytes_per_chip"]
    found |= {"compile_seconds": round(time.monotonic() - began, 1), **extra}
    print(json.dumps(found))


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)


def _devices(topology: str) -> list[Any]:
    """The devices of a topology, described by libtpu."""
    # libtpu asks the cloud for its host otherwise; the type is that of any host with TPUs. Nothing
    # runs on a chip, so other processes may have libtpu too.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except RuntimeError as error:
        if "not installed" not in str(error):
            raise ValueError(f"Aot.topology = {topology!r}: {error}") from error
        raise NotImplementedError(
            "tw aot needs libtpu, which compiles for TPUs on any host: want the tpu extra. Install "
            "it with pip install -e '.[tpu]'."
        ) from error
    return list(described.devices)


def _sft(cfg: Aot, net: Network, mesh: jax.sharding.Mesh, rules: Rules):
    how = cfg.program
    assert isinstance(how, SftStep)
    state = abstract_state(net, how.optim, mesh=mesh, rules=rules)
    step = sft.make_sft_step(
        net,
        how.optim,
        steps=1000,
        chunk_tokens=how.chunk_tokens,
        accumulation_steps=how.accumulation_steps,
    )
    batch = _trie_batch(how.batch_rows, how.row_tokens, mesh, rules)
    program = jit_step(step, state, mesh=mesh, rules=rules)
    return program, (state, batch), _work(cfg.model, how.batch_rows, how.row_tokens)


def _pgrpo(cfg: Aot, net: Network, mesh: jax.sharding.Mesh, rules: Rules):
    how = cfg.program
    assert isinstance(how, PgrpoStep)
    state = abstract_state(net, how.optim, mesh=mesh, rules=rules)
    step = make_policy_step(
        net,
        how.optim,
        how.loss,
        steps=1000,
        chunk_tokens=how.chunk_tokens,
        temperature=1.0,
        microbatch_rows=how.microbatch_rows,
    )
    trie = _trie_batch(how.batch_rows, how.row_tokens, mesh, rules)
    batch = PolicyBatch(
        trie=trie, advantage=trie.weight, sampler_logp=trie.weight, rollout=trie.tokens
    )
    program = jit_step(step, state, mesh=mesh, rules=rules)
    return program, (state, batch), _work(cfg.model, how.batch_rows, how.row_tokens)


def _sampling(cfg: Aot, net: Network, mesh: jax.sharding.Mesh, rules: Rules):
    how = cfg.program
    assert isinstance(how, Sampling)
    sampler = make_sampler(net, ThreadWeaver(workloads.table(), how.forkjoin), how.sampler)
    rows = how.sampler.rows
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    params = _placed(shapes, sharding.shardings(net.axes(), shapes, mesh, rules))
    by_row = NamedSharding(mesh, PartitionSpec(rules.rows))
    by_head = NamedSharding(mesh, PartitionSpec(None, rules.rows, rules.kv_heads))
    state = sampler.abstract(how.slots)
    kv = _placed(state.cache.kv, jax.tree.map(lambda _: by_head, state.cache.kv))
    state = state.replace(cache=state.cache.replace(kv=None))
    state = _placed(state, jax.tree.map(lambda _: by_row, state))
    state = state.replace(cache=state.cache.replace(kv=kv))
    lanes = how.forkjoin.max_threads
    queries = max(how.sampler.prefill_chunk, lanes) if how.part == "prefill" else lanes
    extra = {
        "kv_bytes_per_chip": _bytes_per_chip(kv),
        "param_bytes_per_chip": _bytes_per_chip(params),
        "flops": _turn(cfg.model, rows, queries, how.slots),
        "block_occupancy": None,
    }
    if how.part == "prefill":
        # One rollout of each prompt: as many rows encode as decode.
        prompts = _placed(
            jax.eval_shape(lambda: jnp.zeros((rows, how.sampler.max_prompt), jnp.int32)), by_row
        )
        length = _placed(jax.eval_shape(lambda: jnp.zeros(rows, jnp.int32)), by_row)
        return sampler.jitted.prefill, (params, prompts, length, how.slots), extra
    turns = jax.ShapeDtypeStruct((), jnp.int32)
    return sampler.jitted.advance, (params, state, turns), extra


def _bytes_per_chip(arrays: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arrays)
    )


def _placed(shapes: Any, places: Any) -> Any:
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def _trie_batch(rows: int, tokens: int, mesh: jax.sharding.Mesh, rules: Rules) -> TrieBatch:
    """Shapes of a batch, split by rows."""
    place = NamedSharding(mesh, PartitionSpec(rules.rows))
    ids: Any = jax.ShapeDtypeStruct((rows, tokens), jnp.int32, sharding=place)
    weight: Any = jax.ShapeDtypeStruct((rows, tokens), jnp.float32, sharding=place)
    return TrieBatch(tokens=ids, parent=ids, depth=ids, end=ids, weight=weight)


def _work(model: Model, rows: int, tokens: int) -> dict[str, float]:
    """Operations of a step, and the share of pairs of blocks of 512 that it needs.

    A product of an [a, b] with a [b, c] matrix counts 2 a b c; backward twice forward, or once with
    a frozen weight; adapters and what remat computes anew are not counted, as in model FLOPs
    utilisation (arXiv:2204.02311, appendix B).
    Attention counts the pairs of ThreadWeaver-shaped tries, see `data/workloads.py`.
    """
    row, used = [], 0
    while used < tokens:
        trie = tries.trajectory_trie(workloads.trajectory(workloads.Shape(), seed=len(row)))
        trie = truncate(trie, min(len(trie), tokens - used))
        row.append(trie)
        used += len(trie)
    batch = stack_rows([row], tokens)
    at: Any = np.arange(tokens, dtype=np.int32)[None]
    keys = Span(enter=at, exit=batch.end)
    need = needed(at, keys, query_block=_BLOCK, key_block=_BLOCK)
    pairs = int((np.asarray(batch.end) - at).sum())
    passes = 3.0 if model.lora is None else 2.0
    products = passes * 2 * _weights(model) * tokens + 3.0 * _scores(model) * pairs
    return {
        "flops": rows * products,
        "block_occupancy": float(need.mean()),
    }


def _turn(model: Model, rows: int, queries: int, slots: int) -> float:
    """Operations of one turn of the sampler's loop: as many tokens a row, and a cache that is full.

    All are counted as unembedded, which of a prompt only the last is.
    """
    return float(rows * queries * (2 * _weights(model) + _scores(model) * slots))


def _weights(model: Model) -> int:
    """Entries of the matrices that a token meets."""
    heads, kv_heads = (n * model.head_width for n in (model.num_heads, model.num_kv_heads))
    attention = model.width * (2 * heads + 2 * kv_heads)
    weights = model.num_layers * (attention + 3 * model.width * model.mlp_width)
    return weights + model.width * model.vocab_size


def _scores(model: Model) -> int:
    """Operations of one pair of a query and a key, forward."""
    return 4 * model.num_heads * model.head_width * model.num_layers
