"""Rotary frequencies against transformers' own, and rotations against complex multiplication."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax.models.rope import Llama3Rope, Rope, YarnRope, frequencies, rotate, rotation


def turned(rng: np.random.Generator, rope, shape: tuple[int, ...], depth: np.ndarray):
    x = rng.normal(size=shape).astype(np.float32)
    return x, np.asarray(rotate(jnp.asarray(x), rotation(rope, shape[-1], jnp.asarray(depth))))


def test_a_pair_turns_by_its_frequency_times_its_depth(close) -> None:
    rng = np.random.default_rng(0)
    depth = rng.integers(0, 100, (2, 5)).astype(np.int32)
    x, got = turned(rng, Rope(theta=10_000.0), (2, 3, 5, 8), depth)
    pairs = x[..., :4] + 1j * x[..., 4:]
    angle = depth[:, None, :, None] * 10_000.0 ** (-np.arange(4) / 4)
    want = pairs * np.exp(1j * angle)
    close("module", got[..., :4], want.real)
    close("module", got[..., 4:], want.imag)


def test_scores_depend_on_the_distance_of_depths_alone(close) -> None:
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def score(at: int, of: int) -> float:
        left, right = (
            rotate(jnp.asarray(x), rotation(Rope(), 16, jnp.full((1, 1), depth, jnp.int32)))
            for x, depth in ((q, at), (k, of))
        )
        return float(jnp.vdot(left, right))

    close("module", score(40, 33), score(7, 0), of=np.linalg.norm(q) * np.linalg.norm(k))
    assert score(40, 33) != pytest.approx(score(8, 0), abs=1e-2)


def test_angles_are_float32_whatever_the_heads_are() -> None:
    depth = jnp.array([[40_000, 40_001]], jnp.int32)
    cos, sin = rotation(Rope(), 8, depth)
    assert cos.dtype == sin.dtype == jnp.float32
    heads = jnp.ones((1, 1, 2, 8), jnp.bfloat16)
    got = rotate(heads, (cos, sin))
    assert got.dtype == jnp.bfloat16
    # In bfloat16 both depths would round to one angle.
    assert not jnp.array_equal(got[:, :, 0], got[:, :, 1])


def test_the_defaults_are_those_of_the_papers_models(close) -> None:
    assert frequencies(Rope(theta=4.0), 4)[0].tolist() == [1.0, 0.5]
    yarn, sharpen = frequencies(YarnRope(factor=4.0), 128)
    plain, _ = frequencies(Rope(theta=1_000_000.0), 128)
    assert sharpen == pytest.approx(0.1 * np.log(4) + 1)
    np.testing.assert_array_equal(yarn[:20], plain[:20])
    close("rounding", yarn[-10:], plain[-10:] / 4, of=plain[-10:] / 4)


@pytest.mark.torch
@pytest.mark.parametrize("head_width", [16, 64, 128])
@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (
            Llama3Rope(factor=32.0),
            {
                "rope_type": "llama3",
                "rope_theta": 500_000.0,
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            YarnRope(),
            {
                "rope_type": "yarn",
                "rope_theta": 1_000_000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32_768,
            },
        ),
        (
            YarnRope(
                theta=10_000.0,
                factor=16.0,
                original_tokens=4096,
                beta_fast=20.0,
                beta_slow=2.0,
                attention_factor=0.7,
            ),
            {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 4096,
                "beta_fast": 20.0,
                "beta_slow": 2.0,
                "attention_factor": 0.7,
            },
        ),
    ],
    ids=["llama3", "yarn", "yarn_all_fields"],
)
def test_frequencies_are_those_of_transformers(rope, parameters, head_width, close) -> None:
    modeling = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    original = parameters["original_max_position_embeddings"]
    cfg = transformers.LlamaConfig(
        hidden_size=2 * head_width,
        num_attention_heads=2,
        head_dim=head_width,
        max_position_embeddings=int(original * parameters["factor"]),
        rope_parameters=parameters,
    )
    want, sharpen = modeling.ROPE_INIT_FUNCTIONS[parameters["rope_type"]](cfg)
    got, got_sharpen = frequencies(rope, head_width)
    assert got.dtype == np.float32
    close("rounding", got, want.numpy(), of=want.numpy())
    assert got_sharpen == pytest.approx(sharpen)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Rope(theta=1.0), "Rope.theta = 1.0 must be above 1"),
        (lambda: YarnRope(factor=0.5), "YarnRope.factor = 0.5 must be at least 1"),
        (lambda: YarnRope(beta_slow=40.0), "YarnRope.beta_slow = 40.0 must be below"),
        (lambda: Llama3Rope(low_freq_factor=4.0), "Llama3Rope.low_freq_factor = 4.0 must be below"),
    ],
)
def test_impossible_scalings_are_refused(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_rotation_works_under_jit_and_keeps_gradients_finite() -> None:
    def f(x: jax.Array) -> jax.Array:
        return rotate(x, rotation(Llama3Rope(), 8, jnp.arange(4, dtype=jnp.int32)[None])).sum()

    assert jnp.isfinite(jax.jit(jax.grad(f))(jnp.ones((1, 2, 4, 8)))).all()
