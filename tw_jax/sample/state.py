"""A batch of rollouts in flight: the arrays that the sampler's program carries.

Everything is preallocated and one row per rollout; `sample/step.py` moves it and
`sample/sampler.py` makes it and reads it. This file knows no decision.
"""

from __future__ import annotations

import dataclasses

import jax
from flax import struct

from tw_jax.sample.cache import TrieCache

PARENT, THREADS, DONE = 0, 1, 2
"""Phases of a row."""


class Queue(struct.PyTreeNode):
    """What each row still has to encode, and where the lanes read their next logits."""

    tokens: jax.Array  # [B, Q] int32
    enter: jax.Array  # [B, Q] int32 logical numbers
    exit: jax.Array  # [B, Q] int32
    depth: jax.Array  # [B, Q] int32 positions
    length: jax.Array  # [B] int32
    at: jax.Array  # [B] int32, entries already encoded
    readout: jax.Array  # [B, C] int32, entry whose hidden state predicts the lane's next token


class Lanes(struct.PyTreeNode):
    """The calls in flight: lane 0 is the parent, or lane j thread j + 1 of the fork."""

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
    """Everything drawn, in time order."""

    tokens: jax.Array  # [B, N] int32
    logp: jax.Array  # [B, N] float32
    call: jax.Array  # [B, N] int32
    length: jax.Array  # [B] int32


class State(struct.PyTreeNode):
    """A batch of rollouts in flight."""

    cache: TrieCache
    queue: Queue
    lanes: Lanes
    outlines: Outlines
    log: Log
    phase: jax.Array  # [B] int32
    call: jax.Array  # [B] int32, number of lane 0's call; thread j has call + j
    rounds: jax.Array  # [B] int32, forks so far
    threads: jax.Array  # [B] int32, threads of the fork in flight
    length: jax.Array  # [B] int32, tokens of the joined path
    limit: jax.Array  # [B] int32, tokens that the joined path may have
    number: jax.Array  # [B] int32, first logical number that no entry and no range has


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of the program; each is part of what it is compiled for."""

    rows: int
    lanes: int
    chunk: int
    queue: int
    body: int
    log: int
    header: int
    hidden: jax.ShapeDtypeStruct
