"""Draws docs/trie.svg, the worked example, and docs/images/trie.svg, a short multiplication."""

import io

import numpy as np
from repo.example import PROMPT, VOCABULARY, WRITTEN, calls

from tw_jax.forkjoin.calls import Call, Provenance, StopReason, Trajectory
from tw_jax.forkjoin.replay import replay
from tw_jax.forkjoin.threadweaver import ForkJoin, ThreadWeaver, make_table
from tw_jax.tasks.multiplication import Multiplication, Product
from tw_jax.tokenizer import Bytes, Chat, load_tokenizer
from tw_jax.view import plots

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
"""Who wrote the example's joined path, and how many tokens at a time."""


def example_trajectory() -> Trajectory:
    """The worked example of docs/trie.md as the record that a rollout leaves."""
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


def multiplication_trajectory() -> Trajectory:
    """12 * 34 in bytes: two threads, a row each of the long multiplication."""
    problem = Product(factors=(12, 34), seed=0).problem
    response = Multiplication(parallel=True, lone_pair="fork").gold(problem)
    tokenizer, chat = load_tokenizer(Bytes()), Chat(template="plain")
    ids = chat.document(tokenizer, problem.question, response)
    protocol = ThreadWeaver(make_table(tokenizer), ForkJoin())
    return replay(protocol, ids, len(chat.prompt(tokenizer, problem.question)))


def draw() -> str:
    """docs/trie.svg."""
    words = np.array(VOCABULARY)
    return _svg(plots.trie_figure(example_trajectory(), lambda ids: " ".join(words[ids])))


def draw_multiplication() -> str:
    """docs/images/trie.svg."""
    decode = load_tokenizer(Bytes()).decode
    return _svg(plots.trie_figure(multiplication_trajectory(), decode))


def _svg(figure: plots.Figure) -> str:
    file = io.BytesIO()
    plots.save(figure, file, "svg")
    return file.getvalue().decode()


def _ids(words: list[str]) -> np.ndarray:
    return np.array([VOCABULARY.index(word) for word in words], np.int32)
