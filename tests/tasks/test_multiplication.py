"""Multiplication: texts are true line by line, answers exact, streams reproducible."""

import math
import re

import numpy as np
import pytest

from tw_jax.forkjoin import grammar
from tw_jax.tasks.multiplication import (
    Multiplication,
    Product,
    add,
    multiply,
    multiply_by_digit,
)
from tw_jax.tasks.task import Problem

_STEP = re.compile(r"(\d+(?:[*+]\d+)+)=(\d+)")
_LINE = re.compile(r"(\d+) ([*+]) (\d+): (.*) -> (\d+)")
_PRODUCT = re.compile(r"(\d+) \* (\d+) = (\d+)")


def _value(expression: str) -> int:
    return sum(math.prod(map(int, term.split("*"))) for term in expression.split("+"))


def _assert_true_everywhere(text: str) -> int:
    """Checks each equation of a text with Python's integers; returns how many there were."""
    count = 0
    for left, right in _STEP.findall(text):
        assert _value(left) == int(right), f"{left}={right}"
        count += 1
    for a, operator, b, steps, result in _LINE.findall(text):
        true = int(a) * int(b) if operator == "*" else int(a) + int(b)
        assert true == int(result), f"{a} {operator} {b} -> {result}"
        values = [int(value) for left, value in _STEP.findall(steps) if "+" in left]
        digits = str(values[-1]) + "".join(str(value % 10) for value in reversed(values[:-1]))
        assert result.rstrip("0") == digits.strip("0"), "the result is not what its steps say"
        count += 1
    for a, b, result in _PRODUCT.findall(text):
        assert int(a) * int(b) == int(result)
        count += 1
    return count


def _pools(text: str) -> list[list[int]]:
    return [
        [int(n) for n in line.split(", ")] for line in re.findall(r"^Pool: (.*)\.$", text, re.M)
    ]


def factors_of(problem):
    return problem.extra["factors"]


def grade(text, answer):
    verdict = CONFIGS[0].grade(Problem("p", "", answer), text)
    assert CONFIGS[0].grade_at_once(Problem("p", "", answer), text) == verdict
    return verdict == "correct"


CONFIGS = [
    Multiplication(parallel=parallel, lone_pair=lone_pair, parallel_probability=probability)
    for parallel in (False, True)
    for lone_pair in ("prose", "fork")
    for probability in (0.5, 1.0)
]


@pytest.mark.parametrize("cfg", CONFIGS)
def test_every_equation_of_the_working_is_true(cfg):
    for item in cfg.problems(seed=11, count=60):
        assert _assert_true_everywhere(cfg.gold(item)) > 5 or 0 in factors_of(item)


@pytest.mark.parametrize("cfg", CONFIGS)
def test_every_pool_keeps_the_product_and_the_last_is_the_answer(cfg):
    for item in cfg.problems(seed=12, count=60):
        pools = _pools(cfg.gold(item))
        assert pools[0] == factors_of(item)
        assert [math.prod(pool) for pool in pools] == [math.prod(factors_of(item))] * len(pools)
        assert pools[-1] == [math.prod(factors_of(item))]
        assert len(pools) == 1 + math.ceil(math.log2(len(factors_of(item))))


def test_the_boxed_number_is_exact_for_ten_thousand_problems():
    cfg = Multiplication(parallel=True)
    wide = 0
    for item in cfg.problems(seed=13, count=10_000):
        true = math.prod(factors_of(item))
        assert item.answer == str(true)
        assert item.question == f"What is {' * '.join(map(str, factors_of(item)))}?"
        assert 5 <= len(factors_of(item)) <= 8
        assert all(0 <= factor <= 1000 for factor in factors_of(item))
        wide += true >= 2**53
    assert wide > 5000  # most products of this task do not fit a double


def test_a_gold_text_is_graded_right_and_its_neighbours_wrong():
    for cfg in CONFIGS:
        for item in cfg.problems(seed=14, count=20):
            text = cfg.gold(item)
            assert grade(text, item.answer)
            assert not grade(text, str(int(item.answer) + 1))
            assert not grade(text.replace("</think>", ""), item.answer)
            assert not grade(text.split("</think>")[0], item.answer)


def test_a_wrong_product_beyond_two_to_the_53_is_wrong():
    response = "<think>\n</think>\n\nThe product is \\boxed{123456789012345679}."
    assert not grade(response, "123456789012345678")
    assert grade(response, "123456789012345679")
    grouped = response.replace("123456789012345679", "123,456,789,012,345,679")
    assert grade(grouped, "123456789012345679")


def test_the_sequential_text_holds_no_tag_and_the_parallel_one_the_same_working():
    sequential = Multiplication(parallel=False)
    parallel = Multiplication(parallel=True)
    for item in parallel.problems(seed=15, count=30):
        prose, blocks = sequential.gold(item), parallel.gold(item)
        assert "<" not in prose.replace("<think>", "").replace("</think>", "")
        untagged = re.sub(r"<Outlines>.*?</Outlines>\n", "", blocks, flags=re.S)
        untagged = re.sub(r"<Thread>\n\d+: ", "", untagged.replace("</Thread><", "<"))
        untagged = re.sub(r"</?(Parallel|Thread)>\n", "", untagged)
        assert untagged == prose


