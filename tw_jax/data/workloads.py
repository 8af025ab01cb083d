"""What benchmarks time and tests run in miniature: trajectories of a given shape, and cases.

Trajectories have the lengths of ThreadWeaver's (arXiv:2512.07843) and random bytes for text. They
are made by the protocol from what an engine would have drawn, so their calls, headers and joins are
real; only the words mean nothing. A case holds the sizes of one benchmark. This file knows no
clock; it hands `programs/bench.py` and the tests one set of arguments.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.protocol import Result
from tw_jax.forkjoin.replay import rebuild
from tw_jax.forkjoin.threadweaver import ForkJoin, Table, ThreadWeaver, make_table
from tw_jax.models import presets
from tw_jax.models.rope import Rope
from tw_jax.models.transformer import Model
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.load import load_tokenizer

_BYTES = 256
"""Ids below are bytes of text, those above control tokens and ends of sequence."""
_EVEN_LOGP = -np.log(_BYTES)
"""Nats of each of them, all equally likely."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Lengths of a trajectory, in tokens; a pair is the least and the most.

    Attributes:
      prompt: ids of the prompt.
      blocks: forks.
      sequential: text before each fork and after the last.
      outline: one outline, tags and number included.
      threads: threads of a fork; a pair too.
      thread: what one thread draws, its closing tag included.
    """

    prompt: int = 200
    blocks: int = 4
    sequential: tuple[int, int] = (300, 1000)
    outline: int = 60
    threads: tuple[int, int] = (3, 5)
    thread: tuple[int, int] = (300, 800)

    def scaled(self, scale: float) -> Shape:
        """Every length times `scale`; as many blocks and threads."""

        def size(tokens: int) -> int:
            return round(tokens * scale)

        return dataclasses.replace(
            self,
            prompt=size(self.prompt),
            sequential=(size(self.sequential[0]), size(self.sequential[1])),
            outline=max(size(self.outline), LEAST_OUTLINE),
            thread=(size(self.thread[0]), size(self.thread[1])),
        )


LEAST_OUTLINE = 5
"""`<Outline>`, a digit, the colon, a word, `</Outline>`."""


@functools.cache
def table() -> Table:
    """The protocol's table for the byte tokenizer."""
    return make_table(load_tokenizer(Bytes()))


def text(rng: np.random.Generator, length: int) -> np.ndarray:
    """Random bytes, [length] int32: no control token and no end of sequence among them."""
    return rng.integers(0, _BYTES, length, dtype=np.int32)


def outlines(rng: np.random.Generator, threads: int, length: int) -> np.ndarray:
    """The ids of `<Outlines>` ... `</Outlines>` with `threads` outlines of `length` tokens each."""
    tokenizer = load_tokenizer(Bytes())
    ids = [tokenizer.encode("<Outlines>")]
    for number in range(1, threads + 1):
        head, tail = tokenizer.encode(f"<Outline>{number}:"), tokenizer.encode("</Outline>")
        ids += [head, text(rng, length - len(head) - len(tail)), tail]
    return np.concatenate([*ids, tokenizer.encode("</Outlines>")])


def trajectory(shape: Shape, seed: int) -> Trajectory:
    """A rollout of this shape, see `rollouts`."""
    return rollouts(shape, seed, count=1)[0]


def rollouts(shape: Shape, seed: int, *, count: int) -> list[Trajectory]:
    """Rollouts of one prompt: the protocol's calls around random text.

    Recorded log-probs are about those of bytes drawn evenly.

    Args:
      shape: their lengths; each joined path must fit `ForkJoin`'s default limits.
      seed: lengths, ids and log-probs follow from it.
      count: K.
    """
    rng = np.random.default_rng(seed)
    prompt = text(rng, shape.prompt)
    return [_rollout(rng, shape, prompt) for _ in range(count)]


