"""Fork-join rollouts: siblings are lanes that share one prefix cache stored once.

One jitted program (`sample/step.py`) decodes a batch of rollouts from prompts to their ends.
Whatever has to be encoded (a prompt, the headers of a fork, the threads that a join re-encodes, the
next token of each lane) stands in a row's queue; a row whose queue ran empty draws one token for
each live lane and lays its next queue.

The KV cache is a loop carry. Its capacity is a bucket; when a row runs out of slots the loop
returns to the host, which drops dead entries and moves to the next bucket. Every finished rollout
is run through the host's protocol with the ids drawn here, which builds its `Trajectory` and would
raise if host and device ever disagreed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tw_jax import hosts, sharding
from tw_jax.bounds import require, require_temperature
from tw_jax.config import configurable
from tw_jax.contracts import Network, Params, Span
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.protocol import Result
from tw_jax.forkjoin.replay import rebuild
from tw_jax.forkjoin.table import EMPTY_CODE, MAX_LABEL, TableProtocol
from tw_jax.sample import cache as caches
from tw_jax.sample.cache import FOREVER
from tw_jax.sample.draw import draw, sampling_params
from tw_jax.sample.state import DONE, Lanes, Log, Outlines, Queue, Sizes, State
from tw_jax.sample.step import Program


@configurable
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
        """Refuses sizes below one, and draws from no distribution."""
        require(self, "rows", "max_prompt", "prefill_chunk", least=1)
        require(self, "top_k", "seed", least=0)
        require(self, "top_p", above=0, most=1)
        require_temperature(self)


def prompt_limits(cfg: Sampler, limits: ForkJoin) -> dict[str, int]:
    """The most tokens that a prompt may have, by the config field that says so."""
    # A prompt that fills the context would end before its first token is drawn.
    return {"Sampler.max_prompt": cfg.max_prompt, "ForkJoin.max_context": limits.max_context - 1}


@dataclasses.dataclass(frozen=True, eq=False)
class ForkJoinSampler:
    """Draws rollouts. Build it once with `make_sampler`; a call compiles once for each bucket."""

    network: Network
    protocol: TableProtocol
    cfg: Sampler
    sizes: Sizes
    advance: Callable[[Params, State, Any], State]
    grow: Callable[[State, int], State]
    prefill: Callable[[Params, int, State], State]

    def __call__(
        self,
        params: Params,
        prompts: Sequence[np.ndarray],
        sampling: Any = None,
        *,
        repeats: int = 1,
    ) -> list[Trajectory]:
        """Rollouts for each prompt, those of one prompt side by side.

        Args:
          params: of the network.
          prompts: arrays of int32 ids; any number, decoded `Sampler.rows` rollouts at a time.
          sampling: what `draw` reads, with a leading axis of len(prompts) * repeats; by default the
            config's temperature, top-p, top-k and seeds.
          repeats: rollouts of each prompt, which is encoded once; a divisor of `Sampler.rows`.

        Raises:
          ValueError: a prompt is empty, longer than `Sampler.max_prompt`, or holds an id outside
            the vocabulary; or `repeats` does not divide `Sampler.rows`.
        """
        for number, prompt in enumerate(prompts):
            self._check(number, prompt)
        cfg = self.cfg
        if cfg.rows % repeats:
            raise ValueError(
                f"repeats = {repeats}: want a divisor of Sampler.rows = {cfg.rows}, for the "
                "rollouts of a prompt are decoded side by side. Change Sampler.rows."
            )
        count = len(prompts) * repeats
        if sampling is None:
            sampling = sampling_params(
                max(count, 1),
                temperature=cfg.temperature,
                top_p=cfg.top_p,
                top_k=cfg.top_k,
                seed=cfg.seed,
            )
        made: list[Trajectory] = []
        for first in range(0, count, cfg.rows):
            some = prompts[first // repeats : (first + cfg.rows) // repeats]
            index = np.minimum(np.arange(first, first + cfg.rows), count - 1)
            given = sharding.put_rows(jax.tree.map(lambda a, i=index: np.asarray(a)[i], sampling))
            state = self.decode(params, some, given, repeats=repeats)
            made += self._collect(state, [prompt for prompt in some for _ in range(repeats)])
        return made

    def decode(
        self, params: Params, prompts: Sequence[np.ndarray], sampling: Any, *, repeats: int = 1
    ) -> State:
        """Runs at most `Sampler.rows` rollouts to their ends; `sampling` has `rows` rows."""
        state = self._start(prompts, self.sizes.rows // repeats)
        if repeats > 1:
            state = self.prefill(params, repeats, state)
        while True:
            state = self.advance(params, state, sampling)
            phase, span = hosts.to_host((state.phase, state.cache.span))
            if (phase == DONE).all():
                return state
            live = (span.exit > span.enter).sum(axis=1)
            want = int(live[phase != DONE].max()) + self.sizes.chunk
            slots = caches.bucket(want)
            # Dropping dead entries alone must free a quarter, or the next stop comes too soon.
            if want > 3 * state.cache.slots // 4:
                slots = caches.bucket(max(want, state.cache.slots + 1))
            state = self.grow(state, max(slots, state.cache.slots))

    def abstract(self, rows: int, slots: int) -> State:
        """Shapes and dtypes of a state of so many rows and slots a row, without an array."""
        state = jax.eval_shape(lambda: self._start([], rows))
        cache = jax.eval_shape(lambda: caches.empty(self.network, rows, slots))
        return state.replace(cache=cache)

    def _check(self, number: int, prompt: np.ndarray) -> None:
        cfg, ids = self.cfg, np.asarray(prompt)
        if not 0 < len(ids) <= cfg.max_prompt:
            raise ValueError(
                f"Prompt {number} has {len(ids)} tokens: want 1 to {cfg.max_prompt}. Raise "
                "Sampler.max_prompt, or shorten the prompt."
            )
        num_ids = self.network.num_ids
        if ids.min() < 0 or ids.max() >= num_ids:
            bad = int(ids[(ids < 0) | (ids >= num_ids)][0])
            raise ValueError(
                f"Prompt {number} holds token {bad}: want ids from 0 to {num_ids - 1}. The "
                "prompt was made with another tokenizer than the model's."
            )

    def _start(self, prompts: Sequence[np.ndarray], rows: int) -> State:
        """Every row before its first step; rows without a prompt are done."""
        sizes, limits = self.sizes, self.protocol.limits
        lanes = sizes.lanes

        def grid(*shape: int, dtype: Any = np.int32) -> Any:
            return np.zeros((rows, *shape), dtype)

        # Built by numpy, one leaf at a time, and moved to the device as a whole.
        tokens, length = grid(sizes.queue), grid()
        for b, prompt in enumerate(prompts):
            length[b] = len(prompt)
            tokens[b, : len(prompt)] = prompt
        limit: Any = np.minimum(limits.max_context, length + limits.max_new).astype(np.int32)
        done = (length == 0) | (limit - length < 1)
        index: Any = np.broadcast_to(np.arange(sizes.queue, dtype=np.int32), tokens.shape)
        first_lane: Any = np.arange(lanes) == 0
        position: Any = np.broadcast_to(length[:, None], (rows, lanes))

        state = State(
            cache=None,  # pyright: ignore[reportArgumentType]  # made below, without a copy
            queue=Queue(
                tokens=tokens,
                enter=index,
                exit=tokens * 0 + FOREVER,
                depth=index,
                length=length * ~done,
                at=grid(),
                readout=first_lane * length[:, None] - 1,
            ),
            lanes=Lanes(
                live=first_lane & ~done[:, None],
                enter=position,
                exit=grid(lanes) + FOREVER,
                depth=position,
                length=grid(lanes),
                budget=first_lane * (limit - length)[:, None],
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
                code=grid() + EMPTY_CODE,
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
            phase=grid() + DONE * done,
            call=grid(),
            rounds=grid(),
            threads=grid(),
            length=length,
            limit=limit,
            number=length,
        )
        slots = caches.bucket(int(length.max(initial=1)) + 2 * sizes.chunk)
        state = sharding.put_rows(state)
        return state.replace(cache=_empty(self.network, rows, slots))

    def _collect(self, state: State, prompts: Sequence[np.ndarray]) -> list[Trajectory]:
        """The drawn ids, run through the host protocol: calls, joins, provenance, counts."""
        log = hosts.to_host(state.log)
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


# Made by the devices that hold it, for no host could hand on what another's devices hold.
_empty = jax.jit(caches.empty, static_argnums=(0, 1, 2))


def make_sampler(
    network: Network,
    protocol: TableProtocol,
    cfg: Sampler,
    *,
    draw: Callable[..., tuple[jax.Array, jax.Array]] = draw,
) -> ForkJoinSampler:
    """Builds the sampler's program.

    Args:
      network: the model.
      protocol: the table and the limits; `ForkJoin.max_threads` is the number of lanes.
      cfg: sizes and the default settings.
      draw: (logits [B, C, V], sampling, call [B, C], position [B, C]) -> tokens, logp
        [B, C]; another one forces given tokens.

    Raises:
      ValueError: the network gives probability to ids that the tokenizer does not have.
    """
    # Fewer are no mistake: a model without rows for the control tokens never draws one.
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
        # A queue holds a prompt, a fork's headers or a join; the slack is one more chunk.
        queue=max(cfg.max_prompt, 1 + lanes * header, most) + max(cfg.prefill_chunk, lanes),
        body=min(limits.max_thread, most) if limits.parallel else 1,
        # Ends of sequence inside threads are drawn and not joined.
        log=most + lanes * (limits.max_rounds + 1),
        header=header,
        hidden=_hidden(network),
    )
    program = Program(network, protocol.table, limits, sizes, draw)
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
        prefill=jax.jit(program.prefill, static_argnums=1),
    )


def _hidden(network: Network) -> jax.ShapeDtypeStruct:
    """Width and dtype of the network's hidden states."""
    one: Any = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(network.init, jax.random.key(0))
    return jax.eval_shape(network.apply, params, one, one, Span(enter=one, exit=one))[0]
