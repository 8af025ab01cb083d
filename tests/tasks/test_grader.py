"""The grader: never hangs, counts time-outs apart, works from threads, closes cleanly."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import pytest
from words import Words

from tw_jax.tasks import grader
from tw_jax.tasks.grader import Grader, GraderPool, grade
from tw_jax.tasks.task import Problem, check_problems

# An exponent that passes for small, and a power that would take minutes and gigabytes.
HANGS = r"3^{13!}"
SYMBOLIC = ("(x+1)^2", "x^2+2x+1")


def problem(answer):
    return Problem(id="p", question="", answer=answer)


def items(*pairs):
    """(problem, response) of each (response, right answer)."""
    return [(problem(truth), text) for text, truth in pairs]


def boxed(answer):
    return f"<think>\n</think>\n\nIt is \\boxed{{{answer}}}."


def test_exact_answers_start_no_process():
    with GraderPool(Grader(mode="mathematics", workers=1)) as pool:
        before = set(multiprocessing.active_children())
        verdicts = pool.grade_all(
            items(
                (boxed("1,000"), "1000"),
                (boxed("1001"), "1000"),
                (boxed("0.5"), r"\frac{1}{2}"),
                (boxed("123456789012345679"), "123456789012345678"),
                ("no box</think>", "1"),
                (r"\boxed{1}", "1"),
            )
        )
        assert set(multiprocessing.active_children()) == before
    assert verdicts == ["correct", "wrong", "correct", "wrong", "no_answer", "no_answer"]


def test_mode_number_never_starts_a_process(monkeypatch):
    monkeypatch.setattr(grader._Worker, "_spawn", lambda self: pytest.fail("a process started"))
    with GraderPool(Grader(mode="number", workers=1)) as pool:
        for answer in ("(x+1)^2", "416*607", r"\frac{\sqrt 2}{2}", HANGS, "2^{10}"):
            assert pool.grade(problem("252512"), boxed(answer)) == "wrong"


def test_problems_whose_truth_is_no_number_are_refused_before_grading():
    asked = [Problem("a", "", "7 3/4"), Problem("b", "", "x")]
    with pytest.raises(ValueError, match="Problem 'b': The truth 'x' is not a number"):
        check_problems(Grader(mode="number"), asked)
    check_problems(Grader(mode="mathematics"), asked)
    for mode in ("number", "mathematics"):
        with pytest.raises(ValueError, match="Problem 'p': The truth is empty"):
            check_problems(Grader(mode=mode), [problem(" ")])


def test_the_place_of_an_answer_follows_the_config():
    with GraderPool(Grader(mode="number", where="anywhere")) as pool:
        assert pool.grade(problem("1"), r"\boxed{1}") == "correct"


def test_a_hanging_comparison_is_a_timeout_and_the_next_item_is_graded():
    jax.devices()  # a parent with running backends, which a forked worker would inherit
    with GraderPool(Grader(mode="mathematics", workers=1, item_seconds=3.0)) as pool:
        assert pool.grade(problem(SYMBOLIC[1]), boxed(SYMBOLIC[0])) == "correct"
        start = time.monotonic()
        assert pool.grade(problem("7"), boxed(HANGS)) == "timeout"
        assert time.monotonic() - start < 10.0
        assert pool.grade(problem("x^2+1"), boxed("(x+1)^2")) == "wrong"
        assert pool.grade(problem("x"), boxed(r"\frac{")) == "no_answer"
        assert pool.grade(problem("x"), boxed(r"\sin(")) == "wrong"
        workers = [p for p in multiprocessing.active_children() if p.name == "grader"]
        assert len(workers) == 1
    assert not any(p.name == "grader" for p in multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="GraderPool is closed"):
        pool.grade(problem(SYMBOLIC[1]), boxed(SYMBOLIC[0]))
    pool.close()


def test_threads_share_the_workers_and_keep_their_own_verdicts():
    given = items(*((boxed(f"(x+{n})^2"), f"x^2+{2 * n}x+{n * n + (n % 2)}") for n in range(2, 8)))
    want = ["wrong" if n % 2 else "correct" for n in range(2, 8)]
    with GraderPool(Grader(mode="mathematics", workers=1, item_seconds=30.0)) as pool:
        results = {}
        threads = [
            threading.Thread(target=lambda i=i: results.__setitem__(i, pool.grade_all(given)))
            for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert results == dict.fromkeys(range(3), want)


def test_a_worker_that_dies_is_replaced():
    with GraderPool(Grader(mode="mathematics", workers=1, item_seconds=30.0)) as pool:
        assert pool.grade(problem(SYMBOLIC[1]), boxed(SYMBOLIC[0])) == "correct"
        (worker,) = [p for p in multiprocessing.active_children() if p.name == "grader"]
        worker.kill()
        worker.join()
        assert pool.grade(problem(SYMBOLIC[1]), boxed(SYMBOLIC[0])) == "timeout"
        assert pool.grade(problem(SYMBOLIC[1]), boxed(SYMBOLIC[0])) == "correct"


def test_a_worker_that_does_not_start_in_time_is_a_timeout_and_is_tried_again(monkeypatch):
    spawn = grader._Worker._spawn
    monkeypatch.setattr(grader, "START_SECONDS", 0.05)
    with GraderPool(Grader(mode="mathematics", workers=1, item_seconds=30.0)) as pool:
        with pytest.warns(UserWarning, match=r"was not ready after 0.05 seconds; its answer is"):
            assert pool.grade(problem(SYMBOLIC[1]), boxed(SYMBOLIC[0])) == "timeout"
        monkeypatch.setattr(grader, "START_SECONDS", 120.0)
        assert pool.grade(problem(SYMBOLIC[1]), boxed(SYMBOLIC[0])) == "correct"
    assert grader._Worker._spawn is spawn


def test_a_worker_that_cannot_be_started_is_given_a_pause_and_no_traceback(monkeypatch):
    tries = []

    def spawn(self):
        tries.append(time.monotonic())
        raise OSError("Cannot allocate memory")

    monkeypatch.setattr(grader._Worker, "_spawn", spawn)
    with GraderPool(Grader(mode="mathematics", workers=1)) as pool:
        with pytest.warns(UserWarning, match="Cannot allocate memory") as told:
            verdicts = pool.grade_all(items((boxed(SYMBOLIC[0]), SYMBOLIC[1])) * 5)
        assert verdicts == ["timeout"] * 5
        assert len(tries) == len(told) == 3
        assert "for 10 minutes none is started" in str(told[-1].message)
        assert pool.grade(problem("7"), boxed("7")) == "correct"
        monkeypatch.setattr(grader, "PAUSE_SECONDS", 0.0)
        pool._free.queue[0]._paused_until = 0.0
        with pytest.warns(UserWarning, match="4 of them in a row"):
            assert pool.grade(problem(SYMBOLIC[1]), boxed(SYMBOLIC[0])) == "timeout"


@pytest.mark.parametrize("busy", [HANGS, "(x+1)^2"])
def test_a_worker_ends_with_its_killed_parent(tmp_path, busy):
    """Also where a giant power holds Python's lock, so that no thread of the worker can run."""
    script = tmp_path / "killed.py"
    script.write_text(
        "import multiprocessing, sys, threading, time\n"
        "from tw_jax.tasks.grader import Grader, GraderPool\n"
        "from tw_jax.tasks.task import Problem\n"
        "if __name__ == '__main__':\n"
        "    cfg = Grader(mode='mathematics', workers=1, item_seconds=2.0, where='anywhere')\n"
        "    pool = GraderPool(cfg)\n"
        "    box = chr(92) + 'boxed'\n"
        "    assert pool.grade(Problem('p', '', '1+x'), box + '{x+1}') == 'correct'\n"
        "    (worker,) = multiprocessing.active_children()\n"
        "    job = lambda: pool.grade(Problem('p', '', '7'), box + '{' + sys.argv[1] + '}')\n"
        "    threading.Thread(target=job).start()\n"
        "    time.sleep(0.5)\n"
        "    print(worker.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script), busy]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as parent:
        worker = int(parent.stdout.readline())
        assert is_alive(worker)
        parent.kill()
    end = time.monotonic() + 2.0 + grader._GRACE_SECONDS + 3.0
    while is_alive(worker) and time.monotonic() < end:
        time.sleep(0.1)
    assert not is_alive(worker)


def is_alive(process):
    """Whether a process runs; one that nobody has waited for does not."""
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from tw_jax.tasks.grader import Grader, GraderPool\n"
        "from tw_jax.tasks.task import Problem\n"
        "with GraderPool(Grader(mode='mathematics', workers=1, where='anywhere')) as pool:\n"
        "    print(pool.grade(Problem('p', '', '1+x'), chr(92) + 'boxed{x+1}'))\n"
    )
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PYTHONPATH": root},
    )
    assert (done.returncode, done.stdout) == (0, "timeout\n")
    assert 'needs `if __name__ == "__main__"`' in done.stderr


