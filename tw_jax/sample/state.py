"""The arrays that the sampler's program carries: one row for each rollout that is decoded.

All arrays are allocated once, at their full length, because a compiled loop cannot change a shape.
`sample/rows.py` starts rows, `sample/step.py` decodes them and `sample/sampler.py` reads them.

    B  rows              C  lanes of a row: the parent, or the threads of a fork
    Q  queue entries     M  tokens of one thread's text
    S  slots of cache    N  tokens that one rollout may draw       W  ids of a thread's header
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from tw_jax.sample.cache import TrieCache

PARENT, THREADS, DONE = 0, 1, 2
"""Phases of a row: lane 0 decodes the parent, the lanes decode threads, or the rollout is over.
A row without a rollout is done."""


class Queue(struct.PyTreeNode):
    """Tokens that each row still has to encode, and where the lanes read their next logits.

    Between two draws a row may have to encode one token for each lane, a fork's headers, or all
    threads that a join writes into the joined path. With a queue these are one case: entries with
    a number, a span and a position, encoded a few at a time until none is left.
    """

    tokens: jax.Array  # [B, Q] int32
    enter: jax.Array  # [B, Q] int32 logical numbers
    exit: jax.Array  # [B, Q] int32
    depth: jax.Array  # [B, Q] int32 positions
    length: jax.Array  # [B] int32
    at: jax.Array  # [B] int32, entries already encoded
    readout: jax.Array  # [B, C] int32, entry whose hidden state predicts the lane's next token


class Lanes(struct.PyTreeNode):
    """The calls that a row decodes: the parent in lane 0, or thread j + 1 of the fork in lane j."""

    live: jax.Array  # [B, C] bool
    enter: jax.Array  # [B, C] int32, number of the lane's next entry
    exit: jax.Array  # [B, C] int32, end of the lane's range
    depth: jax.Array  # [B, C] int32, position of the lane's next entry
    length: jax.Array  # [B, C] int32, tokens drawn in this call
    budget: jax.Array  # [B, C] int32, tokens that this call may draw
    body: jax.Array  # [B, C, M] int32, tokens drawn by a thread
    closed: jax.Array  # [B, C] bool, the thread ended by its own tag
    ended: jax.Array  # [B, C] bool, the thread ended by an end of sequence
    header: jax.Array  # [B, C, W] int32, forced ids of the thread, leading newline included
    header_length: jax.Array  # [B, C] int32
    last: jax.Array  # [B, C] int32, token drawn last
    hidden: jax.Array  # [B, C, D] state that predicts the lane's next token


class Outlines(struct.PyTreeNode):
    """The automaton that reads outline numbers as they are drawn."""

    seen: jax.Array  # [B] bool, `<Outlines>` occurred in this call
    state: jax.Array  # [B] int32
    code: jax.Array  # [B] int32, characters read of the number
    length: jax.Array  # [B] int32, how many; MAX_LABEL + 1 for more
    found: jax.Array  # [B, C] int32 codes, without repeats
    count: jax.Array  # [B] int32


class Log(struct.PyTreeNode):
    """All drawn tokens, in time order; threads interleave, so each token has its call's number."""

    tokens: jax.Array  # [B, N] int32
    logp: jax.Array  # [B, N] float32
    call: jax.Array  # [B, N] int32
    length: jax.Array  # [B] int32


class State(struct.PyTreeNode):
    """Rows that are being decoded."""

    cache: TrieCache
    queue: Queue
    lanes: Lanes
    outlines: Outlines
    log: Log
    phase: jax.Array  # [B] int32
    call: jax.Array  # [B] int32, number of lane 0's call; thread j has call + j
    rounds: jax.Array  # [B] int32, forks so far
    threads: jax.Array  # [B] int32, threads of the present fork
    length: jax.Array  # [B] int32, tokens of the joined path
    limit: jax.Array  # [B] int32, tokens that the joined path may have
    number: jax.Array  # [B] int32, first logical number that no entry and no range has
    sampling: Any  # [B, ...], what `draw` reads: `SamplingArrays`, or the script of a test


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of the program; another value of any of them is another program."""

    rows: int  # B
    lanes: int  # C
    chunk: int  # entries of a queue that are encoded at once
    queue: int  # Q
    body: int  # M
    log: int  # N
    header: int  # W
    hidden: jax.ShapeDtypeStruct  # of the network's hidden states


def where(rows: jax.Array, new: Any, old: Any) -> Any:
    """Takes `new` in the given rows [B] and `old` in the others, leaf by leaf."""
    return jax.tree.map(
        lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
    )
