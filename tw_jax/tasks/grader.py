"""Grading under a time limit: quick verdicts in this process, slow ones in worker processes.

A symbolic comparison may never end or may use all memory. A Python thread cannot be stopped, but a
process can. Each worker is a new process with a memory limit. A worker that exceeds the time limit,
dies or does not start is killed and replaced. Its response counts as a "timeout" and not as a wrong
answer. A worker ends when its parent ends. The first worker starts when `Task.grade_at_once` first
returns None, so mode "number" of `Grader` starts no worker.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, get_args

from tw_jax.bounds import require
from tw_jax.config import configurable
from tw_jax.tasks import answers, mathematics
from tw_jax.tasks.task import Problem, Task, Verdict

_VERDICTS = get_args(Verdict)
START_SECONDS = 120.0
_MEMORY_BYTES = 4 * 2**30
_MAX_FAILED_STARTS = 3
PAUSE_SECONDS = 600.0
"""Pause after `_MAX_FAILED_STARTS` failed starts of a worker in a row."""
_GRACE_SECONDS = 1.0
"""A worker ends itself this long after the deadline at which its parent should have killed it."""


@configurable
class Grader(Task):
    """Rules of equality, and limits of symbolic comparisons.

    Attributes:
      mode: "number" accepts only one number in a listed notation. Use it for arithmetic tasks and
        their rewards. "mathematics" also accepts exact expressions, sets, equations and words.
        docs/answers.md has the rules.
      workers: Number of worker processes. Each runs one symbolic comparison at a time.
      item_seconds: Deadline of one symbolic comparison, in seconds.
      where: "after_thinking" takes only an answer after `</think>`, "anywhere" also one before.
    """

    mode: answers.Mode
    workers: int = 2
    item_seconds: float = 5.0
    where: answers.Where = "after_thinking"

    def check(self) -> None:
        """Refuses values that are out of bounds."""
        require(self, "workers", least=1)
        require(self, "item_seconds", above=0, most=86_400)

    def check_problem(self, problem: Problem) -> None:
        """Refuses an answer that is empty, or that is not a number in mode "number"."""
        answers.check_truth(problem.answer, self.mode)

    def grade_at_once(self, problem: Problem, text: str) -> Verdict | None:
        """Returns the verdict, or None if it needs symbolic work."""
        answer = answers.final_answer(text, where=self.where)
        if answer is None:
            return "no_answer"
        equal = answers.exactly_equal(answer, problem.answer, self.mode)
        return None if equal is None else _verdict(equal)

    def grade(self, problem: Problem, text: str) -> Verdict:
        """Returns the verdict after symbolic work, which may take any time and memory."""
        at_once = self.grade_at_once(problem, text)
        if at_once is not None:
            return at_once
        answer = answers.final_answer(text, where=self.where) or ""
        try:
            return _verdict(mathematics.equal(answer, problem.answer))
        except MemoryError:
            raise
        except Exception:  # sympy fails in many ways on unusual text
            return "wrong"

    def warm_up(self) -> None:
        """Imports sympy, which takes seconds."""
        mathematics.equal("x+1", "1+x")


def grade(
    text: str,
    answer: str,
    *,
    mode: answers.Mode = "mathematics",
    where: answers.Where = "after_thinking",
) -> Verdict:
    r"""Grades one response, in this process.

    Symbolic comparisons have no limit of time or memory here. Use `GraderPool`, which has both
    limits, for responses that nobody has read.

    Args:
      text: The response without the prompt. Its last ``\boxed{}`` is the answer.
      answer: The correct answer, for example ``408`` or ``\frac{1}{2}``.
      mode: "number" accepts only a number in a listed notation. "mathematics" also accepts exact
        expressions, sets, equations and words. docs/answers.md has the rules.
      where: "after_thinking" takes only an answer after `</think>`, "anywhere" also one before.

    Returns:
      "correct", "wrong" or "no_answer".

    Raises:
      ValueError: If `answer` is empty, or if it is not a number in mode "number".
    """
    task, problem = Grader(mode=mode, where=where), Problem(id="", question="", answer=answer)
    task.check_problem(problem)
    return task.grade(problem, text)


class GraderPool:
    """A pool of graders that any thread can use, and a context manager that closes it.

    Workers are spawned and not forked, because JAX runs threads in the parent. A program that is
    run as a script therefore needs the usual `if __name__ == "__main__"`.
    """

    def __init__(self, task: Task):
        """Opens the pool without starting a process."""
        self.task = task
        self._closed = threading.Event()
        # Last in, first out: a worker that has started already is taken first.
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()
        for _ in range(task.workers):
            self._free.put(_Worker(task))

    def __enter__(self) -> GraderPool:
        """Returns the pool itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the pool."""
        self.close()

    def grade(self, problem: Problem, text: str) -> Verdict:
        """Grades one response. Waits for a free worker if the task needs one.

        Args:
          problem: The problem.
          text: The model's text without the prompt.

        Raises:
          RuntimeError: If the pool is closed, or if `Task.grade` raised an error.
          ValueError: If no response to the problem could be correct.
        """
        verdict = self.task.grade_at_once(problem, text)
        return self._in_worker(problem, text) if verdict is None else verdict

    def grade_all(self, items: Iterable[tuple[Problem, str]]) -> list[Verdict]:
        """Grades (problem, response) pairs in parallel. Verdicts are in the order of the items."""
        with ThreadPoolExecutor(self.task.workers) as threads:
            return list(threads.map(lambda item: self.grade(*item), items))

    def close(self) -> None:
        """Waits for running comparisons, at most until their deadline, and ends the workers."""
        if self._closed.is_set():
            return
        self._closed.set()
        workers = [self._free.get() for _ in range(self.task.workers)]
        for worker in workers:
            worker.stop()
            self._free.put(worker)  # so that a waiting caller finds the pool closed

    def _in_worker(self, problem: Problem, text: str) -> Verdict:
        worker = self._free.get()
        try:
            if self._closed.is_set():
                raise RuntimeError("GraderPool is closed. Grade before the end of its `with`.")
            reply = worker.grade(problem, text)
        finally:
            self._free.put(worker)
        if reply in _VERDICTS:
            return reply
        raise RuntimeError(
            f"{type(self.task).__name__}.grade failed on a response to the problem "
            f"{problem.id!r}. It must return one of {', '.join(_VERDICTS)} for every text.\n{reply}"
        )


class _Worker:
    """One process. It starts on first use, starts again after a loss, and serves one caller."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._process: BaseProcess | None = None
        self._pipe: Connection | None = None
        self._failed_starts = 0
        self._paused_until = 0.0

    def grade(self, problem: Problem, text: str) -> Any:
        """Returns the worker's reply, or "timeout" if it was late, died or did not start."""
        pipe = self._pipe or self._start()
        if pipe is None:
            return "timeout"
        try:
            pipe.send((problem, text))
            if pipe.poll(self._task.item_seconds):
                return pipe.recv()
        except (EOFError, OSError):
            pass
        except BaseException:
            self.stop()  # interrupted: the next item must not receive the reply that is still due
            raise
        self.stop()
        return "timeout"

    def _start(self) -> Connection | None:
        """Returns the pipe to a new process. If it does not start, warns and returns None."""
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
        next_start = "The next such answer starts another one."
        if self._failed_starts >= _MAX_FAILED_STARTS:
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            next_start = (
                f"There were {self._failed_starts} of them in a row, so for "
                f"{PAUSE_SECONDS / 60:g} minutes none is started and answers that need one are "
                "counted as timeouts."
            )
        warnings.warn(
            f"Grader: a worker process {reason}; its answer is counted as a timeout. {next_start} "
            "The message of the process is on standard error. A script needs "
            '`if __name__ == "__main__"` around its work.',
            stacklevel=2,
        )
        return None

    def _spawn(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        self._pipe = pipe
        process = context.Process(
            target=_serve, args=(theirs, self._task), name="grader", daemon=True
        )
        self._process = process
        try:
            process.start()
        finally:
            theirs.close()
        return pipe

    def stop(self) -> None:
        """Kills the process if there is one."""
        process, pipe, self._process, self._pipe = self._process, self._pipe, None, None
        if pipe is not None:
            pipe.close()
        if process is not None and process.pid is not None:
            process.kill()
            process.join()


def _verdict(equal: bool) -> Verdict:
    return "correct" if equal else "wrong"


def _serve(pipe: Connection, task: Task) -> None:
    """Runs in the worker: reports that it is ready, and grades until the pipe is closed.

    A reply is a verdict, or a text that describes the error of the task.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(ImportError):
        import resource  # not on every system

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, hard))
    task.warm_up()
    pipe.send("ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            problem, text = pipe.recv()
            _end_after(task.item_seconds + _GRACE_SECONDS)
            try:
                reply = task.grade(problem, text)
                if reply not in _VERDICTS:
                    reply = f"It returned {reply!r:.80}."
            except MemoryError:
                reply = "timeout"
            except Exception:
                reply = traceback.format_exc()
            _end_after(0)
            pipe.send(reply)


def _end_with_parent() -> None:
    """Ends this process when the parent ends, even if the parent is killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _end_after(seconds: float) -> None:
    """Makes the system end this process after this time; 0 cancels that.

    A thread cannot do it, because one operation on huge numbers holds Python's lock. The default
    action of the alarm ends the process without running Python.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, seconds)
