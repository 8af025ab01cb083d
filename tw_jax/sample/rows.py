"""Rows enter and leave a running state: a fresh row for each prompt, its insertion, its release.

Each function is pure and jitted by `sample/sampler.py`. A row that is not touched keeps every
number, so a rollout does not notice that its neighbours come and go.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from tw_jax import sharding
from tw_jax.contracts import Network
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.table import EMPTY_CODE
from tw_jax.sample import cache as caches
from tw_jax.sample.cache import FOREVER, TrieCache
from tw_jax.sample.state import DONE, Lanes, Log, Outlines, Queue, Sizes, State, where


def fresh(sizes: Sizes, limits: ForkJoin, prompts: jax.Array, length: jax.Array) -> State:
    """Rows before their first step, with the whole prompt in the queue.

    Args:
      sizes: lengths of the arrays; `sizes.rows` does not matter here.
      limits: of fork and join.
      prompts: [R, P] int32, P at most `sizes.queue`.
      length: [R] int32; a row of length 0, and one without room for a token, is done.

    Returns:
      R rows without a cache and without sampling parameters.
    """
    rows, lanes = len(prompts), sizes.lanes

    def grid(*shape: int, fill: int | bool = 0, dtype: jax.typing.DTypeLike = jnp.int32):
        return jnp.full((rows, *shape), fill, dtype)

    limit = jnp.minimum(limits.max_context, length + limits.max_new)
    done = (length == 0) | (limit - length < 1)
    index = jnp.broadcast_to(jnp.arange(sizes.queue, dtype=jnp.int32), (rows, sizes.queue))
    first_lane = jnp.arange(lanes) == 0
    # The prompt has the numbers and the positions 0 .. length - 1; lane 0 continues after them.
    position = jnp.broadcast_to(length[:, None], (rows, lanes))
    return State(
        cache=None,  # pyright: ignore[reportArgumentType]
        queue=Queue(
            tokens=jnp.pad(prompts, ((0, 0), (0, sizes.queue - prompts.shape[1]))),
            enter=index,
            exit=grid(sizes.queue, fill=FOREVER),
            depth=index,
            length=jnp.where(done, 0, length),
            at=grid(),
            readout=jnp.where(first_lane, length[:, None] - 1, -1),
        ),
        lanes=Lanes(
            live=first_lane & ~done[:, None],
            enter=position,
            exit=grid(lanes, fill=FOREVER),
            depth=position,
            length=grid(lanes),
            budget=jnp.where(first_lane, (limit - length)[:, None], 0),
            body=grid(lanes, sizes.body),
            closed=grid(lanes, fill=False, dtype=bool),
            ended=grid(lanes, fill=False, dtype=bool),
            header=grid(lanes, sizes.header),
            header_length=grid(lanes),
            last=grid(lanes),
            hidden=grid(lanes, sizes.hidden.shape[-1], dtype=sizes.hidden.dtype),
        ),
        outlines=Outlines(
            seen=grid(fill=False, dtype=bool),
            state=grid(),
            code=grid(fill=EMPTY_CODE),
            length=grid(),
            found=grid(lanes),
            count=grid(),
        ),
        log=Log(
            tokens=grid(sizes.log),
            logp=grid(sizes.log, dtype=jnp.float32),
            call=grid(sizes.log),
            length=grid(),
        ),
        phase=jnp.where(done, DONE, grid()),
        call=grid(),
        rounds=grid(),
        threads=grid(),
        length=length,
        limit=limit,
        number=length,
        sampling=None,
    )


def empty(network: Network, sizes: Sizes, limits: ForkJoin, slots: int) -> State:
    """A state whose rows are all done, with a cache of `slots` slots for each of them."""
    nothing = jnp.zeros((sizes.rows, 0), jnp.int32)
    state = fresh(sizes, limits, nothing, jnp.zeros(sizes.rows, jnp.int32))
    cache = caches.empty(network, sizes.rows, slots)
    # Rows are split over the devices as in `put_rows`. Keys and values have a placement already.
    state = state.replace(cache=cache.replace(kv=None))
    state = jax.tree.map(lambda x: sharding.constrain(x, ("rows", *[None] * (x.ndim - 1))), state)
    return state.replace(cache=state.cache.replace(kv=cache.kv))


def insert(
    sizes: Sizes,
    limits: ForkJoin,
    state: State,
    encoded: TrieCache,
    prompts: jax.Array,
    length: jax.Array,
    source: jax.Array,
    sampling: object,
) -> State:
    """Starts new rollouts in some rows of a running state.

    Several rows may take the same prompt. Its keys and values are copied to each of them, because
    every row has a cache of its own.

    Args:
      sizes: of the program.
      limits: of fork and join.
      state: B rows.
      encoded: G rows, the cache of all tokens but the last of each prompt; at most as many slots
        as the cache of `state`.
      prompts: [G, P] int32.
      length: [G] int32.
      source: [B] int32, the prompt that a row takes, or -1 if the row stays as it is.
      sampling: what `draw` reads, [B, ...]; read where a row takes a prompt.
    """
    takes, source = source >= 0, jnp.maximum(source, 0)
    new = fresh(sizes, limits, prompts[source], length[source])
    # The last token is left to the row's first step, which then has a state to draw from.
    queue = new.queue.replace(at=jnp.maximum(new.queue.length - 1, 0))
    slots = encoded.slots
    unused = state.cache.slots - slots

    def padded(x: jax.Array) -> jax.Array:
        # Slots after those of `encoded` get an empty span, so nothing sees what they hold.
        return jnp.pad(x[source], ((0, 0), (0, unused)))

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        # Only the first slots are written. `jnp.where` keeps rows that are split over devices
        # where they are; an update at a traced row would gather the cache.
        rows = takes[:, None, None, None]
        head = jnp.where(rows, new[:, source], old[:, :, :, :slots])
        return jax.lax.dynamic_update_slice(old, head, (0,) * old.ndim)

    cache = TrieCache(
        kv=jax.tree.map(put, state.cache.kv, encoded.kv),
        span=where(takes, jax.tree.map(padded, encoded.span), state.cache.span),
        used=where(takes, encoded.used[source], state.cache.used),
    )
    new = new.replace(queue=queue, sampling=sampling)
    rest = where(takes, new, state.replace(cache=None))
    return rest.replace(cache=cache)


def release(state: State, rows: jax.Array) -> State:
    """Hides all entries of finished rows, so that attention no longer reads them.

    Args:
      state: B rows.
      rows: [B] bool; these must be done. They stay done until a prompt is inserted.
    """
    cache, queue = state.cache, state.queue
    # A row may be done with entries in its queue, which must not be encoded into an empty cache.
    return state.replace(
        cache=cache.replace(
            span=where(rows, jax.tree.map(jnp.zeros_like, cache.span), cache.span),
            used=jnp.where(rows, 0, cache.used),
        ),
        queue=queue.replace(
            length=jnp.where(rows, 0, queue.length), at=jnp.where(rows, 0, queue.at)
        ),
    )
