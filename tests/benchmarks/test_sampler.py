"""The benchmark of the sampler decodes the same tokens in every way."""

import fakes
import numpy as np
import pytest

from tw_jax.benchmarks import sampler
from tw_jax.data import workloads


def test_every_way_of_decoding_draws_the_same_number_of_tokens(run, monkeypatch):
    network = fakes.path_network
    monkeypatch.setattr(
        sampler, "network", lambda model, num_ids: network(model.vocab_size, num_ids=num_ids)
    )
    drawn, finish = {}, sampler.Decode.finish

    def recorded(self, params, state):
        before = np.asarray(state.log.length)
        state = finish(self, params, state)
        drawn[self.sampler.sizes.rows, self.sampler.sizes.lanes] = (
            np.asarray(state.log.length) - before
        ).tolist()
        return state

    monkeypatch.setattr(sampler.Decode, "finish", recorded)
    _, found = run("sampler")
    case = workloads.TINY_SAMPLER
    assert drawn == {
        (1, 4): [4 * case.tokens],
        (4, 1): [case.tokens] * 4,
        (1, 1): [4 * case.tokens],
    }
    ms = {name: times["median_ms"] for name, times in found["times"].items()}
    over_rows = ms["rows4_64"] / ms["lanes4_64"]
    assert found["lanes4_over_rows_64"] == pytest.approx(over_rows)
    assert found["lanes4_over_sequential"] == pytest.approx(ms["sequential_64"] / ms["lanes4_64"])
    assert found["recompiles"] == 0
    # Four lanes of six tokens behind one prefix of 64, or behind four of them.
    assert found["ideal_over_sequential"] == 4
    assert found["ideal_over_rows_64"] == pytest.approx(4 * (64 + 6) / (64 + 4 * 6))
    assert found["rho_64"] == pytest.approx(1 - (64 + 4 * 6) / (4 * (64 + 6)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["step", "rows", "sampler"])
def test_a_benchmark_runs_on_the_decoder(run, name, close):
    _, found = run(name)
    assert found.get("recompiles", 0) == 0
    close.error("equality_gradient", found.get("grad_rel_l2", 0))
    assert min(times["fastest_ms"] for times in found["times"].values()) > 0
