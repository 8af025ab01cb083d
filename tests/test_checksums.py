"""A checksum sees every change of an array, and nothing of how the array is split."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tw_jax.checksums import checksums

WORD = 0xFFFFFFFF


def mixed(x: int) -> int:
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & WORD
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & WORD
    return x ^ (x >> 16)


def by_hand(array: np.ndarray) -> str:
    """The formula of the docstring, one element at a time in Python's integers."""
    size = array.dtype.itemsize
    words = array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[size])
    first = second = 0
    for index, word in np.ndenumerate(words):
        p = sum(i * (mixed(2 * axis + 1) | 1) for axis, i in enumerate(index)) & WORD
        q = sum(i * (mixed(2 * axis + 2) | 1) for axis, i in enumerate(index)) & WORD
        v = mixed(int(word) ^ p)
        first, second = first + v, second + mixed(v ^ q)
    return f"{first & WORD:08x}{second & WORD:08x}"


def examples() -> dict[str, jax.Array]:
    normal = jax.random.normal(jax.random.key(0), (8, 3, 8))
    return {
        "float32": normal,
        "bfloat16": normal.astype(jnp.bfloat16),
        # Not converted by XLA, which cannot do it on processors without F16C.
        "float16": jnp.asarray(np.asarray(normal[0]).astype(np.float16)),
        "bool": normal[:, 0] > 0,
        "int8": (normal[..., 0] * 50).astype(jnp.int8),
        "int32": (normal[..., 0] * 1e8).astype(jnp.int32),
        "scalar": jnp.float32(-0.0),
        "empty": jnp.zeros((0, 3)),
    }


@pytest.fixture(scope="module")
def sums():
    return dict(zip(examples(), checksums(list(examples().values())), strict=True))


def test_a_checksum_is_the_sum_of_mixed_words(sums):
    assert sums == {name: by_hand(np.asarray(x)) for name, x in examples().items()}
    assert sums["empty"] == "0" * 16


def test_a_checksum_is_the_same_on_every_mesh(sums):
    devices = np.array(jax.devices()[:8])
    line = NamedSharding(jax.sharding.Mesh(devices, ("d",)), P("d"))
    square = NamedSharding(jax.sharding.Mesh(devices.reshape(2, 4), ("x", "y")), P("y", None, "x"))
    x, y = examples()["float32"], examples()["bfloat16"]
    for place in (line, square):
        # Arrays of another mesh, and of one device, may stand in the same tree.
        found = checksums([jax.device_put(x, place), y, jax.device_put(y, place)])
        assert found == [sums["float32"], sums["bfloat16"], sums["bfloat16"]]


def test_typed_keys_count_by_the_integers_they_are_made_of():
    keys = jax.random.split(jax.random.key(3), 4)
    assert checksums([keys]) == checksums([jax.random.key_data(keys)])


def test_every_changed_bit_changes_the_checksum_and_so_do_swaps_and_signs():
    x = np.array(jax.random.normal(jax.random.key(1), (4, 2)))
    changed = [x, -x, x[::-1].copy(), x.T.reshape(4, 2).copy(), np.zeros_like(x)]
    for bit in range(32):
        flipped = x.copy()
        flipped.view(np.uint32)[2, 1] ^= np.uint32(1 << bit)
        changed.append(flipped)
    signs = x.copy()
    signs[[0, 3], [1, 0]] *= -1  # two top bits cancel in a plain sum modulo 2^32
    changed.append(signs)
    found = [checksums([jnp.asarray(one)])[0] for one in changed]
    assert len(set(found)) == len(found)
    assert found == [by_hand(one) for one in changed]
