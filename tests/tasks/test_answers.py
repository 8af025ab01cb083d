r"""Answers: where the box stands, and equality that no float can blur."""

import contextlib
import json
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tw_jax.tasks import mathematics, notation
from tw_jax.tasks.answers import exactly_equal, final_answer, last_boxed
from tw_jax.tasks.notation import as_integer

GOLDEN = Path(__file__).parents[1] / "golden" / "answers.json"
BENCHMARKS = Path(__file__).parents[3] / "shared" / "benchmarks"


def is_equal(answer, truth, mode):
    """The verdict of a mode, without a worker; None where the mode does not take the truth."""
    try:
        equal = exactly_equal(answer, truth, mode)
    except ValueError:
        return None
    return mathematics.equal(answer, truth) if equal is None else equal


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
        ("7 3/4", Fraction(31, 4)),
        (r"7\frac34", Fraction(31, 4)),
        (r"-1\frac{4}{5}", Fraction(-9, 5)),
        ("1e3", Fraction(1000)),
        ("-2.5E-1", Fraction(-1, 4)),
        (r"3 \times 10^8", Fraction(300_000_000)),
        (r"1.5 \cdot 10^{-2}", Fraction(3, 200)),
        ("1e4000", Fraction(10**4000)),
        (r"50\%", Fraction(1, 2)),
        ("12.5%", Fraction(1, 8)),
        (r"5\\", Fraction(5)),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        (r"\frac{1}{}", None),
        (r"7\frac43", None),
        ("1 234/567", None),
        ("1e9999", None),
        ("1/2/3", None),
        (".", None),
        ("1.2.3", None),
        ("12 3", None),
        ("2^{10}", None),
        ("x", None),
        ("", None),
    ],
)
def test_a_number_is_read_exactly(text, value):
    number = notation.read(text)
    assert (number and number.value) == value


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
@pytest.mark.parametrize("mode", ["number", "mathematics"])
def test_b1_numbers_that_a_double_confuses_are_not_equal(answer, truth, mode):
    given, wanted = notation.read(answer), notation.read(truth)
    assert float(given.value) == float(wanted.value)
    assert exactly_equal(answer, truth, mode) is False
    assert exactly_equal(truth, truth, mode) is True


def golden(mode):
    cases = json.loads(GOLDEN.read_text(encoding="utf-8"))["cases"]
    return [(case["answer"], case["truth"], case[mode], case.get("refused")) for case in cases]


@pytest.mark.parametrize("mode", ["number", "mathematics"])
def test_no_wrong_answer_is_accepted_and_a_right_one_is_refused_only_as_documented(mode):
    """The golden verdicts were written by hand; "refused" marks a right answer that is refused."""
    false_accepts, false_refusals = [], []
    for answer, truth, want, refused in golden(mode):
        got = is_equal(answer, truth, mode)
        if got and not want:
            false_accepts.append((answer, truth))
        if want is None or got is None:
            assert want is got is None, (answer, truth)
        elif want and bool(got) == (mode in (refused or ())):
            false_refusals.append((answer, truth))
    assert not false_accepts
    assert not false_refusals


def test_the_golden_answers_are_enough():
    for mode in ("number", "mathematics"):
        wants = [want for _, _, want, _ in golden(mode)]
        assert sum(want is not None for want in wants) >= 300
        assert min(wants.count(True), wants.count(False)) >= 100


