"""Fork-join rollouts: siblings are lanes that share one prefix cache stored once.

`Sampler` is the config, `make_sampler` builds the programs, and a `ForkJoinSampler` calls them. Its
loop can be entered and left, so that whoever calls it decides when rows start and end:

    state = sampler.empty(sampling)                                     no rollouts yet
    state = sampler.admit(params, state, rows, prompts, sampling)       prompts in, rows start
    state = sampler.advance(params, state, max_turns=16)                decodes
    state = sampler.make_room(state)                                    if a cache is full
    made = sampler.collect(state, rows, prompts)                        rollouts that are done
    state = sampler.release(state, rows)                                rows are free again

`sampler(params, prompts, sampling)` runs this loop for one batch after another.

A compiled program has fixed shapes, so the capacity of the cache is one of a ladder of buckets.
When a row runs out of slots the program returns to the host, which drops dead entries and, if that
is not enough, moves to the next bucket; each bucket is compiled once. Every finished rollout is run
through the host's protocol with the ids drawn here. This builds its `Trajectory`, and it raises an
error if host and device ever disagree.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax import hosts, sharding
from tw_jax.bounds import LARGEST, require, require_temperature
from tw_jax.config import configurable
from tw_jax.contracts import Network, Params, Span
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.protocol import Result
from tw_jax.forkjoin.replay import rebuild
from tw_jax.forkjoin.table import MAX_LABEL, TableProtocol
from tw_jax.sample import cache as caches
from tw_jax.sample import rows as row_functions
from tw_jax.sample.draw import draw, sampling_arrays
from tw_jax.sample.state import DONE, Log, Sizes, State
from tw_jax.sample.step import Program


@configurable
class Sampler:
    """Sizes of the sampler, and the sampling parameters of rollouts that do not bring their own.

    Attributes:
      rows: Rollouts that are decoded at the same time.
      max_prompt: Longest prompt, in tokens.
      prefill_chunk: Tokens of a prompt, a fork or a join that are encoded at once.
      temperature: Divides the logits. 0 takes the most likely token.
      top_p: Sample only from the smallest set of most likely tokens whose probability reaches
        top_p. 1 disables the limit.
      top_k: Sample only from the k most likely tokens. 0 disables the limit.
      seed: Rollout i is sampled with seed + i.
    """

    rows: int = 32
    max_prompt: int = 1024
    prefill_chunk: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def check(self) -> None:
        """Refuses sizes below 1, and parameters that describe no distribution."""
        require(self, "rows", "max_prompt", "prefill_chunk", least=1)
        require(self, "top_k", "seed", least=0)
        require(self, "top_p", above=0, most=1)
        require_temperature(self)


def prompt_limits(cfg: Sampler, limits: ForkJoin) -> dict[str, int]:
    """The most tokens that a prompt may have, by the config field that sets the limit."""
    # A prompt that fills the context would end before its first token is drawn.
    return {"Sampler.max_prompt": cfg.max_prompt, "ForkJoin.max_context": limits.max_context - 1}


@dataclasses.dataclass(frozen=True, eq=False)
class Jitted:
    """The jitted programs, each compiled once for each bucket of the cache."""

    empty: Callable[[int], State]
    prefill: Callable[[Params, jax.Array, jax.Array, int], caches.TrieCache]
    insert: Callable[..., State]
    advance: Callable[[Params, State, int], State]
    grow: Callable[[State, int], State]
    release: Callable[[State, jax.Array], State]
    take: Callable[[Log, np.ndarray], Log]


@dataclasses.dataclass(frozen=True, eq=False)
class ForkJoinSampler:
    """Draws rollouts; `make_sampler` builds it.

    Methods that return a state consume the one that they are given: its arrays are donated.
    """

    network: Network
    protocol: TableProtocol
    cfg: Sampler
    sizes: Sizes
    jitted: Jitted

    def __call__(
        self,
        params: Params,
        prompts: Sequence[np.ndarray],
        sampling: Any = None,
        *,
        repeats: int = 1,
    ) -> list[Trajectory]:
        """Rollouts for each prompt, those of one prompt next to each other.

        Args:
          params: of the network.
          prompts: arrays of int32 ids; any number, decoded `Sampler.rows` rollouts at a time.
          sampling: what `draw` reads, with a leading axis of len(prompts) * repeats; by default the
            config's temperature, top-p, top-k and seeds.
          repeats: Rollouts of each prompt, which is encoded once; a divisor of `Sampler.rows`.

        Raises:
          ValueError: A prompt is empty, longer than `Sampler.max_prompt`, or holds an id outside
            the vocabulary; or `repeats` does not divide `Sampler.rows`.
        """
        for number, prompt in enumerate(prompts):
            self._check(number, prompt)
        cfg = self.cfg
        if cfg.rows % repeats:
            raise ValueError(
                f"repeats = {repeats} does not divide Sampler.rows = {cfg.rows}. Set Sampler.rows "
                "to a multiple, so that all rollouts of a prompt are in one batch."
            )
        count = len(prompts) * repeats
        if sampling is None:
            sampling = sampling_arrays(
                count,
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                top_k=cfg.top_k,
                seed=cfg.seed,
            )
        made: list[Trajectory] = []
        for first in range(0, count, cfg.rows):
            some = prompts[first // repeats : (first + cfg.rows) // repeats]
            given = jax.tree.map(lambda a, n=first: np.asarray(a)[n : n + cfg.rows], sampling)
            state = self.decode(params, some, given, repeats=repeats)
            each = [prompt for prompt in some for _ in range(repeats)]
            made += self.collect(state, range(len(each)), each)
        return made

    def decode(
        self, params: Params, prompts: Sequence[np.ndarray], sampling: Any, *, repeats: int = 1
    ) -> State:
        """Runs at most `Sampler.rows` rollouts, in rows 0, 1, ..., to their ends."""
        state = self.empty(sampling, slots=self._slots(prompts))
        rows = range(len(prompts) * repeats)
        state = self.admit(params, state, rows, prompts, sampling, repeats=repeats)
        while True:
            state = self.advance(params, state)
            if (hosts.to_host(state.phase) == DONE).all():
                return state
            state = self.make_room(state)

    def empty(self, sampling: Any = None, *, slots: int = 1) -> State:
        """A state without rollouts.

        Args:
          sampling: what `draw` reads; it gives shapes and dtypes, its values do not matter. By
            default the `SamplingArrays` of `draw`.
          slots: smallest capacity of the cache.
        """
        rows = self.sizes.rows
        if sampling is None:
            sampling = sampling_arrays(rows, temperature=0.0, top_p=1.0, top_k=0, seed=0)
        zeros = jax.tree.map(lambda a: np.zeros((rows, *a.shape[1:]), a.dtype), sampling)
        state = self.jitted.empty(caches.bucket(slots))
        return state.replace(sampling=sharding.put_rows(zeros))

    def admit(
        self,
        params: Params,
        state: State,
        rows: Sequence[int],
        prompts: Sequence[np.ndarray],
        sampling: Any,
        *,
        repeats: int = 1,
    ) -> State:
        """Starts rollouts in rows that are done; the other rows do not notice.

        A prompt is encoded once for all its rollouts, beside the running rows and before they go
        on. The ids of a rollout depend on its prompt, its parameters and its seed, and not on its
        row, its neighbours or the turn at which it is admitted.

        Args:
          params: of the network.
          state: B rows.
          rows: len(prompts) * repeats different rows; row i takes prompt i // repeats.
          prompts: arrays of int32 ids.
          sampling: what `draw` reads, with a leading axis of len(rows).
          repeats: rollouts of each prompt.

        Raises:
          ValueError: A row is decoding or does not exist, the number of rows is not that of the
            rollouts, or a prompt is refused as in `__call__`.
        """
        for number, prompt in enumerate(prompts):
            self._check(number, prompt)
        self._check_rows(state, rows, len(prompts) * repeats)
        slots = caches.bucket(self._slots(prompts))
        if state.cache.slots < slots:
            state = self.jitted.grow(state, slots)
        groups = self._prefill_rows(len(prompts), self.sizes.rows // repeats)
        tokens = np.zeros((groups, self.cfg.max_prompt), np.int32)
        length = np.zeros(groups, np.int32)
        for g, prompt in enumerate(prompts):
            length[g] = len(prompt)
            tokens[g, : len(prompt)] = prompt
        request = np.full(self.sizes.rows, -1, np.int32)
        request[list(rows)] = np.arange(len(rows))
        given = jax.tree.map(lambda a: np.asarray(a)[np.maximum(request, 0)], sampling)
        source = np.where(request < 0, -1, request // repeats).astype(np.int32)
        tokens, length = sharding.put_rows((tokens, length))
        encoded = self.jitted.prefill(params, tokens, length, slots)
        source, given = sharding.put_rows((source, given))
        return self.jitted.insert(state, encoded, tokens, length, source, given)

    def advance(self, params: Params, state: State, max_turns: int = LARGEST) -> State:
        """Decodes until every row is done, a row lacks room, or `max_turns` turns are over.

        A turn draws at most one token for each lane. If a row lacks room, nothing more is decoded
        until `make_room`. No value of `max_turns` compiles anything.
        """
        return self.jitted.advance(params, state, max_turns)

    def make_room(self, state: State) -> State:
        """Makes room for the next turn of every row; returns `state` itself where there is room."""
        phase, used = hosts.to_host((state.phase, state.cache.used))
        chunk, slots = self.sizes.chunk, state.cache.slots
        if (used[phase != DONE] + chunk <= slots).all():
            return state
        span = hosts.to_host(state.cache.span)
        live = (span.exit > span.enter).sum(axis=1)
        needed = int(live[phase != DONE].max()) + chunk
        bucket = caches.bucket(needed)
        # Dropping dead entries alone must free a quarter, or the next stop comes too soon.
        if needed > 3 * slots // 4:
            bucket = caches.bucket(max(needed, slots + 1))
        return self.jitted.grow(state, max(bucket, slots))

    def collect(
        self, state: State, rows: Sequence[int], prompts: Sequence[np.ndarray]
    ) -> list[Trajectory]:
        """The rollouts of rows that are done, in the order of `rows`.

        The drawn ids are run through the host's protocol, which makes calls, joins, provenance and
        counts of them.

        Args:
          state: B rows; it stays valid.
          rows: which rows, each done.
          prompts: the prompt of each of these rows.

        Raises:
          RecordError: A row is not done, or the prompt is not the one that it was admitted with.
        """
        # Padded to a power of two, so that few different programs are compiled.
        width = min(1 << max(len(rows) - 1, 0).bit_length(), self.sizes.rows)
        index = np.zeros(width, np.int32)
        index[: len(rows)] = rows
        log = hosts.to_host(self.jitted.take(state.log, index))
        made = []
        for b, prompt in enumerate(prompts):
            length = int(log.length[b])
            order = np.argsort(log.call[b, :length], kind="stable")
            call = log.call[b, :length][order]
            bounds = [*np.flatnonzero(np.diff(call, prepend=-1)), length]
            tokens, logp = log.tokens[b, :length][order], log.logp[b, :length][order]
            drawn = [
                Result(tokens[start:end], logp[start:end])
                for start, end in itertools.pairwise(bounds)
            ]
            made.append(rebuild(self.protocol, prompt, drawn))
        return made

    def release(self, state: State, rows: Sequence[int]) -> State:
        """Frees the cache of rows that are done and were collected; attention skips them then.

        Raises:
          ValueError: A row is decoding or does not exist.
        """
        self._check_rows(state, rows, len(rows))
        mask = np.zeros(self.sizes.rows, bool)
        mask[list(rows)] = True
        return self.jitted.release(state, sharding.put_rows(mask))

    def abstract(self, slots: int) -> State:
        """Shapes and dtypes of a state with `slots` slots a row, without its arrays."""
        return jax.eval_shape(lambda: self.empty(slots=slots))

    def _check(self, number: int, prompt: np.ndarray) -> None:
        cfg, ids = self.cfg, np.asarray(prompt)
        if not 0 < len(ids) <= cfg.max_prompt:
            raise ValueError(
                f"Prompt {number} has {len(ids)} tokens. It must have 1 to {cfg.max_prompt}; raise "
                "Sampler.max_prompt, or shorten the prompt."
            )
        num_ids = self.network.num_ids
        if ids.min() < 0 or ids.max() >= num_ids:
            bad = int(ids[(ids < 0) | (ids >= num_ids)][0])
            raise ValueError(
                f"Prompt {number} holds id {bad}, and the model has ids from 0 to {num_ids - 1}. "
                "Encode the prompt with the model's own tokenizer."
            )

    def _check_rows(self, state: State, rows: Sequence[int], count: int) -> None:
        there = self.sizes.rows
        if len(rows) != count or len(set(rows)) != count:
            raise ValueError(
                f"{count} rollouts need {count} different rows, and the rows are {list(rows)}. "
                "Give one row for each rollout."
            )
        phase = hosts.to_host(state.phase)
        if busy := [row for row in rows if not 0 <= row < there or phase[row] != DONE]:
            raise ValueError(
                f"Row {busy[0]} of {there} is still decoding or does not exist. Use rows that are "
                "done (State.phase)."
            )

    def _slots(self, prompts: Sequence[np.ndarray]) -> int:
        """Slots that hold the longest prompt, its last chunk and one chunk of what follows."""
        return max(map(len, prompts), default=1) + 2 * self.sizes.chunk

    @staticmethod
    def _prefill_rows(prompts: int, most: int) -> int:
        """Rows in which the prompts are encoded: `most`, halved as long as they fit."""
        split = sharding.row_split()
        while most % 2 == 0 and most // 2 >= prompts and most // 2 % split == 0:
            most //= 2
        return most


def make_sampler(
    network: Network,
    protocol: TableProtocol,
    cfg: Sampler,
    *,
    draw: Callable[..., tuple[jax.Array, jax.Array]] = draw,
) -> ForkJoinSampler:
    """Builds the sampler's programs; nothing is compiled before it is used.

    Args:
      network: the model.
      protocol: the table and the limits; `ForkJoin.max_threads` is the number of lanes.
      cfg: sizes and default parameters.
      draw: (logits [B, C, V], sampling, call [B, C], position [B, C]) -> tokens, logp
        [B, C]; tests and benchmarks give one that forces tokens.

    Raises:
      ValueError: The network has more ids than the tokenizer.
    """
    # Fewer are allowed: a model without rows for the control tokens never draws one.
    if network.num_ids > protocol.table.num_ids:
        raise ValueError(
            f"The network has {network.num_ids} ids and the tokenizer {protocol.table.num_ids}, "
            "which must be at least as many. Build the network with network(model, "
            "num_ids=tokenizer.vocab_size)."
        )
    limits = protocol.limits
    lanes = limits.max_threads if limits.parallel else 1
    header = 4 + max(MAX_LABEL, protocol.table.label.shape[1])
    most = limits.max_new + 1
    sizes = Sizes(
        rows=cfg.rows,
        lanes=lanes,
        chunk=max(cfg.prefill_chunk, lanes),
        # A queue holds a prompt, a fork's headers or a join. One more chunk of entries lets a
        # slice of that length start at any of them.
        queue=max(cfg.max_prompt, 1 + lanes * header, most) + max(cfg.prefill_chunk, lanes),
        body=min(limits.max_thread, most) if limits.parallel else 1,
        # Ends of sequence inside threads are drawn and not joined.
        log=most + lanes * (limits.max_rounds + 1),
        header=header,
        hidden=_hidden(network),
    )
    program = Program(network, protocol.table, limits, sizes, draw)
    jitted = Jitted(
        empty=jax.jit(
            functools.partial(row_functions.empty, network, sizes, limits), static_argnums=0
        ),
        prefill=jax.jit(program.prefill, static_argnums=3),
        insert=jax.jit(functools.partial(row_functions.insert, sizes, limits), donate_argnums=0),
        advance=jax.jit(program.advance, donate_argnums=1),
        grow=jax.jit(
            lambda state, slots: state.replace(cache=caches.grow(state.cache, slots)),
            static_argnums=1,
        ),
        release=jax.jit(row_functions.release, donate_argnums=0),
        take=jax.jit(lambda log, index: jax.tree.map(lambda x: x[index], log)),
    )
    return ForkJoinSampler(network=network, protocol=protocol, cfg=cfg, sizes=sizes, jitted=jitted)


def _hidden(network: Network) -> jax.ShapeDtypeStruct:
    """Width and dtype of the network's hidden states."""
    one: Any = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(network.init, jax.random.key(0))
    return jax.eval_shape(network.apply, params, one, one, Span(enter=one, exit=one))[0]
