"""Grading under a deadline: exact answers at once, symbolic ones in worker processes.

A symbolic comparison may run for ever or eat all memory, and a Python thread cannot be stopped; a
process can. Each worker is a fresh process with a limit on its memory. A worker that misses the
deadline, dies or does not start is killed and replaced, and its item is a "timeout", not a wrong
answer. A worker ends with its parent. No worker starts before the first symbolic item, so mode
"number" never pays for one.

This file knows answers, and neither tasks nor rewards; it hands on verdicts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.tasks import answers, mathematics

START_SECONDS = 120.0
_MEMORY_BYTES = 4 * 2**30
_MAX_FAILED_STARTS = 3
PAUSE_SECONDS = 600.0
"""After this many failed starts in a row a worker is not started again for this long."""
_GRACE_SECONDS = 1.0
"""A worker ends itself when it is so much later than a deadline at which its parent kills it."""


@configurable
class Grader:
    """How answers are graded.

    Attributes:
      mode: "number" accepts only one number in a listed notation, and is for arithmetic and its
        rewards; "mathematics" also accepts exact expressions, sets, equations and words.
        docs/answers.md has the rules.
      workers: number of processes for symbolic comparisons, which is how many run at once.
      item_seconds: deadline of one symbolic comparison, in seconds.
      where: "after_thinking" takes only an answer after `</think>`, "anywhere" also one before.
    """

    mode: answers.Mode
    workers: int = 2
    item_seconds: float = 5.0
    where: answers.Where = "after_thinking"

    def check(self) -> None:
        """Refuse a pool that could not work."""
        require(self, "workers", least=1)
        require(self, "item_seconds", above=0, most=86_400)


def check_truths(cfg: Grader, problems: Iterable[tuple[str, str]]) -> None:
    """Refuses problems that no answer could solve, before anything is sampled.

    Args:
      cfg: how answers are graded.
      problems: (id, right answer) of each.

    Raises:
      ValueError: If a right answer is empty, or is not a number in mode "number".
    """
    for name, truth in problems:
        try:
            answers.check_truth(truth, cfg.mode)
        except ValueError as error:
            raise ValueError(f"Problem {name!r}: {error}") from None


class GraderPool:
    """Grades from any thread; a context manager, closed once.

    Workers are spawned, not forked, for the parent holds JAX and its threads. A program that is
    run as a script therefore needs the usual `if __name__ == "__main__"`.
    """

    def __init__(self, cfg: Grader):
        """Opens the pool; no process starts yet."""
        self._cfg = cfg
        self._closed = threading.Event()
        # Last in, first out: the worker that is started already goes first.
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for _ in range(cfg.workers):
            self._free.put(_Worker())

    def __enter__(self) -> GraderPool:
        """The pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the pool."""
        self.close()

    def grade(self, response: str, truth: str) -> answers.Verdict:
        """Grades one response; waits for a free worker where symbolic work is needed.

        Args:
          response: the model's text without the prompt.
          truth: the right answer, as a number or in LaTeX.

        Raises:
          RuntimeError: If the pool is closed.
          ValueError: If no answer could equal the truth; see `answers.check_truth`.
        """
        answer = answers.final_answer(response, where=self._cfg.where)
        if answer is None:
            return "no_answer"
        equal = answers.exactly_equal(answer, truth, self._cfg.mode)
        return self._symbolic(answer, truth) if equal is None else _verdict(equal)

    def grade_all(self, items: Iterable[tuple[str, str]]) -> list[answers.Verdict]:
        """Grades (response, truth) pairs, several at once; verdicts in the order of the items."""
        with ThreadPoolExecutor(self._cfg.workers) as threads:
            return list(threads.map(lambda item: self.grade(*item), items))

    def close(self) -> None:
        """Waits for comparisons under way, at most their deadline, and ends the workers."""
        if self._closed.is_set():
            return
        self._closed.set()
        workers = [self._free.get() for _ in range(self._cfg.workers)]
        for worker in workers:
            worker.stop()
            self._free.put(worker)  # so that a caller who was waiting finds the pool closed

    def _symbolic(self, answer: str, truth: str) -> answers.Verdict:
        worker = self._free.get()
        try:
            if self._closed.is_set():
                raise RuntimeError("GraderPool is closed: grade before the end of its `with`.")
            equal = worker.compare(answer, truth, self._cfg.item_seconds)
        finally:
            self._free.put(worker)
        return "timeout" if equal is None else _verdict(equal)


class _Worker:
    """One process, started on first use and again after each loss; serves one caller at a time."""

    def __init__(self) -> None:
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._failed_starts = 0
        self._paused_until = 0.0

    def compare(self, answer: str, truth: str, seconds: float) -> bool | None:
        """The worker's answer, or None if it was late, died, ran out of memory or did not start."""
        pipe = self._pipe or self._start()
        if pipe is None:
            return None
        try:
            pipe.send((answer, truth, seconds))
            if pipe.poll(seconds):
                return pipe.recv()
        except (EOFError, OSError):
            pass
        except BaseException:
            self.stop()  # interrupted: a reply that is still to come must not meet the next item
            raise
        self.stop()
        return None

    def _start(self) -> Connection | None:
        """The pipe to a new process; None, after a warning, if it did not start."""
        if time.monotonic() < self._paused_until:
            return None
        try:
            pipe = self._spawn()
            if pipe.poll(START_SECONDS):
                pipe.recv()
                self._failed_starts = 0
                return pipe
            reason = f"was not ready after {START_SECONDS:g} seconds"
        except (EOFError, OSError) as error:
            reason = f"ended before it was ready ({type(error).__name__}: {error})"
        except BaseException:
            self.stop()
            raise
        self.stop()
        self._failed_starts += 1
        then = "The next such answer starts another one."
        if self._failed_starts >= _MAX_FAILED_STARTS:
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            then = (
                f"There were {self._failed_starts} of them in a row, so for "
                f"{PAUSE_SECONDS / 60:g} minutes none is started and answers that need one are "
                "counted as timeouts."
            )
        warnings.warn(
            f"Grader: a worker process {reason}; its answer is counted as a timeout. {then} The "
            "message of the process is on standard error. A script needs "
            '`if __name__ == "__main__"` around its work.',
            stacklevel=2,
        )
        return None

    def _spawn(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        self._pipe = pipe
        process = context.Process(target=_serve, args=(theirs,), name="grader", daemon=True)
        self._process = process
        try:
            process.start()
        finally:
            theirs.close()
        return pipe

    def stop(self) -> None:
        """Kills the process, whatever it is doing, and forgets it."""
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if pipe is not None:
            pipe.close()
        if process is not None and process.pid is not None:
            process.kill()
            process.join()


def _verdict(equal: bool) -> answers.Verdict:
    return "correct" if equal else "wrong"


def _serve(pipe: Connection) -> None:
    """The life of a worker: says it is ready, then answers until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(ImportError):
        import resource  # not on every system

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, hard))
    mathematics.equal("x+1", "1+x")  # imports what the first item should not wait for
    pipe.send("ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            answer, truth, seconds = pipe.recv()
            _end_after(seconds + _GRACE_SECONDS)
            try:
                reply = mathematics.equal(answer, truth)
            except MemoryError:
                reply = None
            except Exception:  # the reader's ways to fail on a strange text are many
                reply = False
            _end_after(0)
            pipe.send(reply)


def _end_with_parent() -> None:
    """Waits for the end of the parent, even a killed one, and ends this process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _end_after(seconds: float) -> None:
    """Lets the system end this process after so long; 0 forgets that.

    A thread cannot do it, because a single operation on giant numbers holds Python's lock. The
    default action of the alarm ends the process without any Python.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
