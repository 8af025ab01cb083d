"""Checksums of arrays, and the records of a state's arrays that a checkpoint stores.

Checksums are computed on the devices, and are equal on every mesh and in every process. Each
element is mixed with its position, and the results are added modulo 2^32. Integer addition is exact
in any order, so the sum does not depend on how an array is split over devices. Each device sums its
own shards; no array is gathered or copied to the host.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
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


def array_records(state: Any) -> dict[str, str]:
    """Shape, dtype and checksum of each array of a state, by its path."""
    sums = checksums(jax.tree.leaves(state))
    return {
        path: f"{array_type} {checksum}"
        for (path, array_type), checksum in zip(array_types(state).items(), sums, strict=True)
    }


def types_of_records(records: Mapping[str, str]) -> dict[str, str]:
    """Shape and dtype of each array, from its record."""
    return {path: record.rpartition(" ")[0] for path, record in records.items()}


def array_types(tree: Any) -> dict[str, str]:
    """Shape and dtype of each leaf by its path, through dicts, tuples and dataclasses."""
    types = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        written = _stored_form(leaf)
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        types[name] = f"{list(written.shape)} {written.dtype}"
    return types


def num_bytes(tree: Any) -> int:
    """The size of all leaves as they are stored."""
    leaves = map(_stored_form, jax.tree.leaves(tree))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)


def _stored_form(leaf: Any) -> Any:
    """The shape and dtype in which a leaf is stored: a typed key is stored as its integers."""
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return jax.eval_shape(jax.random.key_data, leaf) if is_key else leaf


def json_digest(content: Mapping[str, Any]) -> str:
    """The sha256 of a JSON object, in hex. The order of its keys does not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


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
