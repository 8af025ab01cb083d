"""Rotary position embedding: plain, with Llama-3 scaling, and YaRN; float32 throughout.

The config determines the frequencies, and the depth of a token in its trie is its position. The
rotation pairs entry i of a head with entry i + H/2, as Hugging Face's checkpoints do.
"""

from __future__ import annotations

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np

from tw_jax.bounds import require
from tw_jax.config import configurable


@configurable
class Rope:
    """Plain rotary embedding. Source: RoFormer (arXiv:2104.09864).

    Attributes:
      theta: Base of the wavelengths; pair i rotates by theta^(-2i/H) radians per token.
    """

    theta: float = 10_000.0

    def check(self) -> None:
        """Raises ValueError for a base of at most 1."""
        _check_base(self)


@configurable
class Llama3Rope:
    """Llama 3.1's scaling: long wavelengths are stretched, short ones kept, others interpolated.

    Source: transformers, `_compute_llama3_parameters`; Llama 3 report (arXiv:2407.21783).

    Attributes:
      theta: Base of the wavelengths.
      factor: Factor by which wavelengths above original_tokens / low_freq_factor are stretched.
      low_freq_factor: A pair with fewer rotations within original_tokens is fully stretched.
      high_freq_factor: A pair with more rotations within original_tokens is not changed.
      original_tokens: Context length before the stretch.
    """

    theta: float = 500_000.0
    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_tokens: int = 8192

    def check(self) -> None:
        """Raises ValueError for an empty band between the two factors."""
        _check_base(self)
        require(self, "low_freq_factor", "high_freq_factor", above=0)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"Llama3Rope.low_freq_factor = {self.low_freq_factor} must be below "
                f"Llama3Rope.high_freq_factor = {self.high_freq_factor}."
            )


@configurable
class YarnRope:
    """YaRN: low frequencies are interpolated, high ones kept, and attention is sharpened.

    Source: YaRN (arXiv:2309.00071), section 3; transformers, `_compute_yarn_parameters`.

    Attributes:
      theta: Base of the wavelengths.
      factor: Factor by which the context is extended.
      original_tokens: Context length before the extension.
      beta_fast: A pair with at least this many rotations within original_tokens is not changed.
      beta_slow: A pair with at most this many rotations within original_tokens is fully
        interpolated.
      attention_factor: Factor of cosines and sines; None is 0.1 ln(factor) + 1.
    """

    theta: float = 1_000_000.0
    factor: float = 4.0
    original_tokens: int = 32_768
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def check(self) -> None:
        """Raises ValueError for an empty band between the two betas."""
        _check_base(self)
        require(self, "beta_fast", "beta_slow", "attention_factor", above=0)
        if not self.beta_slow < self.beta_fast:
            raise ValueError(
                f"YarnRope.beta_slow = {self.beta_slow} must be below "
                f"YarnRope.beta_fast = {self.beta_fast}."
            )


def _check_base(rope: Rope | Llama3Rope | YarnRope) -> None:
    name = type(rope).__name__
    if rope.theta <= 1:
        raise ValueError(f"{name}.theta = {rope.theta} must be above 1, for example 10000.")
    if isinstance(rope, Rope):
        return
    require(rope, "factor", "original_tokens", least=1)


def frequencies(
    rope: Rope | Llama3Rope | YarnRope, head_width: int
) -> tuple[np.ndarray, np.float32]:
    """The angle by which each pair rotates from one token to the next.

    Args:
      rope: The kind of scaling.
      head_width: H, even.

    Returns:
      [H / 2] float32, radians per token; and the factor of cosines and sines (1 except for YaRN).
    """
    # Computed in float32, as in the code that the checkpoints were trained with. At depth 40000 the
    # rounding of a frequency is visible in the angle, so both must round in the same way.
    exponent = np.arange(0, head_width, 2, dtype=np.float32) / np.float32(head_width)
    plain = np.float32(1) / np.float32(rope.theta) ** exponent
    match rope:
        case Llama3Rope():
            return _stretch_llama3(rope, plain), np.float32(1)
        case YarnRope():
            sharpen = rope.attention_factor
            if sharpen is None:
                sharpen = 0.1 * math.log(rope.factor) + 1
            return _stretch_yarn(rope, plain, head_width), np.float32(sharpen)
        case _:
            return plain, np.float32(1)


def _stretch_llama3(rope: Llama3Rope, plain: np.ndarray) -> np.ndarray:
    turns = rope.original_tokens * plain / np.float32(2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _blend(plain, rope.factor, kept)


def _stretch_yarn(rope: YarnRope, plain: np.ndarray, head_width: int) -> np.ndarray:
    def pair_with(turns: float) -> float:
        ratio = rope.original_tokens / (2 * math.pi * turns)
        return head_width * math.log(ratio) / (2 * math.log(rope.theta))

    first = max(math.floor(pair_with(rope.beta_fast)), 0)
    last = min(math.ceil(pair_with(rope.beta_slow)), head_width - 1)
    ramp = (np.arange(head_width // 2, dtype=np.float32) - first) / max(last - first, 1e-3)
    return _blend(plain, rope.factor, 1 - ramp)


def _blend(plain: np.ndarray, factor: float, kept: np.ndarray) -> np.ndarray:
    """Frequencies between plain / factor (kept <= 0) and plain (kept >= 1)."""
    kept = np.clip(kept, 0, 1).astype(np.float32)
    return plain * kept + plain / np.float32(factor) * (1 - kept)


def rotation(
    rope: Rope | Llama3Rope | YarnRope, head_width: int, depth: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of the angles at each depth.

    Args:
      rope: The kind of scaling.
      head_width: H, even.
      depth: [B, T] int32 positions, 0 at a root.

    Returns:
      Two arrays [B, T, H / 2] float32.
    """
    turn, sharpen = frequencies(rope, head_width)
    angle = depth[..., None].astype(jnp.float32) * turn
    return jnp.cos(angle) * sharpen, jnp.sin(angle) * sharpen


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates each pair (x[i], x[i + H/2]) by its angle.

    Args:
      x: [B, N, T, H], queries or keys of any float dtype.
      cos_sin: cosines and sines, each [B, T, H / 2] float32, from `rotation`.

    Returns:
      [B, N, T, H] in the dtype of `x`; computed in float32.
    """
    chex.assert_rank(x, 4)
    cos, sin = (part[:, None] for part in cos_sin)
    left, right = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
    return rotated.astype(x.dtype)
