"""Checksums of arrays, computed on their devices, and equal on every mesh and in every process.

Each element is mixed with its position, and the results are added modulo 2^32. Integer addition is
exact in any order, so the sum does not depend on how an array is split over devices. Each device
sums its own shards; no array is gathered or copied to the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORD_BITS = 0xFFFFFFFF


def checksums(arrays: Sequence[jax.Array]) -> list[str]:
    """The checksum of each array.

    Let p and q be two numbers of a position, both linear in its indices, and h the finalizer of
    MurmurHash3, a bijection of 32-bit words. With v = h(bits ^ p) and w = h(v ^ q) the checksum is
    (sum v, sum w) modulo 2^32. One changed element always changes the first sum. More changes go
    unnoticed with a probability of about 2^-64. An element of eight bytes is two words.

    Args:
      arrays: Arrays of any shape, of bool, integers, floats or typed PRNG keys. In a job of many
        processes each is a global array, or is on one device of this process.

    Returns:
      16 hexadecimal digits for each array. They depend on shape, positions and bits, but not on the
      sharding. Two dtypes with the same bits give the same checksum.
    """
    groups: dict[frozenset[Any], list[int]] = {}
    for index, array in enumerate(arrays):
        groups.setdefault(frozenset(array.sharding.device_set), []).append(index)
    found = [""] * len(arrays)
    for indices in groups.values():
        # All arrays of a mesh share one program, so that it is compiled and launched once.
        sums = np.asarray(_sums([arrays[index] for index in indices]))
        for index, (first, second) in zip(indices, sums.tolist(), strict=True):
            found[index] = f"{first:08x}{second:08x}"
    return found


@jax.jit
def _sums(arrays: list[jax.Array]) -> jax.Array:
    """[n, 2] uint32, the two sums of each array."""
    return jnp.stack([_sum(_words(array)) for array in arrays])


def _sum(words: jax.Array) -> jax.Array:
    """[2] uint32 of an array of uint32 words of any shape."""
    first = second = jnp.zeros((), jnp.uint32)
    for axis in range(words.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        first += index * np.uint32(_mixed_int(2 * axis + 1) | 1)
        second += index * np.uint32(_mixed_int(2 * axis + 2) | 1)
    mixed = _mixed(words ^ first)
    again = _mixed(mixed ^ second)
    return jnp.stack([mixed.sum(dtype=jnp.uint32), again.sum(dtype=jnp.uint32)])


def _words(array: jax.Array) -> jax.Array:
    """The bits of each element as uint32; an element of eight bytes becomes a last axis of two."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(array.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)


def _mixed(x: jax.Array) -> jax.Array:
    """The finalizer of MurmurHash3 (Appleby 2011), element by element on uint32."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _mixed_int(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD_BITS
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD_BITS
    return x ^ (x >> 16)