def test_every_block_holds_two_threads_or_more():
    for cfg in CONFIGS:
        if not cfg.parallel:
            continue
        forks = 0
        for item in cfg.problems(seed=16, count=60):
            for block in re.findall(r"<Parallel>.*?</Parallel>", cfg.gold(item), re.S):
                assert block.count("<Thread>") == block.count("<Outline>") >= 2
                forks += 1
        assert forks > 30


@pytest.mark.parametrize("cfg", CONFIGS)
def test_every_text_is_canonical_and_passes_the_strict_checker(cfg):
    for item in cfg.problems(seed=18, count=60):
        text = cfg.gold(item)
        assert grammar.check(
            text,
            treat_no_parallel_as_error=cfg.parallel and cfg.parallel_probability == 1.0,
            allow_between_threads=False,
            skip_conclusion=True,
        ).ok
        assert grammar.well_formed(text).trajectory_well_formed
        assert grammar.render(grammar.parse(text)) == text == grammar.normalise(text)


def test_a_lone_pair_forks_over_the_non_zero_digits_of_the_shorter_factor():
    cfg = Multiplication(parallel=True, lone_pair="fork", min_factors=2, max_factors=2)
    text = cfg.gold(Product(factors=(305, 1234), seed=0).problem)
    assert "<Outline>1: 5 times 1234.</Outline>" in text
    assert "<Outline>2: 300 times 1234.</Outline>" in text
    assert text.count("<Thread>") == 2
    for factors in ((300, 1234), (7, 8), (0, 55), (1000, 1000)):
        assert "<Parallel>" not in cfg.gold(Product(factors=factors, seed=0).problem)


def test_the_probability_of_a_fork_is_drawn_for_each_round():
    cfg = Multiplication(
        parallel=True, parallel_probability=0.25, min_factors=4, max_factors=4, min_value=1
    )
    texts = [cfg.gold(item) for item in cfg.problems(seed=17, count=400)]
    assert 0.17 < np.mean(["<Parallel>" in text for text in texts]) < 0.33
    never = Multiplication(parallel=True, parallel_probability=0.0)
    assert not any("<Parallel>" in never.gold(p) for p in never.problems(seed=17, count=20))


def test_zeros_are_worked_like_any_number():
    assert multiply(0, 123) == ["0 * 123", "0 * 123 = 0"]
    assert multiply(0, 0) == ["0 * 0", "0 * 0 = 0"]
    row = "10 * 100: 0*1=00 0+0+0=00 0*1=00 0+0+0=00 1*1=01 1+0+0=01 0+0+0=00 -> 1000"
    assert multiply(100, 10) == ["100 * 10", row, "100 * 10 = 1000"]


@pytest.mark.parametrize("cfg", CONFIGS)
def test_steps_of_one_kind_are_equally_long_and_so_are_the_numbers_of_a_sum(cfg):
    for item in cfg.problems(seed=19, count=60):
        for a, operator, b, steps, _ in _LINE.findall(cfg.gold(item)):
            width = {"*": 6, "+": 8}
            assert all(len(s) == width["*" if "*" in s else "+"] for s in steps.split())
            assert operator == "*" or len(a) == len(b)


def test_the_format_of_each_step_stays_as_it_is():
    row = "6 * 123: 3*6=18 8+0+0=08 2*6=12 2+1+0=03 1*6=06 6+1+0=07 0+0+0=00 -> 738"
    assert multiply_by_digit(123, 6) == row
    assert multiply_by_digit(99, 9, 2) == (
        "900 * 99: 9*9=81 1+0+0=01 9*9=81 1+8+0=09 0+8+0=08 -> 89100"
    )
    assert add(738, 6150) == "0738 + 6150: 8+0+0=08 3+5+0=08 7+1+0=08 0+6+0=06 -> 6888"
    assert add(95, 7) == "95 + 07: 5+7+0=12 9+0+1=10 -> 102"
    assert multiply(46, 123) == [
        "46 * 123",
        row,
        "40 * 123: 3*4=12 2+0+0=02 2*4=08 8+1+0=09 1*4=04 4+0+0=04 0+0+0=00 -> 4920",
        "0738 + 4920: 8+0+0=08 3+2+0=05 7+9+0=16 0+4+1=05 -> 5658",
        "46 * 123 = 5658",
    ]


