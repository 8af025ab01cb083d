"""Hostile responses: damaged valid responses, and odd answers.

All texts are drawn from random generators, so a seed and a number determine a text. Most texts are
short, because a fault run needs many; a few are long.
"""

import functools
import random
from collections.abc import Callable
from typing import Literal, NamedTuple

from tw_jax.forkjoin.threadweaver import grammar
from tw_jax.tasks import multiplication
from tw_jax.tasks.task import Problem

TASK = multiplication.Multiplication(
    min_value=0, max_value=99, min_factors=2, max_factors=4, parallel=True, lone_pair="fork"
)
TAGS = tuple(
    f"<{slash}{name}>"
    for name in ("Parallel", "Outlines", "Outline", "Thread", "Conclusion")
    for slash in ("", "/")
)
ODD = (
    *("\0", "\ud800", "\udfff", "\u2028", "\r\n", "\x85", "\ufeff", "\u200b", "\U0001f9f5"),
    *("</s>", "<s>", "<pad>", "<unk>", "<|im_end|>", "<|im_start|>", "<think>", "</think>"),
    *("</Think>", "\\boxed{", "\\boxed{}", "}", "{", "$", "\\", "<thread>", "< Thread >", "<Tool>"),
)
DIGITS = ("\u0661", "\u0967", "\uff11", "\u00b2", "\u2460", "\U0001d7cf")
"""Digits for `str.isdigit` that are no valid numbers of threads."""
NUMBERS = ("0", "00", "01", "0" * 12 + "1", "1.1", "1.", ".1", "-1", "1e3", "9" * 5000, "0" * 5000)
LATEX = (
    *("\\frac{1}{", "\\frac{a}{0}", "\\sqrt{-1}", "\\sqrt[0]{x}", "x^{x^{x}}", "9^{9^{9^9}}"),
    *("10!", "99999!!", "\\binom{5}{2}", "\\sum_{n=1}^{10^9} n", "\\int_0^1", "\\infty"),
    *("\\left(", "\\right)", "(1,2]", "\\{1,2\\}", "\\{", "1 \\pm", "12_{8}", "\\text{cat}"),
    *("\\mathrm{d}x", "5\\%", "5 \\text{ cm}", "\\pi", "e^{i\\pi}", "1/0", "0/0", "-\\frac12"),
    *("\\begin{pmatrix}1&2\\\\3&4\\end{pmatrix}", "\\begin{pmatrix}", "x=5", "1=1", "=", "\\\\"),
    *("__import__('os').system('false')", "lambda: 0", "1;2", "1,2", "[0]*10**10", "nan", "inf"),
)


class Hostile(NamedTuple):
    """One response with the question and the truth that it is graded against.

    Attributes:
      question: The question.
      response: The text, of any code points.
      truth: The right answer, a decimal integer.
      wrong: "value" if the answer certainly has another value than the truth, "form" if it is not
        one number in a notation for numbers, None if neither is certain.
      answer: The content of its box for mathematics mode, or None.
    """

    question: str
    response: str
    truth: str
    wrong: Literal["value", "form"] | None
    answer: str | None


def hostile(seed: int, number: int) -> Hostile:
    """Returns text `number` of a seed."""
    rng = random.Random(f"{seed} {number}")
    problem, gold = _valid(rng.randrange(512))
    kind = rng.random()
    if kind < 0.4:
        answer, wrong = _answer(rng, problem)
        inside = f"\\boxed{{{answer}}}"
        around = rng.choice(("</think>{}", "x</think>\n\\[{}\\]", "</think>{}.", "{}</think>{}"))
        response = around.replace("{}", inside)
        return Hostile(problem.question, response, problem.answer, wrong, answer)
    small = f"{_small(rng)}\n</think>\n\n\\boxed{{{problem.answer}}}"
    response = gold if kind < 0.5 else small
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 8))):
        response = rng.choice(MUTATIONS)(rng, response)
    return Hostile(problem.question, response, problem.answer, None, None)


@functools.cache
def _valid(index: int) -> tuple[Problem, str]:
    problem = TASK.product(0, index).problem
    return problem, TASK.gold(problem)


