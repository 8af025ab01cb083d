"""The findings of a fault run, and a deadline that finds hangs."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple


class Finding(NamedTuple):
    """Something that must not happen.

    Attributes:
      kind: "lost" if finished work was lost, "silent" if a fault had an effect without a message.
      what: what happened.
      where: the command, the text or the folder that shows it again.
    """

    kind: Literal["lost", "silent"]
    what: str
    where: str


class Hang(BaseException):
    """Not an Exception, so that nothing under test swallows it."""


@contextlib.contextmanager
def deadline(cpu_seconds: float, wall_seconds: float) -> Iterator[None]:
    """Raises Hang in the main thread when the work in it takes too long."""

    def stop(number: int, _: Any) -> None:
        raise Hang(signal.Signals(number).name)

    signal.signal(signal.SIGVTALRM, stop)
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
    signal.setitimer(signal.ITIMER_REAL, wall_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
