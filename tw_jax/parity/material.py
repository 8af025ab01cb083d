"""The tokens that `tw parity` compares on: packed tries, and prompts to decode from.

A config class describes each kind of material. `read_material` builds the arrays that both
frameworks receive. This module runs no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from tw_jax.bounds import require, require_text
from tw_jax.config import configurable
from tw_jax.data import workloads
from tw_jax.data.pipeline import Builder, Data
from tw_jax.data.records import open_records
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.forkjoin.tries import trajectory_trie
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.interface import Tokenizer
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece
from tw_jax.trie.batch import TrieBatch, stack_rows
from tw_jax.trie.pack import Packing, pack
from tw_jax.trie.tree import Trie, build, flat_labels


@configurable
class Trajectories:
    """Random bytes with the structure and lengths of ThreadWeaver's trajectories.

    Attributes:
      count: Number of trajectories.
      scale: Their lengths divided by the published lengths.
      seed: Seed of the first trajectory; the others use the seeds after it.
    """

    count: int = 4
    scale: float = 0.02
    seed: int = 0

    def check(self) -> None:
        """Refuses an empty set and a scale of 0."""
        require(self, "count", least=1)
        require(self, "scale", above=0)
        require(self, "seed", least=0)


@configurable
class Texts:
    """Plain texts. Each one forks in its middle into its own second half and that of the next text.

    Attributes:
      texts: The texts; greedy decoding continues each of them.
      tokenizer: Tokenizer of the texts.
    """

    texts: tuple[str, ...]
    tokenizer: Bytes | SentencePiece | HuggingFace

    def check(self) -> None:
        """Refuses a single text, which has no other text to fork into."""
        if len(self.texts) < 2:
            raise ValueError(
                f"Texts.texts has {len(self.texts)} texts. At least 2 are needed, because each "
                "forks into the next. Add a text."
            )
        require_text(self, "texts")


@configurable
class Problems:
    """Written trajectories of a file; their questions are prompts of fork-join decoding.

    Attributes:
      path: File of examples.
      count: Number of examples, from the start of the file.
      chat: Template that turns a question into a prompt.
      tokenizer: Tokenizer of the texts.
      forkjoin: Limits of decoding.
    """

    path: str
    count: int
    chat: Chat
    tokenizer: Bytes | SentencePiece | HuggingFace
    forkjoin: ForkJoin

    def check(self) -> None:
        """Refuses an empty path and an empty set."""
        require_text(self, "path")
        require(self, "count", least=1)


@dataclasses.dataclass(frozen=True, eq=False)
class Material:
    """The input of both frameworks.

    Attributes:
      calls: Packed tries whose labels follow the calls; numpy arrays.
      flat: The same tries with the labels of the reference implementation.
      prompts: Ids that decoding continues.
      tokenizer: Tokenizer of all ids.
      protocol: Protocol of decoding.
    """

    calls: TrieBatch
    flat: TrieBatch
    prompts: list[np.ndarray]
    tokenizer: Tokenizer
    protocol: ThreadWeaver

    @property
    def is_node(self) -> np.ndarray:
        """[B, T] bool: False at padding."""
        index = np.arange(self.calls.tokens.shape[1])
        return np.asarray((self.calls.parent != index) | (self.calls.end > index + 1))

    @property
    def is_trained(self) -> np.ndarray:
        """[B, T] bool: True where a node contributes to the loss."""
        return np.asarray(self.calls.weight) > 0


def read_material(config: Trajectories | Texts | Problems, row_tokens: int) -> Material:
    """Makes or reads the tries that a config describes and packs them.

    Args:
      config: What to compare on.
      row_tokens: T, tokens of a row.
    """
    tries: list[tuple[Trie, int]]
    match config:
        case Trajectories():
            tokenizer, limits = load_tokenizer(Bytes()), ForkJoin()
            shape = workloads.Shape().scaled(config.scale)
            seeds = range(config.seed, config.seed + config.count)
            trajectories = [workloads.trajectory(shape, seed) for seed in seeds]
            tries = [(trajectory_trie(t), t.prompt_tokens) for t in trajectories]
            prompts = [t.ids[: t.prompt_tokens] for t in trajectories]
        case Texts():
            tokenizer, limits = load_tokenizer(config.tokenizer), ForkJoin()
            prompts = [tokenizer.encode(text) for text in config.texts]
            following = [*prompts[1:], prompts[0]]
            tries = [(_forked(a, b), 1) for a, b in zip(prompts, following, strict=True)]
        case Problems():
            tokenizer, limits = load_tokenizer(config.tokenizer), config.forkjoin
            written = ThreadWeaver(make_table(tokenizer), ForkJoin())
            builder = Builder(Data(path=config.path, chat=config.chat), tokenizer, written)
            records = open_records(config.path)
            count = min(config.count, len(records))
            trajectories = [builder.trajectory(records[n], records.where(n)) for n in range(count)]
            tries = [(trajectory_trie(t), t.prompt_tokens) for t in trajectories]
            prompts = [t.ids[: t.prompt_tokens] for t in trajectories]
    return Material(
        calls=_pack([trie for trie, _ in tries], row_tokens),
        flat=_pack([flat_labels(trie, prompt_tokens) for trie, prompt_tokens in tries], row_tokens),
        prompts=prompts,
        tokenizer=tokenizer,
        protocol=ThreadWeaver(make_table(tokenizer), limits),
    )


def _forked(text: np.ndarray, other: np.ndarray) -> Trie:
    """A trie of two paths: the text, and its first half followed by the second half of another.

    All tokens but the first are trained.
    """
    first_half = text[: max(len(text) // 2, 1)]
    paths = [text, np.concatenate([first_half, other[len(other) // 2 :]])]
    weights = [(np.arange(len(path)) > 0).astype(np.float32) for path in paths]
    return build(paths, weights)


def _pack(tries: Sequence[Trie], row_tokens: int) -> TrieBatch:
    """Rows of tries. The place of a trie depends on lengths alone, so both labelings line up."""
    rows = pack(tries, Packing(row_tokens=row_tokens))
    return stack_rows(rows, max(sum(map(len, row)) for row in rows))
