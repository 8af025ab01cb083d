"""No field of any config takes a number or a text that makes no sense; the file's line is named.

Every field of every config that a verb reaches is tried. The lists below hold the fields that do
take such a value.
"""

import dataclasses
import math
import types
import typing

import pytest
from repo.documents import inherited, root_of
from repo.sources import ROOT, VERBS, has_config

from tw_jax.config import load_config, operative
from tw_jax.fields import is_config, kinds, reachable

NEGATIVE = {
    *("Mesh.data", "Mesh.fsdp", "Mesh.sequence", "Mesh.tensor"),  # the rest of the devices
    *("Reward.correct", "Reward.incorrect"),
}
ZERO = {
    *("Data.seed", "Make.seed", "Make.held_out_seed", "Parity.greedy_tokens", "Pgrpo.seed"),
    *("Random.seed", "Sampler.seed", "Sft.seed", "Trajectories.seed", "StoredRollout.index"),
    *("Evaluate.timed", "Evaluation.temperature", "Sampler.temperature", "Sampler.top_k"),
    *("GroupLength.threshold", "GroupLength.strength", "SoftOverlong.weight"),
    *("Reward.correct", "Reward.incorrect"),
    *("Reward.acceleration_factor", "Reward.acceleration_clip"),
    *("GroupLength.epsilon", "Multiplication.min_value"),
    "Multiplication.parallel_probability",
    *("Optim.end_lr", "Optim.warmup_ratio", "Optim.warmup_steps", "Optim.weight_decay"),
    *("Optim.beta1", "Optim.beta2"),
    *("PolicyLoss.clip_low", "PolicyLoss.clip_high", "PolicyLoss.kl_coef"),
    "PolicyLoss.entropy_coef",
}
LARGE = {"Multiplication.min_value", "Multiplication.max_value"}
"""Whole numbers that do not have to fit 32 bits."""
EMPTY = {"Chat.instruction"}

BY_HAND = {"Folder": {"path": "a"}, "Lora": {"rank": 1, "alpha": 1.0}}
BY_HAND |= {"SoftOverlong": {"limit_tokens": 2, "buffer_tokens": 1}}


def classes() -> dict[str, type]:
    """Every config that a verb reaches, by name."""
    found: dict[str, type] = {}
    for verb in filter(has_config, VERBS):
        found |= reachable(root_of(verb))
    return found


@pytest.fixture(scope="module")
def instances() -> dict[str, object]:
    """One instance of each: from the runs of `configs/`, else by hand or of defaults alone."""
    found: dict[str, object] = {}

    def walk(value: object) -> None:
        if is_config(type(value)):
            found.setdefault(type(value).__name__, value)
            for field in dataclasses.fields(value):
                walk(getattr(value, field.name))

    for verb in filter(has_config, VERBS):
        for path in sorted((ROOT / "configs" / verb).glob("*.gin")):
            walk(load_config(root_of(verb), [path], inherit=inherited))
    for name, cls in classes().items():
        if name not in found:
            found[name] = cls(**BY_HAND.get(name, {}))
    return found


def fields(*wanted: type) -> list[str]:
    """All fields that take a value of these types."""
    return [
        f"{name}.{field}"
        for name, cls in classes().items()
        for field, kind in kinds(cls).items()
        if not {kind, *typing.get_args(kind)}.isdisjoint(wanted)
        and typing.get_origin(kind) in (None, typing.Union, types.UnionType)
    ]


def judged(instances: dict[str, object], path: str, text: str, tmp_path) -> str | None:
    """What is said of a file that ends with `path = text`, or None if it is taken."""
    name, _, field = path.partition(".")
    lines = operative(instances[name]).splitlines()
    file = tmp_path / "run.gin"
    file.write_text("\n".join([*lines, f"{path} = {text}"]), encoding="utf-8")
    try:
        made = load_config(type(instances[name]), [file])
    except ValueError as error:
        said = str(error)
        assert said.startswith(f"{file}:{len(lines) + 1}: {name}."), said
        assert f".{field} = " in said, said
        assert said.endswith(".")
        assert len(said) < 500
        return said
    assert repr(getattr(made, field)) in (text, f"{text}.0")
    return None


@pytest.mark.parametrize("path", fields(int, float))
def test_a_number_that_makes_no_sense_is_refused_at_its_line(path, instances, tmp_path):
    is_whole = path in fields(int)
    for text, takes in (
        ("-1", NEGATIVE),
        ("-2", NEGATIVE - {f"Mesh.{axis}" for axis in ("data", "fsdp", "sequence", "tensor")}),
        ("0", ZERO),
        ("2147483648", LARGE if is_whole else None),
        ("1" + "0" * 400, ()),
        ("1e999", ()),
        ("-1e999", ()),
        ("1e308", ()),
    ):
        if takes is None or (is_whole and "e" in text):
            continue
        is_taken = judged(instances, path, text, tmp_path) is None
        if path in takes:
            assert is_taken or text != "0", f"{path} = {text}"
        else:
            assert not is_taken, f"{path} = {text}"


@pytest.mark.parametrize("path", fields(float))
def test_nan_and_infinities_are_refused_of_every_float(path, instances):
    name, _, field = path.partition(".")
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"^{path} = {value} must be a finite number"):
            dataclasses.replace(typing.cast(typing.Any, instances[name]), **{field: value})


@pytest.mark.parametrize("path", sorted(set(fields(str)) - EMPTY))
@pytest.mark.parametrize("text", ["''", "' '", "'a\\x00'"])
def test_a_blank_text_is_refused_at_its_line(path, text, instances, tmp_path):
    assert judged(instances, path, text, tmp_path)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("Sample", ["Sampler.temperature = 0.0", "Sample.samples = 2"]),
        ("Evaluate", ["Sampler.temperature = 0.0", "Sample.samples = 2"]),
        ("Evaluation", ["Evaluation.temperature = 0.0", "Evaluation.samples = 2"]),
    ],
)
def test_several_samples_at_temperature_0_are_refused_at_their_line(
    name, lines, instances, tmp_path
):
    file = tmp_path / "run.gin"
    base = operative(instances[name]).splitlines()
    file.write_text("\n".join([*base, *lines]), encoding="utf-8")
    with pytest.raises(ValueError, match="samples = 2 at ") as caught:
        load_config(type(instances[name]), [file])
    assert str(caught.value).startswith(f"{file}:{len(base) + 2}: ")


def test_a_temperature_too_low_for_float32_is_refused(instances, tmp_path):
    for path in ("Sampler.temperature", "Evaluation.temperature"):
        said = judged(instances, path, "1e-30", tmp_path)
        assert said is not None
        assert "too low for float32" in said


def test_an_axis_that_would_split_a_dimension_twice_is_refused(instances, tmp_path):
    said = judged(instances, "Rules.rows", "('data', 'data')", tmp_path)
    assert said is not None
    assert "must name each axis once" in said
