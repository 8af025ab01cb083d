"""Trajectories that the tests of pictures draw."""

import fakes
import numpy as np

from tw_jax.forkjoin import orchestrator
from tw_jax.forkjoin.engine import Chunk
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.replay import replay
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table

TOKENIZER = fakes.Characters()
TABLE = make_table(TOKENIZER)
FORK = "a<Outlines><Outline>1:a</Outline><Outline>2:b</Outline><Outline>3:c</Outline></Outlines>"
TEXT = (
    "a<Parallel>\n<Outlines>\n<Outline>1: a</Outline>\n<Outline>2: b</Outline>\n</Outlines>"
    "\n<Thread>\n1: aa\n</Thread><Thread>\n2: bb\n</Thread>\n</Parallel>d<eos>"
)


class Drunk:
    """An engine whose threads close themselves, end, or run on; its parent forks a few times."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    async def generate(self, request):
        text = FORK if self.rng.random() < 0.6 else "</Parallel>b<eos>"
        if request.path:
            words = "".join(self.rng.choice([*"cdef"], self.rng.integers(0, 3)))
            text = words + ["</Thread>", "<eos>", "g" * 9][self.rng.integers(3)]
        yield Chunk(TOKENIZER.encode(text)[: request.max_tokens])


def written():
    """A trajectory of one fork, read from its text."""
    protocol = ThreadWeaver(TABLE, ForkJoin())
    return replay(protocol, TOKENIZER.encode("bc" + TEXT), 2)


def drunk(seed: int):
    """A trajectory of several forks whose threads end in all ways."""
    limits = ForkJoin(max_thread=7, max_rounds=3)
    protocol = ThreadWeaver(TABLE, limits)
    engine = Drunk(np.random.default_rng(seed))
    return orchestrator.run(protocol, engine, TOKENIZER.encode("bc"))