# Tasks of other modules.


def test_a_task_that_decides_nothing_at_once_is_graded_in_a_worker_by_its_extra_fields():
    asked = Problem("p", "", extra={"word": "seven"})
    with GraderPool(Words()) as pool:
        verdicts = pool.grade_all([(asked, "It is seven."), (asked, "It is 7.")])
        assert verdicts == ["correct", "wrong"]
        assert {p.name for p in multiprocessing.active_children()} >= {"grader"}


def test_a_task_that_hangs_is_a_timeout_and_its_worker_is_killed():
    asked = Problem("p", "", extra={"word": "x"})
    with GraderPool(Words(item_seconds=0.5)) as pool:
        assert pool.grade(asked, "hang") == "timeout"
        assert pool.grade(asked, "x") == "correct"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("raise", "(?s)problem 'p'.*return one of correct, .*KeyError: 'raise'"),
        ("None", "It returned None"),
    ],
)
def test_an_error_of_a_task_stops_the_run_instead_of_counting_as_wrong(text, sentence):
    with GraderPool(Words(workers=1)) as pool:
        with pytest.raises(RuntimeError, match=sentence):
            pool.grade(Problem("p", ""), text)
        assert pool.grade(Problem("p", "", extra={"word": "a"}), "a") == "correct"


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"item_seconds": 0.0}])
def test_a_pool_that_could_not_work_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Grader(mode="number", **wrong)


@pytest.mark.parametrize(
    ("text", "answer", "how", "verdict"),
    [
        (r"</think> \boxed{0.5}", r"\frac{1}{2}", {}, "correct"),
        (r"</think> \boxed{x + 1}", "1 + x", {}, "correct"),
        (r"</think> \boxed{x + 1}", "2", {"mode": "number"}, "wrong"),
        (r"</think> \boxed{3}", "2", {"mode": "number"}, "wrong"),
        (r"\boxed{2} </think>", "2", {}, "no_answer"),
        (r"\boxed{2} </think>", "2", {"where": "anywhere"}, "correct"),
    ],
)
def test_one_answer_is_graded_without_a_process(text, answer, how, verdict):
    before = set(multiprocessing.active_children())
    assert grade(text, answer, **how) == verdict
    assert set(multiprocessing.active_children()) == before


def test_one_answer_is_not_compared_with_a_truth_that_nothing_equals():
    with pytest.raises(ValueError, match="truth 'x' is not a number"):
        grade(r"\boxed{2}", "x", mode="number")
    with pytest.raises(ValueError, match="truth is empty"):
        grade(r"\boxed{2}", " ")
