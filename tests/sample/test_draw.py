"""Drawing: the distribution that is reported is the one that was sampled from."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tw_jax import sharding
from tw_jax.sample import draw

ROWS, LANES, VOCABULARY = 3, 2, 7


def logits(seed=0):
    shape = (ROWS, LANES, VOCABULARY)
    return jax.random.normal(jax.random.key(seed), shape) * 2


def distribution(row, temperature, top_p, top_k):
    """Log-probs by hand: sort, cut, renormalise."""
    scaled = np.asarray(row, np.float64) / temperature
    order = np.argsort(-scaled)
    kept = order[: top_k or len(order)]
    mass = np.exp(scaled[kept] - scaled.max())
    mass /= mass.sum()
    kept = kept[: int((np.cumsum(mass) - mass < top_p).sum())]
    out = np.full(len(scaled), -np.inf)
    z = np.exp(scaled[kept]).sum()
    out[kept] = scaled[kept] - np.log(z)
    return out


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.5, 0.8, 0), (1.7, 1.0, 3), (1.0, 0.6, 4)]
)
def test_reported_log_probs_are_those_of_the_cut_and_renormalised_distribution(
    temperature, top_p, top_k, close
):
    values = logits()
    sampling = draw.sampling_arrays(ROWS, temperature=temperature, top_p=top_p, top_k=top_k, seed=5)
    for position in range(40):
        where = jnp.full((ROWS, LANES), position)
        tokens, logp = jax.jit(draw.draw)(values, sampling, jnp.zeros_like(where), where)
        for b in range(ROWS):
            for c in range(LANES):
                want = distribution(values[b, c], temperature, top_p, top_k)
                assert np.isfinite(want[tokens[b, c]])
                close("module", logp[b, c], want[tokens[b, c]], of=1.0)


def test_frequencies_follow_the_distribution():
    count = 20_000
    values = jnp.broadcast_to(logits()[:1, :1], (1, count, VOCABULARY))
    sampling = draw.sampling_arrays(1, temperature=1.0, top_p=0.9, top_k=0, seed=1)
    where = jnp.arange(count)[None]
    tokens, _ = draw.draw(values, sampling, jnp.zeros_like(where), where)
    share = np.bincount(np.asarray(tokens[0]), minlength=VOCABULARY) / count
    want = np.exp(distribution(values[0, 0], 1.0, 0.9, 0))
    assert np.abs(share - want).max() < 4 * np.sqrt(0.25 / count)


def test_greedy_takes_the_likeliest_token_and_reports_the_model_at_temperature_one(close):
    sampling = draw.sampling_arrays(ROWS, temperature=0.0, top_p=0.5, top_k=2, seed=0)
    zeros = jnp.zeros((ROWS, LANES), jnp.int32)
    tokens, logp = draw.draw(logits(), sampling, zeros, zeros)
    np.testing.assert_array_equal(tokens, logits().argmax(-1))
    for b in range(ROWS):
        for c in range(LANES):
            want = distribution(logits()[b, c], 1.0, 1.0, 0)
            close("module", logp[b, c], want.max(), of=1.0)


def test_rows_with_other_settings_change_nothing_for_a_row():
    values = logits()
    zeros = jnp.zeros((ROWS, LANES), jnp.int32)
    plain = draw.sampling_arrays(ROWS, temperature=1.0, top_p=1.0, top_k=0, seed=9)
    mixed = plain.replace(top_p=jnp.array([1.0, 0.5, 1.0]), top_k=jnp.array([0, 2, 1]))
    alone, together = (draw.draw(values, sampling, zeros, zeros) for sampling in (plain, mixed))
    assert alone[0][0].tolist() == together[0][0].tolist()
    assert alone[1][0].tolist() == together[1][0].tolist()


def test_calls_and_positions_draw_independently():
    values = jnp.zeros((1, 64, 1000))
    sampling = draw.sampling_arrays(1, temperature=1.0, top_p=1.0, top_k=0, seed=0)
    index = jnp.arange(64)[None]
    by_call = draw.draw(values, sampling, index, jnp.zeros_like(index))[0][0]
    by_position = draw.draw(values, sampling, jnp.zeros_like(index), index)[0][0]
    assert len(set(by_call.tolist())) > 50
    assert by_call[1:].tolist() != by_position[1:].tolist()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"temperature": -1.0}, "temperature = -1.0 must be at least 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_k": -1}, "top_k = -1"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        draw.sampling_arrays(
            1, **({"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0} | wrong)
        )


def test_a_vocabulary_that_is_split_over_devices_is_not_gathered():
    size = 1024
    values = jax.random.normal(jax.random.key(3), (2, 2, size)) * 2
    sampling = draw.sampling_arrays(2, temperature=0.7, top_p=0.9, top_k=300, seed=5)
    mesh, rules = sharding.make_mesh(sharding.Mesh(fsdp=1, tensor=8)), sharding.Rules()
    with sharding.use(mesh, rules):
        place = jax.NamedSharding(mesh, jax.P(None, None, "tensor"))
        cut = jax.jit(draw._truncate).lower(jax.device_put(values, place), sampling).compile()
    assert f",{size}]" not in cut.as_text()
    assert f",{size // 8}]" in cut.as_text()
    want = jax.jit(draw._truncate)(values, sampling)
    np.testing.assert_array_equal(cut(jax.device_put(values, place), sampling), want)
