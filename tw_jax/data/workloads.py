"""Inputs of benchmarks and tests: random trajectories of given lengths, and the sizes of each case.

Trajectories have the lengths of ThreadWeaver's (arXiv:2512.07843) and random bytes for text. The
protocol makes them from the tokens that an engine would draw, so their calls, headers and joins are
like those of a real rollout. A case holds the sizes of one benchmark; each has a tiny twin for
tests.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.protocol import Result
from tw_jax.forkjoin.replay import rebuild
from tw_jax.forkjoin.table import Table
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.models import presets
from tw_jax.models.rope import Rope
from tw_jax.models.transformer import Model
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.load import load_tokenizer

_BYTES = 256
"""Smaller ids are bytes of text, larger ids are control tokens and ends of sequence."""
_EVEN_LOGP = -np.log(_BYTES)
"""Log-prob of a byte in nats if all bytes are equally likely."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Lengths of a trajectory in tokens; a pair holds the smallest and the largest value.

    Attributes:
      prompt: Tokens of the prompt.
      blocks: Number of forks.
      sequential: Tokens of the text before each fork and after the last.
      outline: Tokens of one outline, including tags and number.
      threads: Threads of a fork.
      thread: Tokens that one thread draws, including its closing tag.
    """

    prompt: int = 200
    blocks: int = 4
    sequential: tuple[int, int] = (300, 1000)
    outline: int = 60
    threads: tuple[int, int] = (3, 5)
    thread: tuple[int, int] = (300, 800)

    def scaled(self, scale: float) -> Shape:
        """Every length times `scale`, with the same numbers of blocks and threads."""

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
"""Smallest length of an outline: `<Outline>`, a digit, a colon, a word, `</Outline>`."""


@functools.cache
def table() -> Table:
    """The protocol's table for the byte tokenizer."""
    return make_table(load_tokenizer(Bytes()))


def text(rng: np.random.Generator, length: int) -> np.ndarray:
    """[length] int32 random bytes, without control tokens and ends of sequence."""
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
    """Returns one rollout of this shape; see `rollouts`."""
    return rollouts(shape, seed, count=1)[0]


def rollouts(shape: Shape, seed: int, *, count: int) -> list[Trajectory]:
    """Rollouts of one prompt with random text.

    Recorded log-probs are close to those of uniformly drawn bytes.

    Args:
      shape: Lengths; each joined path must fit the default limits of `ForkJoin`.
      seed: Seed of lengths, ids and log-probs.
      count: K, number of rollouts.
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
    """Sizes of `tw bench trie`.

    Attributes:
      shape: Lengths of the trajectory whose trie is built.
      seed: Seed of that trajectory.
      repeats: Measured rounds.
    """

    shape: Shape
    seed: int
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedRow:
    """Whole tries of trajectories, side by side in one row.

    Attributes:
      shape: Lengths of each trajectory.
      seeds: Seeds of the trajectories.
      tokens: T, tokens of the row; the rest of the row is padding.
    """

    shape: Shape
    seeds: tuple[int, ...]
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionCase:
    """Sizes of `tw bench attention`.

    Attributes:
      rows: Rows that are timed, each against one causal sequence of its length.
      model: Model whose heads and backend are used.
      full_shape: Lengths of trajectories whose pairs are only counted.
      full_seeds: Number of these trajectories.
      repeats: Measured rounds.
    """

    rows: tuple[PackedRow, ...]
    model: Model
    full_shape: Shape
    full_seeds: int
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepCase:
    """Sizes of `tw bench step`.

    Attributes:
      shape: Lengths of the trajectory that the step trains on.
      seed: Seed of that trajectory.
      model: The decoder.
      dense_nodes: Nodes of the trie on which dense attention is timed.
      full_shape: Lengths of trajectories whose tokens are only counted.
      full_seeds: Number of these trajectories.
      repeats: Measured rounds.
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
    """Sizes of `tw bench rows`.

    Attributes:
      shape: Lengths of each rollout that the step trains on.
      seed: Seed of the rollouts and of their rewards.
      rollouts: K, rollouts of one prompt.
      model: The decoder.
      repeats: Measured rounds.
    """

    shape: Shape
    seed: int
    rollouts: int
    model: Model
    repeats: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerCase:
    """Sizes of `tw bench sampler`.

    Attributes:
      model: The decoder.
      prefixes: Tokens in the cache before decoding starts. A single lane is timed with the first.
      lanes: Threads of the fork, or rows without a fork.
      tokens: Tokens that each lane decodes.
      prefill_chunk: Chunk size of the sampler's prefill.
      prompts: Lengths of prompts of one bucket, with which recompilations are counted.
      repeats: Measured rounds.
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
      shape: Lengths of the trajectory, whose trie has slightly more than `nodes` nodes.
      seed: Seed of that trajectory.
      nodes: Nodes that are kept.
    """

    shape: Shape
    seed: int
    nodes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParityCase:
    """Sizes of `tw bench parity`.

    Attributes:
      tries: Tries that both frameworks train on, the largest last.
      model: The decoder.
      repeats: Measured rounds.
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
"""7 million parameters, so that two CPU cores spend their time on computation, not dispatch."""
MINUTE = dataclasses.replace(SMALL, vocab_size=320, num_layers=1, width=32, mlp_width=32)
"""A decoder for tests in which only shapes matter."""

TRIE = TrieCase(shape=Shape().scaled(1.5), seed=2, repeats=30)
ATTENTION = AttentionCase(
    rows=(
        PackedRow(shape=Shape().scaled(0.4), seeds=(20,), tokens=8192),
        PackedRow(shape=Shape().scaled(0.4), seeds=(20, 12), tokens=16_384),
    ),
    # A quarter of the heads, the share of one of four devices. A CPU takes minutes even so.
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
    # Half the layers, and only products are saved, because one row holds all calls of 4 rollouts.
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
    # Saves products and recomputes everything else, which is not slower here than saving all.
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
