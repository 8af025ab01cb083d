"""`tw bench attention`: a packed row of tries against one causal sequence of the same length.

Both run the same program, forward and backward; only the intervals of the keys differ. So the time
that a row of tries saves should be the share of block pairs that its mask lets the backend skip.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.attention import dispatch
from tw_jax.attention.blockwise import pad
from tw_jax.attention.dispatch import Impl
from tw_jax.benchmarks.measure import BenchmarkReport, Times, interleave
from tw_jax.contracts import Span
from tw_jax.data import workloads
from tw_jax.data.workloads import AttentionCase, PackedRow
from tw_jax.forkjoin import tries
from tw_jax.models.transformer import Model
from tw_jax.trie.batch import TrieBatch, stack_rows
from tw_jax.trie.mask import needed
from tw_jax.trie.pack import PackingStats

PEAK = {
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5": 459.0,
    "TPU v6 lite": 918.0,
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H200": 989.0,
}
"""Published dense bfloat16 TFLOP/s of a device, by its kind."""
AREA_BLOCK = 256


def run(case: AttentionCase) -> BenchmarkReport:
    """Times each row of tries and a causal row of its length in turn, under the heads of a model.

    The dtype is bfloat16, or float32 on a CPU.
    """
    is_cpu = jax.default_backend() == "cpu"
    model = dataclasses.replace(case.model, compute_dtype="float32" if is_cpu else "bfloat16")
    times: dict[str, Times] = {}
    values: dict[str, float | None] = {}
    bars: dict[str, tuple[str, float]] = {}
    for packed in case.rows:
        found = _race(model, packed, case.repeats)
        times |= found.times
        values |= found.values
        bars |= found.bars
    values["active_over_true_pairs_256"] = _active_over_true(case)
    bars["active_over_true_pairs_256"] = ("most", 1.08)
    return BenchmarkReport(times, values, bars)


def _race(model: Model, packed: PackedRow, repeats: int) -> BenchmarkReport:
    """Times one row and its causal twin."""
    tokens = packed.tokens
    batch, stats = row(packed)
    ways = spans(batch)
    impl, _ = backend(model, tokens)
    # The intervals are arguments, so both ways run one program.
    program = jax.jit(functools.partial(passes, impl=impl))
    arrays = _arrays(model, tokens)
    times = interleave(
        {way: lambda _, keys=keys: program(arrays, keys) for way, keys in ways.items()}, repeats
    )
    ms = {way: found.median_ms for way, found in times.items()}
    pairs = {way: walked_pairs(keys, model) for way, keys in ways.items()}
    ideal, skip = pairs["causal"][0] / pairs["trie"][0], ms["causal"] / ms["trie"]
    values: dict[str, float | None] = {
        "nodes": stats.used_tokens,
        "rho": stats.token_sharing,
        **{f"block_occupancy_{way}": share for way, (_, share) in pairs.items()},
        "ideal": ideal,
        "skip": skip,
        "skip_over_ideal": skip / ideal,
    }
    peak = PEAK.get(jax.devices()[0].device_kind)
    for way, keys in ways.items():
        speed = operations(keys, model) / ms[way] / 1e9
        values[f"tflops_{way}"] = speed
        values[f"share_of_peak_{way}"] = None if peak is None else speed / peak
    return BenchmarkReport(
        times={f"{impl}_{way}_{tokens}": found for way, found in times.items()},
        values={f"{name}_{tokens}": value for name, value in values.items()},
        bars={f"skip_over_ideal_{tokens}": ("least", 0.85)},
    )


def row(packed: PackedRow) -> tuple[TrieBatch, PackingStats]:
    """One row of whole tries, padded to its length, and its packing statistics."""
    made = [tries.trajectory_trie(workloads.trajectory(packed.shape, s)) for s in packed.seeds]
    stats = PackingStats(
        tries=len(made),
        rows=1,
        used_tokens=sum(map(len, made)),
        row_tokens=packed.tokens,
        source_tokens=sum(trie.source_tokens for trie in made),
    )
    return stack_rows([made], packed.tokens), stats


def spans(batch: TrieBatch) -> dict[str, Span]:
    """The intervals of the row of tries, and of one causal sequence of its length, [1, T] each."""
    trie = batch.span
    return {"trie": trie, "causal": trie.replace(exit=jnp.full_like(trie.exit, batch.end.shape[1]))}


def passes(arrays: tuple[jax.Array, ...], keys: Span, *, impl: Impl) -> Any:
    """Attention forward and backward: its output, and the gradients of q, k and v.

    Args:
      arrays: q [1, N, T, H], k and v [1, G, T, H], and the gradient of the output [1, N, T, H].
      keys: [1, T] int32 spans.
      impl: the backend.
    """
    q, k, v, d_out = arrays
    scale = q.shape[-1] ** -0.5
    attend = functools.partial(dispatch.attend, at=keys.enter, keys=keys, impl=impl, scale=scale)
    out, pull = jax.vjp(attend, q, k, v)
    return out, pull(d_out)


def _shapes(model: Model, tokens: int) -> list[tuple[int, ...]]:
    """Of q, k, v and the gradient of the output."""
    heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads)
    return [(1, n, tokens, model.head_width) for n in heads]


def _arrays(model: Model, tokens: int) -> tuple[jax.Array, ...]:
    draw = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
    shapes = _shapes(model, tokens)
    return tuple(jnp.asarray(draw(shape), model.compute_dtype) for shape in shapes)


def backend(model: Model, tokens: int) -> tuple[Impl, tuple[int, int]]:
    """The attention backend that a model uses for rows of this length on this device.

    Args:
      model: Its heads, dtype and choice of a backend are read.
      tokens: T.

    Returns:
      The name of the backend, and the queries and keys of its blocks.
    """
    q, k, v, _ = (jax.ShapeDtypeStruct(s, model.compute_dtype) for s in _shapes(model, tokens))
    place: Any = jax.ShapeDtypeStruct((1, tokens), jnp.int32)

    def accepts(name: Impl) -> bool:
        ask = functools.partial(dispatch.attend, impl=name, scale=1.0)
        try:
            jax.eval_shape(ask, q, k, v, at=place, keys=Span(enter=place, exit=place))
        except NotImplementedError:
            return False
        return True

    auto = model.attention == "auto"
    names = dispatch.preferred(tokens, tokens) if auto else (model.attention,)
    impl = next(filter(accepts, names))
    return impl, dispatch.BLOCKS[impl](tokens, tokens, model.num_heads // model.num_kv_heads)


def walked_pairs(keys: Span, model: Model) -> tuple[int, float]:
    """Pairs of tokens in the blocks that the backend computes, and their share of all pairs.

    Args:
      keys: [1, T] int32 spans of the row.
      model: The model, see `backend`.
    """
    return _needed_pairs(keys, backend(model, keys.enter.shape[1])[1])


def _needed_pairs(keys: Span, blocks: tuple[int, int]) -> tuple[int, float]:
    query_block, key_block = blocks
    # Pad like the backends: repeat the last query, and add keys that no query sees.
    at = pad(keys.enter, 1, query_block, mode="edge")
    keys = jax.tree.map(lambda x: pad(x, 1, key_block), keys)
    need = np.asarray(needed(at, keys, query_block=query_block, key_block=key_block))
    return int(need.sum()) * query_block * key_block, float(need.mean())


def operations(keys: Span, model: Model) -> float:
    """Operations of a row's attention, forward and backward.

    There are six products for each visible pair, two forward and four backward, of 2 H operations
    for each query head. Recomputation and pairs that the mask forbids are not counted, as in model
    FLOPs utilisation (arXiv:2204.02311, appendix B).
    """
    return 12.0 * model.num_heads * model.head_width * _true_pairs(keys)


def _true_pairs(keys: Span) -> int:
    return int((np.asarray(keys.exit, np.int64) - np.asarray(keys.enter)).sum())


def _active_over_true(case: AttentionCase) -> float:
    """Pairs in needed blocks of 256 by 256 over visible pairs, for full-size trajectories."""
    area = true = 0
    for seed in range(case.full_seeds):
        trie = tries.trajectory_trie(workloads.trajectory(case.full_shape, seed))
        keys = stack_rows([[trie]], len(trie)).span
        area += _needed_pairs(keys, (AREA_BLOCK, AREA_BLOCK))[0]
        true += _true_pairs(keys)
    return area / true