@pytest.mark.parametrize(
    ("answer", "wrong", "right"),
    [
        (r"1\left.5", "15", None),
        (r"1\displaystyle5", "15", None),
        ("0,123", "123", None),
        (r"x \cdot 2\frac12", "x", None),
        (r"(2)\frac12", "5/2", None),
        (r"2\frac12^2", r"\frac12", None),
        (r"\sin{2}x", r"x\sin 2", r"\sin{2}x"),
        (r"\sin(\frac{\pi}{2})^\circ", "1", None),
        (r"15\%^\circ", "0.15", None),
        (r"15 \text{cm}\text{cm}", "15 cm", None),
        (r"(1^\circ,2)", "(1,2)", r"(1^\circ, 2)"),
        ("x = 2x+3", "2x+3", "2x+3 = x"),
        (r"x \in 5", "5", None),
        ("ABC", "abc", "ABC"),
        ("ABC-D", "abc-d", "ABC - D"),
        ("0^0", "1", None),
        (r"|416| \cdot |607|", "252512", None),
        (r"416(607+i-i)", "252512", None),
        (r"5\pmod{7}", "5+od{7}, 5-od{7}", r"5\pmod{7}"),
    ],
)
def test_an_answer_that_only_looks_right_is_refused(answer, wrong, right):
    assert not is_equal(answer, wrong, "mathematics")
    if right is not None:
        assert is_equal(answer, right, "mathematics")


def test_answers_that_stand_in_mathematics_one_by_one_are_a_list():
    truth = r"$1$,$\frac{3+\sqrt{21}}{2}$,$\frac{3-\sqrt{21}}{2}$"
    assert is_equal(r"\frac{3 \pm \sqrt{21}}{2}, 1", truth, "mathematics")
    assert not is_equal(r"1, \frac{3+\sqrt{21}}{2}", truth, "mathematics")
    assert is_equal(r"a = -6-4\sqrt2, a = 2", r"$a=2$, $a=-6-4 \sqrt{2}$", "mathematics")


def test_a_marked_number_does_not_begin_with_zero():
    """0,123 is 0.123 to many; 0123 can be nothing else than 123."""
    for text in ("0,123", "0 123", "00,123", "0{,}123"):
        assert notation.read(text) is None
        assert as_integer(text) is None
    assert as_integer("0123") == 123


def test_what_needs_no_symbols_is_decided_without_a_worker():
    for answer, truth, equal in [
        ("x + 1", "x+1", True),
        (r"\text{Monday}", "monday", True),
        ("act", "cat", False),
        (r"\{1, 2\}", r"\{2, 1\}", True),
        ("(1, 2)", "(2, 1)", False),
        ("1 2", "12", False),
        ("416*607", "252512", False),
        ("x = 5", "5", True),
        ("", "1", False),
        ("x", "1", False),
        ("x+1", "1+x", None),
        ("10^{10^{10}}", "1", False),
        ("10^{10^{10}}", "10^{10^{10}}", True),
        ("9^{123456}", "9", False),
        ("99999!", "1", False),
        ("x" * 2000, "1", False),
    ]:
        assert exactly_equal(answer, truth, "mathematics") is equal, (answer, truth)


@given(
    st.integers(1, 10**30),
    st.sampled_from(["{}", "{}.0", "{}e0", r"{} \times 10^0", r"\frac{{{}}}{{1}}", "${}$"]),
    st.integers(-3, 3),
)
def test_a_written_number_is_right_only_if_it_is_the_same(number, how, off):
    written = how.format(number + off)
    for mode in ("number", "mathematics"):
        assert exactly_equal(written, str(number), mode) is (off == 0)


@pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the public problem sets")
def test_every_truth_of_the_problem_sets_is_equal_to_itself():
    truths = []
    for name in ("math500.jsonl", "aime24.jsonl", "amc23.jsonl", "olympiadbench.jsonl"):
        for line in (BENCHMARKS / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            answer = row["answer"] if "answer" in row else row["final_answer"]
            truths += answer if isinstance(answer, list) else [str(answer)]
    assert len(truths) > 1000
    assert [t for t in truths if exactly_equal(t, t, "mathematics") is not True] == []


def test_nothing_a_model_wrote_is_evaluated(tmp_path):
    target = tmp_path / "written"
    for attack in (f"__import__('pathlib').Path('{target}').touch()", f"open('{target}','w')"):
        for pair in ((attack, "1"), ("1", attack)):
            with contextlib.suppress(Exception):  # a refusal is as good as a wrong answer
                mathematics.equal(*pair)
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
    for mode in ("number", "mathematics"):
        exactly_equal(text, "1", mode)
        exactly_equal(text[:1000], "1", mode)
    assert time.process_time() - start < 1.0