def test_a_parallel_text_stays_as_it_is():
    cfg = Multiplication(parallel=True, min_factors=5, max_factors=5)
    assert cfg.gold(Product(factors=(12, 7, 30, 5, 1), seed=0).problem) == (
        "<think>\n"
        "Pool: 12, 7, 30, 5, 1.\n"
        "<Parallel>\n"
        "<Outlines>\n"
        "<Outline>1: 12 times 7.</Outline>\n"
        "<Outline>2: 30 times 5.</Outline>\n"
        "</Outlines>\n"
        "<Thread>\n"
        "1: 12 * 7\n"
        "7 * 12: 2*7=14 4+0+0=04 1*7=07 7+1+0=08 0+0+0=00 -> 84\n"
        "12 * 7 = 84\n"
        "</Thread><Thread>\n"
        "2: 30 * 5\n"
        "5 * 30: 0*5=00 0+0+0=00 3*5=15 5+0+0=05 0+1+0=01 -> 150\n"
        "30 * 5 = 150\n"
        "</Thread>\n"
        "</Parallel>\n"
        "Pool: 84, 150, 1.\n"
        "84 * 150\n"
        "4 * 150: 0*4=00 0+0+0=00 5*4=20 0+0+0=00 1*4=04 4+2+0=06 0+0+0=00 -> 600\n"
        "80 * 150: 0*8=00 0+0+0=00 5*8=40 0+0+0=00 1*8=08 8+4+0=12 0+0+1=01 -> 12000\n"
        "00600 + 12000: 0+0+0=00 0+0+0=00 6+0+0=06 0+2+0=02 0+1+0=01 -> 12600\n"
        "84 * 150 = 12600\n"
        "Pool: 12600, 1.\n"
        "12600 * 1\n"
        "1 * 12600: 0*1=00 0+0+0=00 0*1=00 0+0+0=00 6*1=06 6+0+0=06 2*1=02 2+0+0=02 "
        "1*1=01 1+0+0=01 0+0+0=00 -> 12600\n"
        "12600 * 1 = 12600\n"
        "Pool: 12600.\n"
        "</think>\n"
        "\n"
        "The product is \\boxed{12600}."
    )


def test_a_fork_of_a_lone_pair_stays_as_it_is():
    cfg = Multiplication(parallel=True, min_factors=2, max_factors=2, lone_pair="fork")
    assert cfg.gold(Product(factors=(84, 150), seed=0).problem) == (
        "<think>\n"
        "Pool: 84, 150.\n"
        "<Parallel>\n"
        "<Outlines>\n"
        "<Outline>1: 4 times 150.</Outline>\n"
        "<Outline>2: 80 times 150.</Outline>\n"
        "</Outlines>\n"
        "<Thread>\n"
        "1: 4 * 150: 0*4=00 0+0+0=00 5*4=20 0+0+0=00 1*4=04 4+2+0=06 0+0+0=00 -> 600\n"
        "</Thread><Thread>\n"
        "2: 80 * 150: 0*8=00 0+0+0=00 5*8=40 0+0+0=00 1*8=08 8+4+0=12 0+0+1=01 -> 12000\n"
        "</Thread>\n"
        "</Parallel>\n"
        "00600 + 12000: 0+0+0=00 0+0+0=00 6+0+0=06 0+2+0=02 0+1+0=01 -> 12600\n"
        "84 * 150 = 12600\n"
        "Pool: 12600.\n"
        "</think>\n"
        "\n"
        "The product is \\boxed{12600}."
    )


def test_the_problems_of_the_published_seeds_stay_as_they_are():
    cfg = Multiplication(parallel=True)
    assert cfg.product(42, 0).factors == (719, 447, 703, 323, 825)
    assert cfg.product(100, 7).factors == (380, 733, 952, 440, 321, 833, 112, 159)


def test_a_stream_can_be_entered_anywhere():
    cfg = Multiplication(parallel=True)
    stream = cfg.problems(seed=5, count=50)
    assert [cfg.product(5, i).problem for i in range(50)] == stream
    assert cfg.problems(seed=5, count=10) == stream[:10]
    assert cfg.problems(seed=6, count=50) != stream


def test_splits_share_no_question():
    cfg = Multiplication(parallel=False, max_value=9, min_factors=2, max_factors=2)
    train = cfg.problems(seed=1, count=60)
    questions = {item.question for item in train}
    test = cfg.problems(seed=2, count=40, exclude=questions)
    assert len(questions) == 60
    assert not questions & {item.question for item in test}
    assert len({item.question for item in test} | questions) == 100  # all there are


def test_a_range_with_too_few_questions_is_refused():
    cfg = Multiplication(parallel=False, max_value=1, min_factors=2, max_factors=2)
    with pytest.raises(ValueError, match="only 4 new questions"):
        cfg.problems(seed=1, count=5)


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_value": -1},
        {"min_value": 5, "max_value": 4},
        {"max_value": 2**63},
        {"min_factors": 1},
        {"min_factors": 6, "max_factors": 5},
        {"max_factors": 101},
        {"parallel_probability": 1.5},
    ],
)
def test_an_impossible_config_is_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        Multiplication(parallel=True, **wrong).check()
