r"""The multiplication task: problems, gold trajectories with digit-level working, exact grading.

A pool of factors is multiplied pair by pair until one number is left. In the parallel variant a
round with several pairs is one block, with an outline and a thread for each pair. In the sequential
variant the same working is written as prose. Each step is local: one digit times one digit, or two
digits plus a carry, least significant digit first. All steps of a kind have the same length: a
carry is written even if it is 0, the value of a step always has two digits, and the numbers of a
sum are padded with zeros to the same width. Therefore the inputs of a step are at a fixed distance,
and a model has to learn only two small tables (zero padding and reversal: arXiv:2307.03381).

The task follows ThreadWeaver (arXiv:2512.07843, synthetic multiplication). Its generator of text
was not released, so the text here is our own. One small function below writes each kind of step.
This file depends on no model and no tokenizer.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Collection
from typing import Literal

import numpy as np

from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.forkjoin.threadweaver import grammar
from tw_jax.tasks import answers, notation
from tw_jax.tasks.task import Problem, Task, Verdict


@configurable
class Multiplication(Task):
    """Sizes of the problems and layout of the working.

    Attributes:
      min_value: Smallest factor, inclusive.
      max_value: Largest factor, inclusive.
      min_factors: Smallest number of factors of a problem, inclusive.
      max_factors: Largest number of factors of a problem, inclusive.
      parallel: Whether rounds may fork into threads. False writes the same working as prose.
      parallel_probability: Probability that a round that can fork does; drawn for each round.
      lone_pair: Layout of a round with a single pair. "prose" writes it as prose. "fork" uses one
        thread per non-zero digit of the shorter factor if there are at least two such digits.
    """

    min_value: int = 0
    max_value: int = 1000
    min_factors: int = 5
    max_factors: int = 8
    parallel: bool
    parallel_probability: float = 1.0
    lone_pair: Literal["prose", "fork"] = "prose"

    def check(self) -> None:
        """Refuses empty ranges and values out of bounds."""
        require(self, "min_value", "max_value", least=0, below=2**63)
        # A block holds at most MAX_OUTLINES pairs of factors.
        require(self, "min_factors", "max_factors", least=2, most=2 * grammar.MAX_OUTLINES)
        for low, high in (("min_value", "max_value"), ("min_factors", "max_factors")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(
                    f"Multiplication.{low} = {getattr(self, low)} must not be above "
                    f"Multiplication.{high} = {getattr(self, high)}."
                )
        require(self, "parallel_probability", least=0, most=1)

    def product(self, seed: int, index: int) -> Product:
        """Returns product `index` of the stream `seed`, the same on every machine.

        A 32-bit base is drawn from `seed`, and product i is drawn from `base + i` alone, so any
        part of a stream can be made without the rest. Source: ThreadWeaver's `generate_math.py`.
        """
        base = int(np.random.Generator(np.random.PCG64(seed)).integers(2**32))
        rng = np.random.Generator(np.random.PCG64(base + index))
        count = int(rng.integers(self.min_factors, self.max_factors, endpoint=True))
        factors = rng.integers(self.min_value, self.max_value, size=count, endpoint=True)
        return Product(factors=tuple(int(f) for f in factors), seed=base + index)

    def problems(
        self, *, seed: int, count: int, exclude: Collection[str] = frozenset()
    ) -> list[Problem]:
        """Returns the first `count` problems of a stream whose questions are new; see `Task`.

        Questions with the same factors in another order are different questions.
        """
        seen, found = set(exclude), []
        tries = 100 * (count + len(seen)) + 1000
        for index in range(tries):
            if len(found) == count:
                return found
            candidate = self.product(seed, index).problem
            if candidate.question not in seen:
                seen.add(candidate.question)
                found.append(candidate)
        raise ValueError(
            f"Multiplication: {tries} draws gave only {len(found)} new questions, and {count} are "
            "needed. Widen min_value..max_value or min_factors..max_factors, or ask for fewer."
        )

    def gold(self, problem: Problem) -> str:
        """Returns the thoughts with all working and the boxed product."""
        product = Product.of(problem)
        rng = np.random.Generator(np.random.PCG64([product.seed, 1]))
        pool = list(product.factors)
        lines = [_pool_line(pool)]
        while len(pool) > 1:
            # Drawn in every round, so that `parallel` does not change later draws.
            fork = rng.random() < self.parallel_probability and self.parallel
            pairs = list(zip(pool[0::2], pool[1::2], strict=False))
            lines += _round(pairs, fork=fork, lone_pair=self.lone_pair)
            carried = pool[2 * len(pairs) :]
            pool = [a * b for a, b in pairs] + carried
            lines.append(_pool_line(pool))
        thoughts = "\n".join(lines)
        return f"<think>\n{thoughts}\n</think>\n\nThe product is \\boxed{{{pool[0]}}}."

    def grade(self, problem: Problem, text: str) -> Verdict:
        """Returns "correct" if the response boxes exactly this integer after its thoughts."""
        given = answers.final_answer(text, where="after_thinking")
        if given is None:
            return "no_answer"
        return "correct" if notation.as_integer(given) == int(problem.answer) else "wrong"

    def grade_at_once(self, problem: Problem, text: str) -> Verdict:
        """Returns the same as `grade`, which only compares two integers."""
        return self.grade(problem, text)


@dataclasses.dataclass(frozen=True)
class Product:
    """The factors of one problem.

    Attributes:
      factors: The factors in the order of the question.
      seed: Seed of this problem. The layout of its gold text is drawn from it too.
    """

    factors: tuple[int, ...]
    seed: int

    @classmethod
    def of(cls, problem: Problem) -> Product:
        """Reads the factors from the `extra` fields of a problem."""
        return cls(tuple(problem.extra["factors"]), problem.extra["seed"])

    @property
    def question(self) -> str:
        """The question as the user asks it."""
        return f"What is {_times(self.factors)}?"

    @property
    def answer(self) -> str:
        """The product in plain digits."""
        return str(math.prod(self.factors))

    @property
    def problem(self) -> Problem:
        """The problem with this question and answer."""
        return Problem(
            id=f"multiplication-{self.seed}",
            question=self.question,
            answer=self.answer,
            task="multiplication",
            extra={"factors": list(self.factors), "seed": self.seed},
        )


def multiply_by_digit(number: int, digit: int, zeros: int = 0) -> str:
    """Returns one row: `60 * 12: 2*6=12 2+0+0=02 1*6=06 6+1+0=07 0+0+0=00 -> 720`.

    The digit comes first because it distinguishes the threads of a block: a thread begins with the
    same number as its outline. After each product of two digits comes its column of the row: the
    ones of the product, the tens of the product before it, and a carry. Therefore the products are
    one table of a hundred entries, and columns are added as in `add`.

    Args:
      number: The multiplicand.
      digit: The digit, 1 to 9.
      zeros: Number of zeros after the digit. The result is multiplied by the same power of ten.
    """
    steps, tens, carry = [], 0, 0
    for place in reversed(str(number)):
        product = int(place) * digit
        value = product % 10 + tens + carry
        steps += [f"{place}*{digit}={product:02}", f"{product % 10}+{tens}+{carry}={value:02}"]
        tens, carry = product // 10, value // 10
    steps.append(f"0+{tens}+{carry}={tens + carry:02}")
    scale = 10**zeros
    return f"{digit * scale} * {number}: {' '.join(steps)} -> {number * digit * scale}"


def add(a: int, b: int) -> str:
    """Returns one sum by columns: `0738 + 6150: 8+0+0=08 3+5+0=08 7+1+0=08 0+6+0=06 -> 6888`."""
    steps, carry = [], 0
    width = max(len(str(a)), len(str(b)))
    padded = f"{a:0{width}}", f"{b:0{width}}"
    for x, y in zip(*map(reversed, padded), strict=True):
        value = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={value:02}")
        carry = value // 10
    return f"{' + '.join(padded)}: {' '.join(steps)} -> {a + b}"


def multiply(a: int, b: int) -> list[str]:
    """Returns the working of one product as lines: its name, rows, sums, result."""
    long, parts = _parts(a, b)
    rows = [multiply_by_digit(long, digit, zeros) for digit, zeros in parts]
    return [f"{a} * {b}", *rows, *_sums(long, parts), f"{a} * {b} = {a * b}"]


def _parts(a: int, b: int) -> tuple[int, list[tuple[int, int]]]:
    """Returns the longer factor, and (digit, zeros) of each non-zero digit of the shorter one."""
    long, short = (a, b) if len(str(a)) >= len(str(b)) else (b, a)
    if long == 0:
        return long, []
    digits = [(int(digit), zeros) for zeros, digit in enumerate(reversed(str(short)))]
    return long, [(digit, zeros) for digit, zeros in digits if digit]


def _sums(long: int, parts: list[tuple[int, int]]) -> list[str]:
    """Returns the lines that add the rows, two numbers at a time."""
    values = [long * digit * 10**zeros for digit, zeros in parts]
    totals = itertools.accumulate(values)
    return [add(total, value) for total, value in zip(totals, values[1:], strict=False)]


def _round(
    pairs: list[tuple[int, int]], *, fork: bool, lone_pair: Literal["prose", "fork"]
) -> list[str]:
    """Returns the lines of one round, which multiplies all pairs as a block or as prose."""
    if not fork or (len(pairs) == 1 and lone_pair == "prose"):
        return [line for a, b in pairs for line in multiply(a, b)]
    if len(pairs) > 1:
        return [_block([(a, b, "\n".join(multiply(a, b))) for a, b in pairs])]
    a, b = pairs[0]
    long, parts = _parts(a, b)
    if not 2 <= len(parts) <= grammar.MAX_OUTLINES:
        return multiply(a, b)
    rows = [
        (digit * 10**zeros, long, multiply_by_digit(long, digit, zeros)) for digit, zeros in parts
    ]
    return [_block(rows), *_sums(long, parts), f"{a} * {b} = {a * b}"]


def _block(products: list[tuple[int, int, str]]) -> str:
    """Returns a block with an outline and a thread per (factor, factor, working)."""
    numbered = [(str(n), *product) for n, product in enumerate(products, start=1)]
    return grammar.render_block(
        grammar.ParallelBlock(
            outlines=tuple(grammar.Outline(n, f"{a} times {b}.") for n, a, b, _ in numbered),
            threads=tuple(grammar.ThreadText(n, working) for n, _, _, working in numbered),
        )
    )


def _pool_line(pool: list[int]) -> str:
    return f"Pool: {', '.join(map(str, pool))}."


def _times(factors: tuple[int, ...]) -> str:
    return " * ".join(map(str, factors))
