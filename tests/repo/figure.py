"""Draws docs/trie.svg, the worked example, and the rollouts of docs/images."""

import ast
import io
import re

import numpy as np
from repo.example import PROMPT, VOCABULARY, WRITTEN, calls
from repo.sources import ROOT

from tw_jax.forkjoin.calls import Call, Provenance, StopReason, Trajectory
from tw_jax.forkjoin.threadweaver.written import trajectory
from tw_jax.tasks.multiplication import Multiplication, Product
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.view import timeline, trie_figure
from tw_jax.view.style import Figure, save

PATHS = ((), (0, "1"), (0, "2"), ())
"""The example's calls: the parent forks, two threads run, the parent goes on."""
RUNS = (
    (Provenance.PROMPT, 2),
    (Provenance.SAMPLED, 15),
    (Provenance.FORCED, 5),
    (Provenance.RETURNED, 3),
    (Provenance.FORCED, 4),
    (Provenance.RETURNED, 3),
    (Provenance.FORCED, 1),
    (Provenance.SAMPLED, 3),
)
"""Authors of the example's joined path, and the tokens of each stretch."""


def example_trajectory() -> Trajectory:
    """The worked example of docs/trie.md as a trajectory."""
    made = [
        Call(
            path,
            _ids(context),
            np.zeros(len(context), np.int8),
            _ids(sampled),
            None,
            StopReason.STOP,
        )
        for path, (context, sampled) in zip(PATHS, calls(), strict=True)
    ]
    return Trajectory(
        prompt_tokens=len(PROMPT),
        calls=tuple(made),
        ids=_ids(WRITTEN),
        provenance=np.repeat(*np.array(RUNS, np.int8).T),
        rounds=1,
        finish="eos",
        counts={},
    )


def multiplication_trajectory(*factors: int) -> Trajectory:
    """The gold text of a product in bytes, replayed; each round forks if it can."""
    problem = Product(factors=factors, seed=0).problem
    response = Multiplication(parallel=True, lone_pair="fork").gold(problem)
    chat = Chat(template="plain")
    return trajectory(load_tokenizer(Bytes()), chat, problem.question, response)


def quickstart_trajectory() -> Trajectory:
    """The answer of docs/quickstart.md, which its code trains until the model samples it."""
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    assignments = re.findall(r'^(\w+) = r?("{1,3}.+?"{1,3})$', page, re.MULTILINE | re.DOTALL)
    texts = {name: ast.literal_eval(f"r{text}") for name, text in assignments}
    chat = Chat(template="plain")
    return trajectory(load_tokenizer(Bytes()), chat, texts["question"], texts["response"])


def draw() -> str:
    """docs/trie.svg."""
    words = np.array(VOCABULARY)
    return _svg(trie_figure.trie_figure(example_trajectory(), lambda ids: " ".join(words[ids])))


def draw_multiplication() -> str:
    """docs/images/trie.svg."""
    decode = load_tokenizer(Bytes()).decode
    return _svg(trie_figure.trie_figure(multiplication_trajectory(12, 34), decode))


def draw_threads() -> str:
    """docs/images/threads.svg."""
    decode = load_tokenizer(Bytes()).decode
    return _svg(timeline.timeline_figure(multiplication_trajectory(47, 86, 35, 29), decode))


def draw_quickstart() -> str:
    """docs/images/quickstart.svg."""
    decode = load_tokenizer(Bytes()).decode
    return _svg(timeline.timeline_figure(quickstart_trajectory(), decode))


def _svg(figure: Figure) -> str:
    file = io.BytesIO()
    save(figure, file, "svg")
    return file.getvalue().decode()


def _ids(words: list[str]) -> np.ndarray:
    return np.array([VOCABULARY.index(word) for word in words], np.int32)