def _rollout(rng: np.random.Generator, shape: Shape, prompt: np.ndarray) -> Trajectory:
    def length(least: int, most: int) -> int:
        return int(rng.integers(least, most, endpoint=True))

    drawn = []
    for _ in range(shape.blocks):
        threads = length(*shape.threads)
        before = text(rng, length(*shape.sequential))
        drawn.append(np.concatenate([before, outlines(rng, threads, shape.outline)]))
        for _ in range(threads):
            drawn.append(np.append(text(rng, length(*shape.thread) - 1), table().end_thread))
    drawn.append(np.append(text(rng, length(*shape.sequential)), table().eos[0]))
    calls = [
        Result(ids.astype(np.int32), rng.normal(_EVEN_LOGP, 0.25, len(ids)).astype(np.float32))
        for ids in drawn
    ]
    return rebuild(ThreadWeaver(table(), ForkJoin()), prompt, calls)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrieCase:
    """`tw bench trie`.

    Attributes:
      shape: of the one trajectory whose trie is built.
      seed: of that trajectory.
      repeats: measured rounds.
    """

    shape: Shape
    seed: int
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRow:
    """Whole tries of trajectories, side by side in one row.

    Attributes:
      shape: of each trajectory.
      seeds: of the trajectories.
      tokens: T; what the tries leave is padding.
    """

    shape: Shape
    seeds: tuple[int, ...]
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """`tw bench attention`.

    Attributes:
      rows: timed one after the other, each against one causal sequence of its length.
      model: whose heads and backend are taken.
      full_shape: trajectories whose pairs are counted, and nothing more.
      full_seeds: how many of them.
      repeats: measured rounds.
    """

    rows: tuple[PackedRow, ...]
    model: Model
    full_shape: Shape
    full_seeds: int
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCase:
    """`tw bench step`.

    Attributes:
      shape: of the trajectory that the step trains on.
      seed: of that trajectory.
      model: the decoder.
      dense_nodes: nodes of the trie on which dense attention is timed.
      full_shape: trajectories whose tokens are counted, and nothing more.
      full_seeds: how many of them.
      repeats: measured rounds.
    """

    shape: Shape
    seed: int
    model: Model
    dense_nodes: int
    full_shape: Shape
    full_seeds: int
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowsCase:
    """`tw bench rows`.

    Attributes:
      shape: of each rollout that the step trains on.
      seed: of the rollouts and of what they are worth.
      rollouts: K, all of one prompt.
      model: the decoder.
      repeats: measured rounds.
    """

    shape: Shape
    seed: int
    rollouts: int
    model: Model
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerCase:
    """`tw bench sampler`.

    Attributes:
      model: the decoder.
      prefixes: tokens in the cache before decoding starts; one lane decodes after the first alone.
      lanes: threads of the fork, or rows without one.
      tokens: what each lane decodes.
      prefill_chunk: of the sampler.
      prompts: lengths of the prompts with which recompilations are counted, all in one bucket.
      repeats: measured rounds.
    """

    model: Model
    prefixes: tuple[int, ...]
    lanes: int
    tokens: int
    prefill_chunk: int
    prompts: tuple[int, ...]
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class CutTrie:
    """A trie of a rollout, cut to a round number of nodes.

    Attributes:
      shape: of the trajectory, whose trie has a little more than `nodes`.
      seed: of that trajectory.
      nodes: that are kept.
    """

    shape: Shape
    seed: int
    nodes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityCase:
    """`tw bench parity`.

    Attributes:
      tries: what both frameworks train on, one after the other, the largest last.
      model: the decoder.
      repeats: measured rounds.
    """

    tries: tuple[CutTrie, ...]
    model: Model
    repeats: int


SMALL = Model(
    vocab_size=4096,
    num_layers=8,
    width=256,
    mlp_width=768,
    num_heads=8,
    num_kv_heads=2,
    head_width=32,
    qk_norm=True,
    tie_embeddings=True,
    rope=Rope(),
)
"""7 million parameters: large enough that two CPU cores compute rather than dispatch."""
MINUTE = dataclasses.replace(SMALL, vocab_size=320, num_layers=1, width=32, mlp_width=32)
"""A decoder for tests of programs, where only shapes matter."""

TRIE = TrieCase(shape=Shape().scaled(1.5), seed=2, repeats=30)
ATTENTION = AttentionCase(
    rows=(
        PackedRow(shape=Shape().scaled(0.4), seeds=(20,), tokens=8192),
        PackedRow(shape=Shape().scaled(0.4), seeds=(20, 12), tokens=16_384),
    ),
    # A quarter of its heads, which is one device's share of four: a CPU takes minutes for these.
    model=dataclasses.replace(presets.QWEN3_0_6B, num_heads=4, num_kv_heads=2),
    full_shape=Shape(),
    full_seeds=16,
    repeats=3,
)
STEP = StepCase(
    shape=Shape().scaled(0.2),
    seed=0,
    model=SMALL,
    dense_nodes=4096,
    full_shape=Shape(),
    full_seeds=16,
    repeats=3,
)
ROWS = RowsCase(
    shape=Shape().scaled(0.075),
    seed=0,
    rollouts=4,
    # Half the layers, and only products are kept: one row holds every call of four rollouts.
    model=dataclasses.replace(SMALL, num_layers=4, remat="dots"),
    repeats=2,
)
SAMPLER = SamplerCase(
    model=SMALL,
    prefixes=(1000, 8000),
    lanes=4,
    tokens=200,
    prefill_chunk=64,
    prompts=(33, 48, 64, 40),
    repeats=5,
)
PARITY = ParityCase(
    tries=(
        CutTrie(shape=Shape().scaled(0.2), seed=0, nodes=4096),
        CutTrie(shape=Shape().scaled(0.45), seed=1, nodes=8192),
    ),
    # Products are kept and all else is computed anew: no slower here than keeping everything.
    model=dataclasses.replace(SMALL, remat="dots"),
    repeats=3,
)

TINY = Shape(prompt=8, blocks=2, sequential=(8, 16), outline=6, threads=(2, 3), thread=(8, 16))
TINY_TRIE = TrieCase(shape=TINY, seed=0, repeats=2)
TINY_ATTENTION = AttentionCase(
    rows=(PackedRow(shape=TINY, seeds=(0, 1, 2, 3, 4), tokens=1024),),
    model=MINUTE,
    full_shape=TINY,
    full_seeds=2,
    repeats=1,
)
TINY_STEP = StepCase(
    shape=TINY, seed=0, model=MINUTE, dense_nodes=96, full_shape=TINY, full_seeds=2, repeats=2
)
TINY_ROWS = RowsCase(shape=TINY, seed=0, rollouts=2, model=MINUTE, repeats=1)
TINY_PARITY = ParityCase(
    tries=(CutTrie(shape=TINY, seed=0, nodes=64), CutTrie(shape=TINY, seed=0, nodes=96)),
    model=dataclasses.replace(MINUTE, remat="attention"),
    repeats=2,
)
TINY_SAMPLER = SamplerCase(
    model=MINUTE,
    prefixes=(64,),
    lanes=4,
    tokens=6,
    prefill_chunk=4,
    prompts=(5, 9, 7),
    repeats=2,
)
