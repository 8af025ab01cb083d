"""The jitted fork-join sampler: siblings are lanes that share one prefix cache stored once.

One program decodes a batch of rollouts from prompts to their ends. Whatever has to be encoded (a
prompt, the headers of a fork, the threads that a join re-encodes, the next token of each lane)
stands in a row's queue; each step encodes a few entries of every queue, and a row whose queue ran
empty draws one token for each live lane and lays its next queue:

    step    encode up to T queue entries of every row (T = 1, the lanes, or a prefill chunk)
    draw    one token for each lane of the rows that are ready
    fork    at `</Outlines>`: the headers of all threads, each in its own range of numbers
    join    when no thread is left: thread 1 stays, what follows it is encoded again

The KV cache is a loop carry. Its capacity is a bucket; when a row runs out of slots the loop
returns to the host, which drops dead entries and moves to the next bucket. Decisions are those of
`forkjoin/threadweaver.py`, read from the same `Table`; every finished rollout is run through
`forkjoin/protocol.steps` with the ids drawn here, which builds its `Trajectory` and would raise if
the two ever disagreed.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from tw_jax.config import config
from tw_jax.contracts import Network, Params, Span
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.protocol import Result
from tw_jax.forkjoin.replay import rebuild
from tw_jax.forkjoin.threadweaver import (
    EMPTY_CODE,
    IDLE,
    MAX_LABEL,
    TABLED_LABELS,
    ForkJoin,
    Table,
    ThreadWeaver,
)
from tw_jax.sample import cache as caches
from tw_jax.sample.cache import FOREVER, TrieCache
from tw_jax.sample.draw import Draw, draw, settings

PARENT, THREADS, DONE = 0, 1, 2
"""Phases of a row."""

_RADIX = 11


@config
class Sampler:
    """How rollouts are drawn.

    Attributes:
      rows: B, rollouts decoded side by side.
      max_prompt: longest prompt, in tokens; the queue is sized by it.
      prefill_chunk: T, entries of a queue encoded at once when more than the lanes' tokens wait.
      temperature: 0 takes the likeliest token; 1 samples from the model.
      top_p: keeps the smallest set of likeliest tokens of at least this mass; 1 keeps all.
      top_k: keeps the so many likeliest tokens; 0 keeps all.
      seed: request i draws with seed + i.
    """

    rows: int = 32
    max_prompt: int = 1024
    prefill_chunk: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def check(self) -> None:
        """Refuses sizes below one."""
        for name in ("rows", "max_prompt", "prefill_chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"Sampler.{name} = {getattr(self, name)}: want at least 1.")


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
class _Sizes:
    """Static sizes of the program."""

    rows: int
    lanes: int
    chunk: int
    queue: int
    body: int
    log: int
    header: int
    hidden: jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, eq=False)
class ForkJoinSampler:
    """Draws rollouts. Build it once with `make_sampler`; a call compiles once for each bucket."""

    network: Network
    protocol: ThreadWeaver
    cfg: Sampler
    sizes: _Sizes
    advance: Callable[[Params, State, Any], State]
    grow: Callable[[State, int], State]

    def __call__(
        self, params: Params, prompts: Sequence[np.ndarray], how: Any = None
    ) -> list[Trajectory]:
        """One rollout for each prompt.

        Args:
          params: of the network.
          prompts: arrays of int32 ids; any number, decoded `Sampler.rows` at a time.
          how: what `draw` reads, with a leading axis of len(prompts); by default the config's
            temperature, top-p, top-k and seeds.

        Raises:
          ValueError: a prompt is empty, longer than `Sampler.max_prompt`, or holds an id outside
            the vocabulary.
        """
        for number, prompt in enumerate(prompts):
            self._check(number, prompt)
        cfg = self.cfg
        if how is None:
            how = settings(
                max(len(prompts), 1),
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                top_k=cfg.top_k,
                seed=cfg.seed,
            )
        made: list[Trajectory] = []
        for first in range(0, len(prompts), cfg.rows):
            some = prompts[first : first + cfg.rows]
            index = np.minimum(np.arange(first, first + cfg.rows), len(prompts) - 1)
            state = self.decode(params, some, jax.tree.map(lambda a, i=index: a[i], how))
            made += self._collect(state, some)
        return made

    def decode(self, params: Params, prompts: Sequence[np.ndarray], how: Any) -> State:
        """Runs at most `Sampler.rows` rollouts to their ends; `how` has exactly `rows` rows."""
        state = self._start(prompts)
        while True:
            state = self.advance(params, state, how)
            if bool((state.phase == DONE).all()):
                return state
            live = np.asarray(state.cache.span.exit > state.cache.span.enter).sum(axis=1)
            want = int(live[np.asarray(state.phase) != DONE].max()) + self.sizes.chunk
            slots = caches.bucket(want)
            # Dropping dead entries alone must free a quarter, or the next stop comes too soon.
            if want > 3 * state.cache.slots // 4:
                slots = caches.bucket(max(want, state.cache.slots + 1))
            state = self.grow(state, max(slots, state.cache.slots))

    def _check(self, number: int, prompt: np.ndarray) -> None:
        cfg, ids = self.cfg, np.asarray(prompt)
        if not 0 < len(ids) <= cfg.max_prompt:
            raise ValueError(
                f"Prompt {number} has {len(ids)} tokens: want 1 to {cfg.max_prompt}. Raise "
                "Sampler.max_prompt, or shorten the prompt."
            )
        vocabulary = self.network.vocab_size
        if ids.min() < 0 or ids.max() >= vocabulary:
            bad = int(ids[(ids < 0) | (ids >= vocabulary)][0])
            raise ValueError(
                f"Prompt {number} holds token {bad}: want ids from 0 to {vocabulary - 1}. The "
                "prompt was made with another tokenizer than the model's."
            )

    def _start(self, prompts: Sequence[np.ndarray]) -> State:
        """Every row before its first step; rows without a prompt are done."""
        sizes, limits = self.sizes, self.protocol.limits
        rows, lanes = sizes.rows, sizes.lanes
        tokens = np.zeros((rows, sizes.queue), np.int32)
        length = np.zeros(rows, np.int32)
        for b, prompt in enumerate(prompts):
            length[b] = len(prompt)
            tokens[b, : len(prompt)] = prompt
        limit = np.minimum(limits.max_context, length + limits.max_new).astype(np.int32)
        done = (length == 0) | (limit - length < 1)
        index = np.broadcast_to(np.arange(sizes.queue, dtype=np.int32), tokens.shape)
        first_lane = np.arange(lanes) == 0

        def grid(*shape: int, dtype: Any = np.int32) -> np.ndarray:
            return np.zeros((rows, *shape), dtype)

        state = State(
            cache=None,  # pyright: ignore[reportArgumentType]  # made below, without a copy
            queue=Queue(
                tokens=tokens,
                enter=index,
                exit=np.full_like(tokens, FOREVER),
                depth=index,
                length=np.where(done, 0, length),
                at=grid(),
                readout=np.where(first_lane, length[:, None] - 1, -1).astype(np.int32),
            ),
            lanes=Lanes(
                live=first_lane & ~done[:, None],
                enter=np.broadcast_to(length[:, None], (rows, lanes)),
                exit=np.full((rows, lanes), FOREVER, np.int32),
                depth=np.broadcast_to(length[:, None], (rows, lanes)),
                length=grid(lanes),
                budget=np.where(first_lane, (limit - length)[:, None], 0).astype(np.int32),
                body=grid(lanes, sizes.body),
                closed=grid(lanes, dtype=bool),
                ended=grid(lanes, dtype=bool),
                header=grid(lanes, sizes.header),
                header_length=grid(lanes),
                last=grid(lanes),
                hidden=grid(lanes, sizes.hidden.shape[-1], dtype=sizes.hidden.dtype),
            ),
            outlines=Outlines(
                seen=grid(dtype=bool),
                state=grid(),
                code=np.full(rows, EMPTY_CODE, np.int32),
                length=grid(),
                found=grid(lanes),
                count=grid(),
            ),
            log=Log(
                tokens=grid(sizes.log),
                logp=grid(sizes.log, dtype=np.float32),
                call=grid(sizes.log),
                length=grid(),
            ),
            phase=np.where(done, DONE, PARENT).astype(np.int32),
            call=grid(),
            rounds=grid(),
            threads=grid(),
            length=length,
            limit=limit,
            number=length,
        )
        slots = caches.bucket(int(length.max(initial=1)) + 2 * sizes.chunk)
        # jnp.array copies, so no two leaves share a buffer when the state is donated.
        state = jax.tree.map(jnp.array, state)
        return state.replace(cache=caches.empty(self.network, rows, slots))

    def _collect(self, state: State, prompts: Sequence[np.ndarray]) -> list[Trajectory]:
        """The drawn ids, run through the host protocol: calls, joins, provenance, counts."""
        log = jax.device_get(state.log)
        made = []
        for b, prompt in enumerate(prompts):
            length = int(log.length[b])
            order = np.argsort(log.call[b, :length], kind="stable")
            call = log.call[b, :length][order]
            starts = np.flatnonzero(np.diff(call, prepend=-1))
            tokens, logp = log.tokens[b, :length][order], log.logp[b, :length][order]
            drawn = [
                Result(tokens[start:end], logp[start:end])
                for start, end in zip(starts, [*starts[1:], length], strict=True)
            ]
            made.append(rebuild(self.protocol, prompt, drawn))
        return made


def make_sampler(
    network: Network,
    protocol: ThreadWeaver,
    cfg: Sampler,
    *,
    draw: Callable[..., tuple[jax.Array, jax.Array]] = draw,
) -> ForkJoinSampler:
    """Builds the sampler's program.

    Args:
      network: the model.
      protocol: the table and the limits; `ForkJoin.max_threads` is the number of lanes.
      cfg: sizes and the default settings.
      draw: (logits [B, C, V], how, call [B, C], position [B, C]) -> tokens, logp [B, C]; another
        one forces given tokens.
    """
    limits = protocol.limits
    lanes = limits.max_threads if limits.parallel else 1
    header = 4 + max(MAX_LABEL, protocol.table.label.shape[1])
    most = limits.max_new + 1
    sizes = _Sizes(
        rows=cfg.rows,
        lanes=lanes,
        chunk=max(cfg.prefill_chunk, lanes),
        # A queue holds a prompt, a fork's headers or a join; the slack is one more chunk.
        queue=max(cfg.max_prompt, 1 + lanes * header, most) + max(cfg.prefill_chunk, lanes),
        body=min(limits.max_thread, most) if limits.parallel else 1,
        # Ends of sequence inside threads are drawn and not joined.
        log=most + lanes * (limits.max_rounds + 1),
        header=header,
        hidden=_hidden(network),
    )
    program = _Program(network, protocol.table, limits, sizes, draw)
    return ForkJoinSampler(
        network=network,
        protocol=protocol,
        cfg=cfg,
        sizes=sizes,
        advance=jax.jit(program.advance, donate_argnums=1),
        grow=jax.jit(
            lambda state, slots: state.replace(cache=caches.grow(state.cache, slots)),
            static_argnums=1,
        ),
    )


def _hidden(network: Network) -> jax.ShapeDtypeStruct:
    """Width and dtype of the network's hidden states."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(network.init, jax.random.key(0))
    return jax.eval_shape(network.apply, params, one, one, Span(enter=one, exit=one))[0]