# Trajectories.


def _small(rng: random.Random) -> str:
    """A document of the grammar, with short texts."""
    segments: list[grammar.Prose | grammar.ParallelBlock] = []
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        numbers = [str(n + 1) for n in range(rng.choice((1, 2, 2, 3, 5, 9, 60)))]
        if rng.random() < 0.1:
            numbers = [f"{rng.randrange(9)}.{n}" for n in numbers]
        outlines = tuple(grammar.Outline(n, _words(rng)) for n in numbers)
        threads = tuple(grammar.ThreadText(n, _words(rng)) for n in numbers)
        segments += [grammar.Prose(_words(rng) + "\n"), grammar.ParallelBlock(outlines, threads)]
    return grammar.render(grammar.Document((*segments, grammar.Prose("\n" + _words(rng)))))


def _words(rng: random.Random) -> str:
    return " ".join(rng.choices(("a", "12", "so", "= 3", "é", "数", "x: y"), k=rng.randrange(4)))


def _place(rng: random.Random, text: str) -> int:
    """A random position; half of the time at a tag, if there is one."""
    if rng.random() < 0.5 and (at := text.find(rng.choice(TAGS), rng.randrange(len(text) + 1))) > 0:
        return at
    return rng.randrange(len(text) + 1)


def _delete(rng: random.Random, text: str) -> str:
    tag = rng.choice(TAGS)
    return text.replace(tag, "", rng.choice((1, 1, -1)))


def _double(rng: random.Random, text: str) -> str:
    tag = rng.choice(TAGS)
    return text.replace(tag, tag + tag, rng.choice((1, 1, -1)))


def _swap(rng: random.Random, text: str) -> str:
    one, other = rng.sample(TAGS, 2)
    return text.replace(one, "\1", 1).replace(other, one, 1).replace("\1", other)


def _exchange(rng: random.Random, text: str) -> str:
    a, b, c, d = sorted(_place(rng, text) for _ in range(4))
    return text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]


def _nest(rng: random.Random, text: str) -> str:
    start, stop = sorted((_place(rng, text), _place(rng, text)))
    part = text[start:stop]
    return text[:start] + part + part + text[start:] if len(part) < 400 else text + part


def _deep(rng: random.Random, text: str) -> str:
    at, tag, times = _place(rng, text), rng.choice((*TAGS, "{", "\\boxed{", "\\frac{", "(")), 5
    times = rng.choice((5, 50, 2000)) if rng.random() < 0.1 else times
    return text[:at] + tag * times + text[at:]


def _cut(rng: random.Random, text: str) -> str:
    """Cuts between bytes, which leaves half a character as a lone surrogate."""
    data = text.encode("utf-8", "surrogatepass")
    at = rng.randrange(len(data) + 1)
    data = data[:at] if rng.random() < 0.7 else data[at:]
    return data.decode("utf-8", "surrogateescape")


def _flip(rng: random.Random, text: str) -> str:
    data = bytearray(text.encode("utf-8", "surrogatepass"))
    for _ in range(rng.choice((1, 1, 3))):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return data.decode("utf-8", "surrogateescape")


def _renumber(rng: random.Random, text: str) -> str:
    old = f"{rng.randrange(1, 4)}:"
    number = rng.choice((*NUMBERS[:-2], *DIGITS)) if rng.random() < 0.98 else rng.choice(NUMBERS)
    return text.replace(old, number + rng.choice((":", " :", "", "::")), rng.choice((1, 2, -1)))


def _insert(rng: random.Random, text: str) -> str:
    at = _place(rng, text)
    return text[:at] + rng.choice((*ODD, *TAGS, *DIGITS)) + text[at:]


def _blanks(rng: random.Random, text: str) -> str:
    at = _place(rng, text)
    times = 20_000 if rng.random() < 0.01 else rng.randrange(1, 9)
    return text[:at] + rng.choice((" ", "\n", "\t", "\u00a0", "\u3000")) * times + text[at:]


def _long(rng: random.Random, text: str) -> str:
    at = _place(rng, text)
    times = 5000 if rng.random() < 0.02 else 40
    return text[:at] + rng.choice(("a", "1", "<", "0", "\\", "é")) * times + text[at:]


