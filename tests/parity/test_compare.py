"""Errors are what their names say, and the first stage out of tolerance is named."""

import json
import math

import numpy as np
import pytest

from tw_jax.parity import compare


def side(**changes):
    """All stages that are compared, in order."""
    rng = np.random.default_rng(0)

    def array(*shape):
        return rng.standard_normal(shape)

    stages = {
        "rope": array(4),
        "weights": {"a": array(3, 3), "b": array(3)},
        "embed": array(2, 3),
        "block.0": array(2, 3),
        "block.1": array(2, 3),
        "norm": array(2, 3),
        "logits": array(2, 5),
        "logp": array(2),
        "loss": 1.5,
        "flat_loss": 1.25,
        "gradients": {"a": array(3, 3), "b": array(3)},
        "step": {"a": array(3, 3), "b": array(3)},
        "curve": array(6),
    }
    return stages | changes


def test_errors_are_the_largest_the_relative_and_the_norm():
    found = compare.error(np.array([3.0, 4.0]), np.array([0.0, 5.0]))
    assert found == (3.0, 0.6, pytest.approx(math.sqrt(10) / 5))


def test_no_difference_from_zero_is_none_and_any_is_infinite():
    zero = np.zeros(2)
    assert compare.error(zero, zero) == (0, 0, 0)
    assert compare.error(zero + 1, zero) == (1, math.inf, math.inf)


def test_what_is_not_finite_is_infinitely_far_even_on_both_sides():
    bad = np.array([1.0, np.nan])
    assert compare.error(bad, bad).absolute == math.inf
    assert compare.error(np.ones(2), np.array([1.0, np.inf])).l2 == math.inf


def test_arrays_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\) must be equal"):
        compare.error(np.zeros(2), np.zeros(3))


def test_kl_is_that_of_the_distributions_whatever_is_added_to_the_logits():
    p, q = np.array([0.5, 0.25, 0.25]), np.array([0.25, 0.25, 0.5])
    want = (p * np.log(p / q)).sum()
    same = np.log(p)
    found = compare.kl(np.stack([np.log(q) + 7, same - 3]), np.stack([np.log(p) + 40, same]))
    assert found == pytest.approx(want / 2)


def test_bands_count_ratios_of_probabilities():
    ratios = np.array([1.0, 1.0009, 0.995, 1.04, 0.5])
    assert compare.bands(np.log(ratios), np.zeros(5)) == {"0.1%": 0.4, "1.0%": 0.6, "5.0%": 0.8}


def test_equal_sides_leave_no_tolerance():
    for dtype in compare.TOLERANCES:
        assert compare.report(side(), side(), dtype).first is None


@pytest.mark.parametrize("name", ["rope", "embed", "block.1", "norm", "logits", "curve"])
def test_the_first_stage_that_differs_is_named_though_later_ones_do_too(name):
    ours = side()
    late = False
    for stage, value in ours.items():
        late = late or stage == name
        if late and isinstance(value, np.ndarray):
            ours[stage] = value + 1
    assert compare.report(ours, side(), "bfloat16").first == name


@pytest.mark.parametrize("name", ["weights", "gradients", "step"])
def test_a_parameter_is_named_with_its_stage(name):
    ours = side()
    ours[name] = {"a": ours[name]["a"].T, "b": ours[name]["b"]}
    assert compare.report(ours, side(), "float32").first == f"{name}: a"


def test_a_difference_within_the_tolerance_is_reported_and_not_named():
    moved = side()["curve"] + 5e-4
    found = compare.report(side(curve=moved), side(), "float32")
    assert found.first is None
    assert found.worst("curve", "absolute") == pytest.approx(5e-4)
    assert found.worst("absent", "absolute") is None


def test_sides_with_other_stages_or_parameters_are_refused():
    less = side()
    del less["curve"]
    with pytest.raises(ValueError, match="different stages: curve on one side"):
        compare.report(less, side(), "float32")
    with pytest.raises(ValueError, match="different parameters of step: b on one side"):
        compare.report(side(step={"a": side()["step"]["a"]}), side(), "float32")


def test_the_table_and_the_json_show_every_stage():
    ours = side()
    ours["norm"] = ours["norm"] * math.inf
    found = compare.report(ours, side(), "float32")
    lines = found.table().splitlines()
    assert [line.split()[0] for line in lines[2:]] == list(side())
    assert ["OUT" in line for line in lines[2:]] == [name == "norm" for name in side()]
    stages = json.loads(json.dumps(found.json(), allow_nan=False))["stages"]
    assert [stage["name"] for stage in stages if not stage["is_within"]] == ["norm"]


def test_every_stage_has_a_tolerance_in_every_dtype_and_a_meaning():
    for tolerances in compare.TOLERANCES.values():
        assert list(tolerances) == list(compare.MEANING)
