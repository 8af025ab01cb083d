r"""Answers: where the box stands, and equality that no float can blur."""

import contextlib
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.tasks.answers import (
    as_fraction,
    as_integer,
    exactly_equal,
    final_answer,
    last_boxed,
    symbolically_equal,
)


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} then \boxed{ 2 }.", "2"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\frac{1}{2}} and {}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed 5", None),
        (r"\boxed", None),
        (r"\fbox{5}", None),
        ("no box", None),
        ("\\boxed{5\\", None),
    ],
)
def test_the_last_box_counts_and_its_braces_balance(text, box):
    assert last_boxed(text) == box


def test_an_answer_after_thinking_stands_between_the_first_two_ends_of_thought():
    boxed = r"<think>\boxed{1}</think>\boxed{2}</think>\boxed{3}"
    assert final_answer(boxed, where="after_thinking") == "2"
    assert final_answer(boxed.replace("think", "Think"), where="after_thinking") == "2"
    assert final_answer(boxed, where="anywhere") == "3"


def test_item_34_a_box_in_an_unfinished_thought_counts_only_anywhere():
    for unfinished in (r"<think>\boxed{1}", r"<Thread>\boxed{1}", r"\boxed{1}</think>"):
        assert final_answer(unfinished, where="after_thinking") is None
        assert final_answer(unfinished, where="anywhere") == "1"


def test_an_empty_box_is_no_answer():
    assert final_answer(r"</think>\boxed{ }", where="after_thinking") is None
    assert final_answer(r"\boxed{}", where="anywhere") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        (" -42 ", -42),
        ("\N{MINUS SIGN}42", -42),
        ("+7", 7),
        ("007", 7),
        ("0", 0),
        ("-0", 0),
        ("1,234,567", 1234567),
        ("1{,}234", 1234),
        (r"1,\!234", 1234),
        (r"1\,234", 1234),
        ("1 234 567", 1234567),
        ("1_000", 1000),
        ("$12$", 12),
        ("12,34", None),
        ("1,2", None),
        ("1234,567", None),
        ("1,234_567", None),
        ("1,234 567", None),
        ("12 34", None),
        ("2.0", None),
        ("--5", None),
        ("1e5", None),
        ("0x10", None),
        ("\N{ARABIC-INDIC DIGIT FIVE}", None),
        ("", None),
        ("-", None),
        ("9" * 5000, None),
    ],
)
def test_integers_are_read_where_they_are_unambiguous(text, value):
    assert as_integer(text) == value


@given(st.integers(-(10**40), 10**40), st.sampled_from(["", ",", "_", " ", "{,}", r"\,", r"\ "]))
def test_an_integer_survives_its_separators(number, mark):
    assert as_integer(f"{number:,}".replace(",", mark)) == number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3/4", Fraction(3, 4)),
        ("-3 / 4", Fraction(-3, 4)),
        ("-1/-2", Fraction(1, 2)),
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"-\dfrac{-3}{4}", Fraction(3, 4)),
        (r"\tfrac12", Fraction(1, 2)),
        (r"\frac1{2}", Fraction(1, 2)),
        (r"\frac{1,000}{3}", Fraction(1000, 3)),
        ("0.1", Fraction(1, 10)),
        ("-.5", Fraction(-1, 2)),
        ("5.", Fraction(5)),
        ("1,234.50", Fraction(2469, 2)),
        ("0.30000000000000004", Fraction(30000000000000004, 10**17)),
        ("12", Fraction(12)),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        (r"\frac{1}{}", None),
        (r"7\frac34", None),
        ("1/2/3", None),
        (".", None),
        ("1.2.3", None),
        ("50\\%", None),
        ("x", None),
        ("", None),
    ],
)
def test_fractions_are_read_exactly(text, value):
    assert as_fraction(text) == value


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("123456789012345679", "123456789012345678"),
        ("350000000000000100", "350000000000000123"),
        ("9007199254740992", "9007199254740993"),
        ("9007199254740992.0", "9007199254740993"),
        ("0.1000000000000000055", "0.1"),
        ("0.3333333333333333", r"\frac{1}{3}"),
    ],
)
def test_b1_numbers_that_a_double_confuses_are_not_equal(answer, truth):
    assert float(as_fraction(answer)) == float(as_fraction(truth))
    assert exactly_equal(answer, truth) is False
    assert exactly_equal(truth, truth) is True


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        ("1,000", "1000", True),
        ("0.5", r"\frac{1}{2}", True),
        ("2.0", "2", True),
        ("x + 1", "x+1", True),
        (r"\text{Monday}", "monday", True),
        ("act", "cat", False),
        ("1 2", "12", None),
        ("", "1", False),
        ("", "", False),
        ("x", "", False),
        ("x+1", "1+x", None),
        ("2^{3^2}", "512", None),
        ("10^{10^{10}}", "1", False),
        ("10^{10^{10}}", "10^{10^{10}}", True),
        ("9^{123456}", "9", False),
        ("99999!", "1", False),
        ("x" * 2000, "1", False),
    ],
)
def test_what_can_be_decided_without_symbols_is(answer, truth, equal):
    assert exactly_equal(answer, truth) is equal


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        ("(x+1)^2", "x^2+2x+1", True),
        ("(x+1)^2", "x^2+2x+2", False),
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"2^{53}", "9007199254740992", True),
        (r"2^{53}", "9007199254740993", False),
        (r"\{2, 1\}", r"\{1, 2\}", True),
        ("[1, 2]", "[1, 2)", False),
        (r"7\frac{3}{4}", r"\frac{31}{4}", True),
        (r"\frac{", "1", False),
    ],
)
def test_the_rest_is_compared_as_mathematics(answer, truth, equal):
    assert symbolically_equal(answer, truth) is equal


def test_nothing_a_model_wrote_is_evaluated(tmp_path):
    target = tmp_path / "written"
    for attack in (f"__import__('pathlib').Path('{target}').touch()", f"open('{target}','w')"):
        for pair in ((attack, "1"), ("1", attack)):
            with contextlib.suppress(Exception):  # a refusal is as good as a wrong answer
                symbolically_equal(*pair)
    assert not target.exists()


@pytest.mark.parametrize(
    "unit", [r"\boxed{", "{", "\\", " ", "1", "1,111", "/", r"\frac{1}", "^", "^{1"]
)
def test_hostile_answers_are_read_in_linear_time(unit):
    text = unit * (50_000 // len(unit))
    start = time.process_time()
    for response in (text, rf"</think>\boxed{{{text}}}", rf"\boxed{{{text}"):
        final_answer(response, where="after_thinking")
        final_answer(response, where="anywhere")
    exactly_equal(text, "1")
    exactly_equal(text[:1000], "1")
    assert time.process_time() - start < 1.0