Mutation = Callable[[random.Random, str], str]
MUTATIONS: tuple[Mutation, ...] = (
    *(_delete, _double, _swap, _exchange, _nest, _deep, _cut, _flip, _renumber, _insert),
    *(_blanks, _long),
)


# Answers.


def _answer(rng: random.Random, problem: Problem) -> tuple[str, Literal["value", "form"] | None]:
    """An answer, and whether it is certainly wrong."""
    if (kind := rng.random()) < 0.4:
        return _other_value(rng, problem), "value"
    if kind < 0.5:
        return _other_form(rng, problem), "form"
    truth = int(problem.answer)
    text = rng.choice((str(truth), f"{truth:,}", f"{truth}.0", rng.choice(LATEX)))
    for _ in range(rng.choice((0, 1, 1, 2, 4))):
        at, odd = rng.randrange(len(text) + 1), rng.choice((*LATEX, *ODD, *DIGITS, *NUMBERS[:-2]))
        text = text[:at] + odd + text[at:]
    if rng.random() < 0.002:
        text = rng.choice((*NUMBERS[-2:], "{" * 3000, "\\frac{" * 500, "(" * 2000, "2^" * 500))
    return text, None


def _other_value(rng: random.Random, problem: Problem) -> str:
    """A text that cannot be read as the value of the truth."""
    digits, truth = problem.answer, int(problem.answer)
    other = truth + rng.choice((1, -1, 2, 10, -10, 10**6, 2**64))
    at = rng.randrange(len(digits))
    changed = digits[:at] + str((int(digits[at]) + rng.randrange(1, 10)) % 10) + digits[at + 1 :]
    numbers = (
        *(str(other), f"{other:,}", f"{other}.0", f"\\text{{{other}}}", f"{other}e1", changed),
        *(f"{other}\\%", f"\\frac{{{2 * other}}}{{2}}", f"{2 * other}/2", f"{digits}.{changed}1"),
        *(f"{digits}{rng.randrange(1, 10)}", f"{rng.randrange(1, 10)}{digits}"),
        *(f"{digits}.{rng.randrange(1, 10)}", f"{digits}.{'0' * 30}1", f"{digits} 1/2"),
        *(f"{other} \\times 10^{{0}}", f"{other}\\cdot 10^3", "9" * 30),
        "9" * (5000 if rng.random() < 0.02 else 300),
    )
    several = (
        *(
            f"{digits}+0.5",
            f"1={digits}1",
            f"{other}={digits}",
            f"{_product(rng, problem)}={other}",
        ),
        *(f"({digits},{other})", f"{digits}, {other}", f"{other}, {digits}", f"{other} \\pm 1"),
        *(f"{digits} or {other}", f"{digits}!!+{other}", f"{digits} cm {other}"),
        *(f"\\{{{digits},{other}\\}}", f"x={other}", f"{digits} {other}"),
    )
    if truth and rng.random() < 0.2:
        return rng.choice((f"-{digits}", f"\\frac{{{digits}}}{{2}}", f"{digits}e2", f"{digits}0"))
    return rng.choice(numbers if rng.random() < 0.7 else several)


def _other_form(rng: random.Random, problem: Problem) -> str:
    """An unfinished calculation, often the question. It may have the value of the truth."""
    digits, product = problem.answer, _product(rng, problem)
    return rng.choice(
        (
            *(product, product, f"{product}={digits}", f"{digits}={product}", f"{digits}+0"),
            *(f"{digits}-0", f"{digits}\\cdot 1", f"{digits}_8", f"\\frac{{{product}}}{{1}}"),
            *(f"{digits}={digits}", f"{digits}^1", f"\\sqrt{{{int(digits) ** 2}}}", f"--{digits}"),
        )
    )


def _product(rng: random.Random, problem: Problem) -> str:
    times = rng.choice(("*", " * ", "\\times ", "\\cdot ", " x ", "\\,", ")("))
    product = times.join(map(str, problem.extra["factors"]))
    return f"({product})" if times == ")(" else product
