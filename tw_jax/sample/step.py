"""The jitted program of the fork-join sampler: pure functions from one state to the next.

A turn (`step`) runs the same operations for every row:

    encode  up to T entries of the row's queue (T is 1, the number of lanes, or a chunk)
    draw    one token for each live lane, if the queue is empty now
    enqueue the drawn tokens, so that the next turn encodes them
    fork    if the parent drew `</Outlines>`: queue the headers of all threads
    join    if the last thread ended: queue the text that follows thread 1 in the joined path

Rows are in different places of their rollouts, and no row waits for another. Five turns of three
rows, with 2 lanes and chunks of 4:

    turn  T  row 0        row 1                              row 2
    1     2  draws 1      draws </Outlines>: fork, queue 11  its two threads draw 1 each
    2     4  draws 1      encodes 4 of 11                    thread 2 draws </Thread>
    3     4  draws 1      encodes 8 of 11                    thread 1 draws </Thread>: join, queue 9
    4     4  draws 1      encodes 11; its threads draw       encodes 4 of 9
    5     4  draws 1      encodes 2; its threads draw        encodes 8 of 9

Row 1 queues `</Outlines>` and two headers of 5 ids. Row 2 queues the last token of thread 1, the
header of thread 2 without its leading newline, the 3 tokens of thread 2, and a newline.

Each entry of the cache has a logical number, which says who sees it, and a depth, which is its
position in the text. Siblings have the same depths and different numbers:

    trunk 0..9 | fork | thread 1: numbers 10..39 | thread 2: numbers 40..69 | join: from 70 on

A query at number `at` sees an entry if `enter <= at < exit`. The trunk never exits. The entries of
thread 1 exit at 40, so thread 2 does not see them. A join sets the exit of thread 1's entries to
"never" and hides those of thread 2, whose text is encoded again after thread 1, at new depths.

Decisions are those of the host protocol, read from the same `Table`. This file does not depend on a
method, a prompt or a trajectory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from tw_jax.contracts import Network, Params, Span
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.table import EMPTY_CODE, IDLE, MAX_LABEL, RADIX, TABLED_LABELS, Table
from tw_jax.sample import cache as caches
from tw_jax.sample.cache import FOREVER
from tw_jax.sample.rows import fresh
from tw_jax.sample.state import DONE, PARENT, THREADS, Log, Outlines, Queue, Sizes, State, where


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """The pure functions that make up one jitted program."""

    network: Network
    table: Table
    limits: ForkJoin
    sizes: Sizes
    draw: Callable[..., tuple[jax.Array, jax.Array]]

    def advance(self, params: Params, state: State, max_turns: jax.Array) -> State:
        """Decodes until every row is done, a row lacks room, or `max_turns` turns are over.

        Args:
          params: of the network.
          state: B rows.
          max_turns: [] int32, traced, so that no value of it compiles anything.
        """
        sizes = self.sizes

        def has_room(state: State) -> jax.Array:
            # The next turn may write a whole chunk. Rows that are done never need room again.
            most = jnp.where(state.phase == DONE, 0, state.cache.used).max()
            return most + sizes.chunk <= state.cache.slots

        def goes_on(carry: tuple[State, jax.Array]) -> jax.Array:
            state, turns = carry
            return (turns < max_turns) & (state.phase != DONE).any() & has_room(state)

        def waiting(state: State) -> jax.Array:
            return (state.queue.length - state.queue.at).max()

        def loop(above: int, width: int, carry: tuple[State, jax.Array]):
            return jax.lax.while_loop(
                lambda c: goes_on(c) & (waiting(c[0]) > above) & (waiting(c[0]) <= cap[width]),
                lambda c: (self.step(params, width, c[0]), c[1] + 1),
                carry,
            )

        # A turn encodes as many entries as the fullest queue needs, rounded up to one of three
        # widths: one lane, all lanes, or a chunk. Each width has an inner loop of its own, and the
        # outer loop passes from one to the next. A `cond` (or `switch`) over widths would be
        # shorter, but its branches would return the cache, and XLA copies what a branch returns.
        widths = sorted({1, sizes.lanes, sizes.chunk})
        cap = {width: width for width in widths[:-1]} | {widths[-1]: sizes.queue}
        above = dict(zip(widths, [-1, *widths[:-1]], strict=True))

        def each_width(carry: tuple[State, jax.Array]):
            for width in reversed(widths):
                carry = loop(above[width], width, carry)
            return carry

        return jax.lax.while_loop(goes_on, each_width, (state, jnp.int32(0)))[0]

    def prefill(
        self, params: Params, prompts: jax.Array, length: jax.Array, slots: int
    ) -> caches.TrieCache:
        """Encodes all tokens of each prompt but the last, which the first step encodes.

        Args:
          params: of the network.
          prompts: [G, P] int32.
          length: [G] int32.
          slots: of the cache; a chunk more than the longest prompt.

        Returns:
          The cache of G rows.
        """
        state = fresh(self.sizes, self.limits, prompts, jnp.maximum(length - 1, 0))
        state = state.replace(cache=caches.empty(self.network, len(prompts), slots))
        state = jax.lax.while_loop(
            lambda s: (s.queue.at < s.queue.length).any(),
            functools.partial(self.encode, params, self.sizes.chunk),
            state,
        )
        return state.cache

    def step(self, params: Params, width: int, state: State) -> State:
        """One turn: encodes `width` entries of every queue; rows whose queue is empty then draw.

        Every row runs through the same operations, whatever it has to do; the masks `ready`,
        `active`, `forks` and `joins` say for which rows and lanes a result counts.
        """
        state = self.encode(params, width, state)
        ready = (state.queue.at >= state.queue.length) & (state.phase != DONE)
        active = state.lanes.live & ready[:, None]
        logits = self.network.unembed(params, state.lanes.hidden)
        lane = jnp.arange(self.sizes.lanes, dtype=jnp.int32)
        call = state.call[:, None] + lane
        # Keys of the draw are made of (seed, call, position): nothing else of the batch is in them.
        tokens, logp = self.draw(logits, state.sampling, call, state.lanes.length)
        state = self.record(state, active, tokens, logp)
        state, stopped = self.read(state, active)
        state = self.enqueue(state, ready, active & ~stopped)
        forks = ready & (state.phase == PARENT) & stopped[:, 0]
        joins = ready & (state.phase == THREADS) & ~state.lanes.live.any(axis=1)
        # Forks and joins are rare and their arrays are as long as the queue, so most turns skip
        # them. Keys and values stay outside the branch, which would copy them; spans go through
        # it, because a join changes them.
        kv, sampling = state.cache.kv, state.sampling
        state = jax.lax.cond(
            (forks | joins).any(),
            lambda s: self.decide(s, forks, joins),
            lambda s: s,
            state.replace(cache=state.cache.replace(kv=None), sampling=None),
        )
        return state.replace(cache=state.cache.replace(kv=kv), sampling=sampling)

    def encode(self, params: Params, width: int, state: State) -> State:
        """Runs the next `width` entries of each queue through the network.

        A row with fewer entries is padded with entries that nothing sees. They are written to the
        cache after the real ones and are overwritten by the next turn, because `used` counts only
        the real ones.
        """
        queue, cache, lanes = state.queue, state.cache, state.lanes
        cut = jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (at,), (width,)))
        position = queue.at[:, None] + jnp.arange(width, dtype=jnp.int32)
        valid = position < queue.length[:, None]
        enter = cut(queue.enter, queue.at)
        span = Span(enter=enter, exit=jnp.where(valid, cut(queue.exit, queue.at), enter))
        keys = caches.write_spans(cache, span)
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
        # A lane's next token is predicted by one entry of the queue. Its hidden state is kept until
        # the queue is empty, which for a fork or a join may be several turns later.
        offset = queue.readout - queue.at[:, None]
        here = (offset >= 0) & (offset < taken[:, None])
        read = jnp.take_along_axis(hidden, jnp.clip(offset, 0, width - 1)[..., None], axis=1)
        return state.replace(
            cache=cache.replace(kv=kv, span=keys, used=cache.used + taken),
            queue=queue.replace(at=queue.at + taken),
            lanes=lanes.replace(hidden=jnp.where(here[..., None], read, lanes.hidden)),
        )

    def record(self, state: State, active: jax.Array, tokens: jax.Array, logp: jax.Array) -> State:
        """Writes the drawn tokens to the log and, for threads, to the lanes' bodies."""
        lanes, log = state.lanes, state.log
        lane = jnp.arange(self.sizes.lanes, dtype=jnp.int32)
        # Active lanes first: one slice of the log is written, its tail is overwritten next turn.
        order = jnp.argsort(~active, axis=1, stable=True)
        put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,)))

        def append(row: jax.Array, new: jax.Array) -> jax.Array:
            return put(row, jnp.take_along_axis(new, order, axis=1), log.length)

        call = state.call[:, None] + lane
        drawn = active.sum(axis=1, dtype=jnp.int32)
        row = jnp.arange(self.sizes.rows)[:, None]
        # A slot past the end is dropped: lanes that do not draw, and a parent longer than a body.
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
        # `</Outlines>` without numbers ends the call but not the decoding: the lane goes on as
        # another call, with a new number and what is left of its budget.
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
        """One step of `Table.read_outlines` for every row.

        A label is kept as its code, an int32 in base 11, because a compiled loop has no strings. A
        token adds `width` characters to it at once: code * 11**width + pushed.
        """
        table = self.table
        state = outlines.state
        pushed = jnp.asarray(table.pushed)[state, token]
        width = jnp.asarray(table.pushed_length, jnp.int32)[state, token]
        completes = jnp.asarray(table.completes)[state, token]
        length = jnp.minimum(outlines.length + width, MAX_LABEL + 1)
        fits = length <= MAX_LABEL
        scale = jnp.asarray([RADIX**n for n in range(MAX_LABEL + 1)], jnp.int32)
        code = outlines.code * scale[jnp.minimum(width, MAX_LABEL)] + pushed
        code = jnp.where(fits, code, outlines.code)
        lanes = outlines.found.shape[1]
        index = jnp.arange(lanes)
        # A number that is written twice forks once; numbers after the last lane are dropped.
        known = ((outlines.found == code[:, None]) & (index < outlines.count[:, None])).any(axis=1)
        adds = completes & fits & (length > 0) & ~known & (outlines.count < lanes)
        found = jnp.where(
            adds[:, None] & (index == outlines.count[:, None]), code[:, None], outlines.found
        )
        begins, opens = token == table.outline, token == table.outlines
        new = Outlines(
            seen=outlines.seen | opens,
            state=jnp.where(opens, IDLE, jnp.asarray(table.next_state, jnp.int32)[state, token]),
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
        """The next queue of rows that are ready: the drawn token of each lane that goes on.

        Rows that fork or join in this turn overwrite it in `decide`.
        """
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
                readout=jnp.where(ready[:, None], jnp.where(goes_on, rank, -1), queue.readout),
            ),
            lanes=lanes.replace(enter=lanes.enter + goes_on, depth=lanes.depth + goes_on),
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
        # Room for all forced ids of the joined path is set aside first: for each thread its header
        # and its closer (2 ids), where later headers lose their leading newline, then a newline
        # after the last thread and one token for the parent. Threads share the rest equally, so a
        # join always fits. `ThreadWeaver.decide` computes the same.
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
        # Codes to digits: code = 11**length + the digits in base 11.
        power = jnp.asarray([RADIX**n for n in range(MAX_LABEL + 1)], jnp.int32)
        length = (code[..., None] >= power[1:]).sum(-1)
        place = jnp.arange(MAX_LABEL)
        shift = jnp.clip(length[..., None] - 1 - place, 0, MAX_LABEL)
        digit = code[..., None] // power[shift] % RADIX
        spelt = jnp.asarray(table.character)[digit]
        number = jnp.where(length == 1, digit[..., 0], digit[..., 0] * 10 + digit[..., 1])
        has_dot = ((digit == RADIX - 1) & (place < length[..., None])).any(-1)
        # "1" .. "99" are written as the tokenizer writes them, others character by character.
        plain = (length <= 2) & ~has_dot & (digit[..., 0] > 0)
        entry = jnp.clip(number - 1, 0, TABLED_LABELS - 1)
        width = self.sizes.header - 4
        written = jnp.pad(jnp.asarray(table.label), ((0, 0), (0, width - table.label.shape[1])))[
            entry
        ]
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
        """Queues `</Outlines>` and the headers of all threads; each thread has a range of numbers.

        A range is as long as the longest header and the thread's budget together, so a thread
        cannot run out of numbers. Numbers that it leaves unused are lost, which costs nothing.
        """
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
        # Depths continue from `</Outlines>` in every thread: siblings share positions.
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
            queue=where(forks, new, state.queue),
            lanes=where(forks, fork_lanes, lanes),
            phase=jnp.where(forks, THREADS, state.phase),
            threads=jnp.where(forks, threads, state.threads),
            call=jnp.where(forks, state.call + 1, state.call),
            number=jnp.where(forks, low[:, 0] + threads * stride[:, 0], state.number),
        )

    def join(self, state: State, joins: jax.Array) -> State:
        """Keeps thread 1, hides the others, and queues what the joined path has after thread 1.

        The joined path is the text in which the threads follow one another. Thread 1 has the same
        context there as it had as a thread, so its keys and values are valid. The other threads
        see their siblings now and have other depths, so their text is encoded again: headers and
        bodies in the order of the lanes, a closer for each thread that did not close itself, and a
        newline. All of it is one queue, which `token` reads from three sources: header, body,
        closer.
        """
        sizes, lanes, table = self.sizes, state.lanes, self.table
        index = jnp.arange(sizes.lanes, dtype=jnp.int32)
        is_thread = index < state.threads[:, None]
        text = lanes.length - lanes.ended  # an end of sequence is cut
        unclosed = is_thread & ~lanes.closed
        # A token is encoded in the turn after it is drawn. Thread 1 ended with its last draw, so
        # all of it but the last token is in the cache.
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
            queue=where(joins, new, state.queue),
            lanes=where(joins, parent, lanes),
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
      start: [B, C] int32, rising.
      lengths: [B, C] int32.
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
