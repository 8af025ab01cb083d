"""Ranges of config fields: what is refused, and the one form of the sentence."""

import math

import pytest

from tw_jax.bounds import counted, require, require_text, shown
from tw_jax.config import configurable


@configurable
class Sampler:
    """Draws."""

    rows: int = 1
    top_p: float = 1.0
    count: int | None = None
    path: str = "a"
    stops: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("field", "value", "limits", "told"),
    [
        ("rows", 0, {"least": 1}, "must be at least 1."),
        ("rows", 2**31, {"least": 1}, "must be at least 1 and at most 2147483647."),
        ("rows", -1, {"least": 0, "most": 9}, "must be at least 0 and at most 9."),
        ("top_p", 0.0, {"above": 0, "most": 1}, "must be above 0 and at most 1."),
        ("top_p", 1.0, {"least": 0, "below": 1}, "must be at least 0 and below 1."),
        ("top_p", 1e-39, {"above": 0}, "must be at least 1.1754943508222875e-38, because smaller"),
        ("count", 0, {"least": 1}, "must be at least 1."),
    ],
)
def test_a_number_out_of_range_is_refused_with_field_value_and_range(field, value, limits, told):
    with pytest.raises(ValueError, match="must be") as caught:
        require(Sampler(**{field: value}), field, **limits)
    assert str(caught.value).startswith(f"Sampler.{field} = {value!r} {told}")


def test_numbers_on_the_border_and_none_pass():
    smallest = math.ldexp(1, -126)
    for cfg, field, inside, outside in (
        (Sampler(rows=2**31 - 1), "rows", {"least": 1}, {"least": 2**31, "most": 2**40}),
        (Sampler(top_p=smallest), "top_p", {"above": 0, "most": 1}, {"above": smallest}),
        (Sampler(rows=2**40), "rows", {"most": 2**40}, {"most": 2**40 - 1}),
        (Sampler(rows=2**40), "rows", {"below": 2**40 + 1}, {"below": 2**40}),
    ):
        require(cfg, field, **inside)
        with pytest.raises(ValueError, match=f"{field} = .* must be"):
            require(cfg, field, **outside)
    assert Sampler().count is None
    require(Sampler(), "count", least=1)


@pytest.mark.parametrize(
    ("field", "value"), [("path", ""), ("path", " \n"), ("path", "a\0"), ("stops", ("a", ""))]
)
def test_blank_text_and_null_characters_are_refused(field, value):
    with pytest.raises(ValueError, match=rf"^Sampler\.{field} = .* must not be empty or blank"):
        require_text(Sampler(**{field: value}), field)
    require_text(Sampler(), "path", "stops", "count")


@pytest.mark.parametrize(
    ("number", "noun", "text"),
    [(1, "step", "1 step"), (0, "step", "0 steps"), (2, "process", "2 processes")],
)
def test_counts_are_written_in_english(number, noun, text):
    assert counted(number, noun) == text


def test_a_long_value_is_shown_in_part():
    assert shown("a" * 1000) == f"'{'a' * 119}..."
    assert shown(16**9000) == "a number of thousands of digits"