@dataclasses.dataclass(frozen=True, eq=False)
class _Program:
    """The pure functions that make up one jitted program."""

    network: Network
    table: Table
    limits: ForkJoin
    sizes: _Sizes
    draw: Callable[..., tuple[jax.Array, jax.Array]]

    def advance(self, params: Params, state: State, how: Any) -> State:
        """Decodes until every row is done or some row has no room for another chunk."""
        sizes = self.sizes

        def has_room(state: State) -> jax.Array:
            most = jnp.where(state.phase == DONE, 0, state.cache.used).max()
            return most + sizes.chunk <= state.cache.slots

        def goes_on(state: State) -> jax.Array:
            return (state.phase != DONE).any() & has_room(state)

        def waiting(state: State) -> jax.Array:
            return (state.queue.length - state.queue.at).max()

        def loop(above: int, width: int, state: State) -> State:
            return jax.lax.while_loop(
                lambda s: goes_on(s) & (waiting(s) > above) & (waiting(s) <= cap[width]),
                functools.partial(self.step, params, how, width),
                state,
            )

        # One inner loop for each width and no cond: a branch around the cache would copy it.
        widths = sorted({1, sizes.lanes, sizes.chunk})
        cap = {width: width for width in widths[:-1]} | {widths[-1]: sizes.queue}
        above = dict(zip(widths, [-1, *widths[:-1]], strict=True))

        def turn(state: State) -> State:
            for width in reversed(widths):
                state = loop(above[width], width, state)
            return state

        return jax.lax.while_loop(goes_on, turn, state)

    def step(self, params: Params, how: Any, width: int, state: State) -> State:
        """Encodes `width` entries of every queue; rows whose queue ran empty draw and decide."""
        state = self.encode(params, width, state)
        ready = (state.queue.at >= state.queue.length) & (state.phase != DONE)
        active = state.lanes.live & ready[:, None]
        logits = self.network.unembed(params, state.lanes.hidden)
        # A model may have more rows than its tokenizer has ids, to shard; those are never drawn.
        is_id = jnp.arange(logits.shape[-1]) < self.table.next_state.shape[1]
        logits = jnp.where(is_id, logits, jnp.finfo(logits.dtype).min)
        lane = jnp.arange(self.sizes.lanes, dtype=jnp.int32)
        tokens, logp = self.draw(logits, how, state.call[:, None] + lane, state.lanes.length)
        state = self.record(state, active, tokens, logp)
        state, stopped = self.read(state, active)
        state = self.enqueue(state, ready, active & ~stopped)
        forks = ready & (state.phase == PARENT) & stopped[:, 0]
        joins = ready & (state.phase == THREADS) & ~state.lanes.live.any(axis=1)
        # Keys and values stay outside the branch, which would copy them.
        kv = state.cache.kv
        state = jax.lax.cond(
            (forks | joins).any(),
            lambda s: self.decide(s, forks, joins),
            lambda s: s,
            state.replace(cache=state.cache.replace(kv=None)),
        )
        return state.replace(cache=state.cache.replace(kv=kv))

    def encode(self, params: Params, width: int, state: State) -> State:
        """Runs the next `width` entries of each queue through the network."""
        queue, cache, lanes = state.queue, state.cache, state.lanes
        cut = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (width,)))
        position = queue.at[:, None] + jnp.arange(width, dtype=jnp.int32)
        valid = position < queue.length[:, None]
        enter = cut(queue.enter, queue.at)
        span = Span(enter=enter, exit=jnp.where(valid, cut(queue.exit, queue.at), enter))
        keys = caches.announce(cache, span)
        hidden, kv = self.network.apply(
            params,
            jnp.where(valid, cut(queue.tokens, queue.at), 0),
            jnp.where(valid, cut(queue.depth, queue.at), 0),
            span,
            cache.kv,
            keys,
            cache.used,
        )
        taken = jnp.minimum(queue.length - queue.at, width)
        where = queue.readout - queue.at[:, None]
        here = (where >= 0) & (where < taken[:, None])
        read = jnp.take_along_axis(hidden, jnp.clip(where, 0, width - 1)[..., None], axis=1)
        return state.replace(
            cache=cache.replace(kv=kv, span=keys, used=cache.used + taken),
            queue=queue.replace(at=queue.at + taken),
            lanes=lanes.replace(hidden=jnp.where(here[..., None], read, lanes.hidden)),
        )

    def record(
        self, state: State, active: jax.Array, tokens: jax.Array, logp: jax.Array
    ) -> State:
        """Writes what was drawn to the log and, for threads, to the lanes' bodies."""
        lanes, log = state.lanes, state.log
        lane = jnp.arange(self.sizes.lanes, dtype=jnp.int32)
        order = jnp.argsort(~active, axis=1, stable=True)
        put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))

        def append(row: jax.Array, new: jax.Array) -> jax.Array:
            return put(row, jnp.take_along_axis(new, order, axis=1), log.length)

        call = state.call[:, None] + lane
        drawn = active.sum(axis=1, dtype=jnp.int32)
        row = jnp.arange(self.sizes.rows)[:, None]
        slot = jnp.where(active, lanes.length, self.sizes.body)
        return state.replace(
            log=Log(
                tokens=append(log.tokens, tokens),
                logp=append(log.logp, logp),
                call=append(log.call, jnp.broadcast_to(call, tokens.shape)),
                length=log.length + drawn,
            ),
            lanes=lanes.replace(
                body=lanes.body.at[row, lane, slot].set(tokens, mode="drop"),
                length=lanes.length + active,
                last=jnp.where(active, tokens, lanes.last),
            ),
            length=state.length + (active[:, 0] & (state.phase == PARENT)),
        )

    def read(self, state: State, active: jax.Array) -> tuple[State, jax.Array]:
        """Follows outline numbers and says which lanes stop here."""
        table, lanes = self.table, state.lanes
        in_parent = state.phase == PARENT
        outlines = self.follow(state.outlines, lanes.last[:, 0], active[:, 0] & in_parent)
        is_eos = (lanes.last[..., None] == jnp.asarray(table.eos)).any(-1)
        at_outlines = (lanes.last[:, 0] == table.end_outlines) & in_parent
        at_outlines &= bool(self.limits.parallel)
        # `</Outlines>` without numbers ends the call but not the decoding.
        stray = active[:, 0] & at_outlines & ~(outlines.seen & (outlines.count > 0))
        outlines = outlines.replace(
            seen=outlines.seen & ~stray, state=jnp.where(stray, IDLE, outlines.state)
        )
        forks = active[:, 0] & at_outlines & ~stray
        closes = (lanes.last == table.end_thread) & ~in_parent[:, None]
        full = lanes.length >= lanes.budget
        stopped = active & (is_eos | closes | full)
        stopped = stopped.at[:, 0].set(stopped[:, 0] | forks)
        first = (jnp.arange(self.sizes.lanes) == 0) & stray[:, None]
        return state.replace(
            outlines=outlines,
            lanes=lanes.replace(
                live=lanes.live & ~stopped,
                closed=lanes.closed | (active & closes),
                ended=lanes.ended | (active & is_eos),
                budget=jnp.where(first, lanes.budget - lanes.length, lanes.budget),
                length=jnp.where(first, 0, lanes.length),
            ),
            call=state.call + stray,
        ), stopped

    def follow(self, outlines: Outlines, token: jax.Array, active: jax.Array) -> Outlines:
        """One step of `Table.read_outlines` for every row."""
        table = self.table
        state = outlines.state
        pushed = jnp.asarray(table.pushed)[state, token]
        width = jnp.asarray(table.pushed_length, jnp.int32)[state, token]
        completes = jnp.asarray(table.completes)[state, token]
        length = jnp.minimum(outlines.length + width, MAX_LABEL + 1)
        fits = length <= MAX_LABEL
        scale = jnp.asarray([_RADIX**n for n in range(MAX_LABEL + 1)], jnp.int32)
        code = outlines.code * scale[jnp.minimum(width, MAX_LABEL)] + pushed
        code = jnp.where(fits, code, outlines.code)
        lanes = outlines.found.shape[1]
        index = jnp.arange(lanes)
        known = ((outlines.found == code[:, None]) & (index < outlines.count[:, None])).any(axis=1)
        adds = completes & fits & (length > 0) & ~known & (outlines.count < lanes)
        found = jnp.where(
            adds[:, None] & (index == outlines.count[:, None]), code[:, None], outlines.found
        )
        begins, opens = token == table.outline, token == table.outlines
        new = Outlines(
            seen=outlines.seen | opens,
            state=jnp.where(
                opens, IDLE, jnp.asarray(table.next_state, jnp.int32)[state, token]
            ),
            code=jnp.where(begins, EMPTY_CODE, code),
            length=jnp.where(begins, 0, length),
            found=found,
            count=jnp.where(opens, 0, outlines.count + adds),
        )
        return jax.tree.map(
            lambda new, old: jnp.where(active.reshape(-1, *[1] * (new.ndim - 1)), new, old),
            new,
            outlines,
        )

    def enqueue(self, state: State, ready: jax.Array, goes_on: jax.Array) -> State:
        """The next queue of rows that are ready: the token of each lane that goes on."""
        queue, lanes, sizes = state.queue, state.lanes, self.sizes
        order = jnp.argsort(~goes_on, axis=1, stable=True)
        rank = jnp.cumsum(goes_on, axis=1, dtype=jnp.int32) - 1
        count = goes_on.sum(axis=1, dtype=jnp.int32)

        def lay(row: jax.Array, new: jax.Array) -> jax.Array:
            new = jnp.take_along_axis(new, order, axis=1)
            new = jnp.where(ready[:, None], new, row[:, : sizes.lanes])
            return jax.lax.dynamic_update_slice(row, new, (0, 0))

        return state.replace(
            queue=Queue(
                tokens=lay(queue.tokens, lanes.last),
                enter=lay(queue.enter, lanes.enter),
                exit=lay(queue.exit, lanes.exit),
                depth=lay(queue.depth, lanes.depth),
                length=jnp.where(ready, count, queue.length),
                at=jnp.where(ready, 0, queue.at),
                readout=jnp.where(
                    ready[:, None], jnp.where(goes_on, rank, -1), queue.readout
                ),
            ),
            lanes=lanes.replace(
                enter=lanes.enter + goes_on, depth=lanes.depth + goes_on
            ),
            number=state.number + (goes_on[:, 0] & (state.phase == PARENT)),
        )

    def decide(self, state: State, stops: jax.Array, joins: jax.Array) -> State:
        """Ends, forks and joins of the rows at which the parent stopped or no thread is left."""
        forks = stops & (state.lanes.last[:, 0] == self.table.end_outlines)
        forks &= state.outlines.seen & (state.outlines.count > 0)
        forks &= bool(self.limits.parallel)
        forks &= state.rounds < self.limits.max_rounds
        header, header_length = self.headers(state.outlines.found)
        threads = state.outlines.count
        index = jnp.arange(self.sizes.lanes)
        wanted = index < threads[:, None]
        # Later headers lose their leading newline in the joined path.
        forced = (wanted * (header_length + 2)).sum(axis=1) - (threads - 1)
        left = state.limit - state.length - forced - 2
        share = jnp.minimum(self.limits.max_thread, left // jnp.maximum(threads, 1))
        forks &= share >= 1
        state = state.replace(phase=jnp.where(stops & ~forks, DONE, state.phase))
        state = self.fork(state, forks, header, header_length, share)
        return self.join(state, joins)

    def headers(self, code: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Forced header ids of each code: newline, tag, newline, number, colon.

        Args:
          code: [B, C] int32.

        Returns:
          ids [B, C, W] int32 and lengths [B, C] int32.
        """
        table = self.table
        power = jnp.asarray([_RADIX**n for n in range(MAX_LABEL + 1)], jnp.int32)
        length = (code[..., None] >= power[1:]).sum(-1)
        place = jnp.arange(MAX_LABEL)
        shift = jnp.clip(length[..., None] - 1 - place, 0, MAX_LABEL)
        digit = code[..., None] // power[shift] % _RADIX
        spelt = jnp.asarray(table.character)[digit]
        number = jnp.where(length == 1, digit[..., 0], digit[..., 0] * 10 + digit[..., 1])
        has_dot = ((digit == _RADIX - 1) & (place < length[..., None])).any(-1)
        plain = (length <= 2) & ~has_dot & (digit[..., 0] > 0)
        entry = jnp.clip(number - 1, 0, TABLED_LABELS - 1)
        width = self.sizes.header - 4
        written = jnp.pad(
            jnp.asarray(table.label), ((0, 0), (0, width - table.label.shape[1]))
        )[entry]
        spelt = jnp.pad(spelt, ((0, 0), (0, 0), (0, width - MAX_LABEL)))
        label = jnp.where(plain[..., None], written, spelt)
        label_length = jnp.where(plain, jnp.asarray(table.label_length)[entry], length)
        before = jnp.asarray([table.newline, table.thread, table.newline], jnp.int32)
        ids = jnp.concatenate(
            [
                jnp.broadcast_to(before, (*code.shape, 3)),
                label,
                jnp.zeros((*code.shape, 1), jnp.int32),
            ],
            axis=-1,
        )
        at_colon = jnp.arange(self.sizes.header) == (3 + label_length)[..., None]
        return jnp.where(at_colon, table.colon, ids), label_length + 4

    def fork(
        self,
        state: State,
        forks: jax.Array,
        header: jax.Array,
        header_length: jax.Array,
        share: jax.Array,
    ) -> State:
        """Lays `</Outlines>` and every header; each thread gets a range of numbers."""
        sizes, lanes = self.sizes, state.lanes
        index = jnp.arange(sizes.lanes, dtype=jnp.int32)
        threads = state.outlines.count
        wanted = index < threads[:, None]
        lengths = jnp.where(wanted, header_length, 0)
        stride = (sizes.header + share)[:, None]
        low = state.number[:, None] + 1 + index * stride
        # Entry 0 is the stop token; thread j's header follows those before it.
        start = 1 + jnp.cumsum(lengths, axis=1, dtype=jnp.int32) - lengths
        q = jnp.arange(sizes.queue, dtype=jnp.int32)
        lane, offset = _locate(start, lengths, q)
        token = _pick(header.reshape(sizes.rows, -1), lane * sizes.header + offset)
        is_first = q == 0
        trunk = state.length[:, None] - 1
        new = Queue(
            tokens=jnp.where(is_first, lanes.last[:, :1], token),
            enter=jnp.where(is_first, state.number[:, None], _pick(low, lane) + offset),
            exit=jnp.where(is_first, FOREVER, _pick(low + stride, lane)),
            depth=jnp.where(is_first, trunk, trunk + 1 + offset),
            length=1 + lengths.sum(axis=1),
            at=jnp.zeros_like(state.queue.at),
            readout=jnp.where(wanted, start + lengths - 1, -1),
        )
        fork_lanes = lanes.replace(
            live=wanted,
            enter=low + lengths,
            exit=low + stride,
            depth=trunk + 1 + lengths,
            length=jnp.zeros_like(lanes.length),
            budget=jnp.broadcast_to(share[:, None], lanes.budget.shape),
            closed=jnp.zeros_like(lanes.closed),
            ended=jnp.zeros_like(lanes.ended),
            header=header,
            header_length=lengths,
        )
        return state.replace(
            queue=_where(forks, new, state.queue),
            lanes=_where(forks, fork_lanes, lanes),
            phase=jnp.where(forks, THREADS, state.phase),
            threads=jnp.where(forks, threads, state.threads),
            call=jnp.where(forks, state.call + 1, state.call),
            number=jnp.where(forks, low[:, 0] + threads * stride[:, 0], state.number),
        )

    def join(self, state: State, joins: jax.Array) -> State:
        """Keeps thread 1, hides the others, and lays what the joined path has after thread 1."""
        sizes, lanes, table = self.sizes, state.lanes, self.table
        index = jnp.arange(sizes.lanes, dtype=jnp.int32)
        is_thread = index < state.threads[:, None]
        text = lanes.length - lanes.ended  # an end of sequence is cut
        unclosed = is_thread & ~lanes.closed
        # Thread 1 is encoded up to its last token.
        skipped = jnp.where(index == 0, lanes.length - 1, 0)
        head = jnp.where(is_thread & (index > 0), lanes.header_length - 1, 0)
        body = jnp.where(is_thread, text - skipped, 0)
        closer = 2 * unclosed
        lengths = head + body + closer
        start = jnp.cumsum(lengths, axis=1, dtype=jnp.int32) - lengths
        total = lengths.sum(axis=1, dtype=jnp.int32) + 1  # and the newline
        q = jnp.arange(sizes.queue, dtype=jnp.int32)
        lane, offset = _locate(start, lengths, q)
        in_body = offset - _pick(head, lane)
        in_closer = in_body - _pick(body, lane)
        of_head = _pick(lanes.header.reshape(sizes.rows, -1), lane * sizes.header + offset + 1)
        body_at = lane * sizes.body + in_body + _pick(skipped, lane)
        of_body = _pick(lanes.body.reshape(sizes.rows, -1), body_at)
        of_closer = jnp.where(in_closer == 0, table.newline, table.end_thread)
        token = jnp.where(in_closer >= 0, of_closer, jnp.where(in_body >= 0, of_body, of_head))
        abort = bool(self.limits.unfinished_thread == "abort") & unclosed.any(axis=1)
        depth = lanes.depth[:, :1]
        new = Queue(
            tokens=jnp.where(q == total[:, None] - 1, table.newline, token),
            enter=state.number[:, None] + q,
            exit=jnp.full((sizes.rows, sizes.queue), FOREVER, jnp.int32),
            depth=depth + q,
            length=jnp.where(abort, 0, total),
            at=jnp.zeros_like(state.queue.at),
            readout=jnp.where(index == 0, total[:, None] - 1, -1),
        )
        length = depth[:, 0] + total
        over = state.limit - length < 1
        first = index == 0
        parent = lanes.replace(
            live=jnp.broadcast_to(first, lanes.live.shape) & ~(abort | over)[:, None],
            enter=jnp.broadcast_to((state.number + total)[:, None], lanes.enter.shape),
            exit=jnp.full_like(lanes.exit, FOREVER),
            depth=jnp.broadcast_to(length[:, None], lanes.depth.shape),
            length=jnp.zeros_like(lanes.length),
            budget=jnp.broadcast_to((state.limit - length)[:, None], lanes.budget.shape),
        )
        # Whatever is still visible below the end of thread 1's range is the trunk or thread 1.
        high = jnp.where(joins, lanes.exit[:, 0], 0)
        kept = (jnp.zeros_like(high), high)
        dropped = (high, jnp.where(joins, state.number, 0))
        return state.replace(
            cache=state.cache.replace(span=caches.join(state.cache.span, kept, dropped)),
            queue=_where(joins, new, state.queue),
            lanes=_where(joins, parent, lanes),
            outlines=state.outlines.replace(
                seen=state.outlines.seen & ~joins,
                state=jnp.where(joins, IDLE, state.outlines.state),
            ),
            phase=jnp.where(joins, jnp.where(abort | over, DONE, PARENT), state.phase),
            rounds=state.rounds + joins,
            call=jnp.where(joins, state.call + state.threads, state.call),
            length=jnp.where(joins, length, state.length),
            number=jnp.where(joins, state.number + total, state.number),
        )


def _locate(start: jax.Array, lengths: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """For each queue entry the lane whose run [start, start + length) holds it, and the offset.

    Args:
      start, lengths: [B, C] int32.
      q: [Q] int32.

    Returns:
      lane and offset, [B, Q] int32; outside every run the last run before the entry.
    """
    inside = (start[:, :, None] <= q) & (lengths > 0)[:, :, None]
    order = jnp.arange(start.shape[1], dtype=jnp.int32)[None, :, None]
    lane = jnp.where(inside, order, 0).max(axis=1)
    return lane, q - jnp.take_along_axis(start, lane, axis=1)


def _pick(values: jax.Array, index: jax.Array) -> jax.Array:
    """values[b, index[b, q]], with the index clipped into range."""
    return jnp.take_along_axis(values, jnp.clip(index, 0, values.shape[1] - 1), axis=1)


def _where(rows: jax.Array, new: Any, old: Any) -> Any:
    """Takes `new` in the given rows and `old` elsewhere, leaf by leaf."""
    return jax.tree.map(
        lambda a, b: jnp.where(rows.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, old
    )
