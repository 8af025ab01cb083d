"""Grading under a deadline: exact answers at once, symbolic ones in worker processes.

A symbolic comparison may run for ever or eat all memory, and a Python thread cannot be stopped; a
process can. Each worker is a fresh process with a limit on its memory; one that misses the deadline
or dies is killed and replaced, and its item is a "timeout", not a wrong answer. No worker starts
before the first symbolic item, so tasks with integer answers never pay for one.

This file knows answers, and neither tasks nor rewards; it hands on verdicts.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import signal
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

from tw_jax.bounds import require
from tw_jax.config import config
from tw_jax.tasks import answers

_START_SECONDS = 120.0
_MEMORY_BYTES = 4 * 2**30


@config
class Grader:
    """How answers are graded.

    Attributes:
      workers: number of processes for symbolic comparisons, which is how many run at once.
      item_seconds: deadline of one symbolic comparison, in seconds.
      where: "after_thinking" takes only an answer after `</think>`, "anywhere" also one before.
    """

    workers: int = 2
    item_seconds: float = 5.0
    where: answers.Where = "after_thinking"

    def check(self) -> None:
        """Refuse a pool that could not work."""
        require(self, "workers", least=1)
        require(self, "item_seconds", above=0, most=86_400)


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
          RuntimeError: if the pool is closed, or a worker cannot be started.
        """
        answer = answers.final_answer(response, where=self._cfg.where)
        if answer is None:
            return "no_answer"
        equal = answers.exactly_equal(answer, truth)
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

    def compare(self, answer: str, truth: str, seconds: float) -> bool | None:
        """The worker's answer, or None if it was late, died or ran out of memory."""
        pipe = self._pipe or self._start()
        try:
            pipe.send((answer, truth))
            if pipe.poll(seconds):
                return pipe.recv()
        except (EOFError, OSError):
            pass
        except BaseException:
            self.stop()  # interrupted: a reply that is still to come must not meet the next item
            raise
        self.stop()
        return None

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), name="grader", daemon=True)
        self._process, self._pipe = process, pipe
        try:
            process.start()
            theirs.close()
            if pipe.poll(_START_SECONDS):
                pipe.recv()
                return pipe
        except BaseException as error:
            self.stop()
            if not isinstance(error, EOFError | OSError):
                raise
        self.stop()
        raise RuntimeError(
            "Grader: a worker process did not start. Its message is on standard error; a script "
            'needs `if __name__ == "__main__"` around its work.'
        )

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
    with contextlib.suppress(ImportError):
        import resource  # not on every system

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, hard))
    answers.symbolically_equal("x", "x")  # imports what the first item should not wait for
    pipe.send("ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            answer, truth = pipe.recv()
            try:
                reply = answers.symbolically_equal(answer, truth)
            except MemoryError:
                reply = None
            except Exception:  # the reader's ways to fail on a strange text are many
                reply = False
            pipe.send(reply)
