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

from tw_jax.tasks.grader import Grader, GraderPool

# Exponents that pass for small, and a power that would take minutes and gigabytes.
HANGS = r"3^{9999 \cdot 9999 \cdot 9}"
SYMBOLIC = ("(x+1)^2", "x^2+2x+1")


def boxed(answer):
    return f"<think>\n</think>\n\nIt is \\boxed{{{answer}}}."


def test_exact_answers_start_no_process():
    with GraderPool(Grader(workers=1)) as pool:
        before = set(multiprocessing.active_children())
        verdicts = pool.grade_all(
            [
                (boxed("1,000"), "1000"),
                (boxed("1001"), "1000"),
                (boxed("0.5"), r"\frac{1}{2}"),
                (boxed("123456789012345679"), "123456789012345678"),
                ("no box</think>", "1"),
                (r"\boxed{1}", "1"),
            ]
        )
        assert set(multiprocessing.active_children()) == before
    assert verdicts == ["correct", "wrong", "correct", "wrong", "no_answer", "no_answer"]


def test_the_place_of_an_answer_follows_the_config():
    with GraderPool(Grader(where="anywhere")) as pool:
        assert pool.grade(r"\boxed{1}", "1") == "correct"


def test_a_hanging_comparison_is_a_timeout_and_the_next_item_is_graded():
    jax.devices()  # a parent with running backends, which a forked worker would inherit
    with GraderPool(Grader(workers=1, item_seconds=3.0)) as pool:
        assert pool.grade(boxed(SYMBOLIC[0]), SYMBOLIC[1]) == "correct"
        start = time.monotonic()
        assert pool.grade(boxed(HANGS), "7") == "timeout"
        assert time.monotonic() - start < 10.0
        assert pool.grade(boxed("(x+1)^2"), "x^2+1") == "wrong"
        assert pool.grade(boxed(r"\frac{"), "x") == "no_answer"
        assert pool.grade(boxed(r"\sin("), "x") == "wrong"
        workers = [p for p in multiprocessing.active_children() if p.name == "grader"]
        assert len(workers) == 1
    assert not any(p.name == "grader" for p in multiprocessing.active_children())
    with pytest.raises(RuntimeError, match="GraderPool is closed"):
        pool.grade(boxed(SYMBOLIC[0]), SYMBOLIC[1])
    pool.close()


def test_threads_share_the_workers_and_keep_their_own_verdicts():
    items = [(boxed(f"(x+{n})^2"), f"x^2+{2 * n}x+{n * n + (n % 2)}") for n in range(2, 8)]
    want = ["wrong" if n % 2 else "correct" for n in range(2, 8)]
    with GraderPool(Grader(workers=1, item_seconds=30.0)) as pool:
        results = {}
        threads = [
            threading.Thread(target=lambda i=i: results.__setitem__(i, pool.grade_all(items)))
            for i in range(3)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert results == dict.fromkeys(range(3), want)


def test_a_worker_that_dies_is_replaced():
    with GraderPool(Grader(workers=1, item_seconds=30.0)) as pool:
        assert pool.grade(boxed(SYMBOLIC[0]), SYMBOLIC[1]) == "correct"
        (worker,) = [p for p in multiprocessing.active_children() if p.name == "grader"]
        worker.kill()
        worker.join()
        assert pool.grade(boxed(SYMBOLIC[0]), SYMBOLIC[1]) == "timeout"
        assert pool.grade(boxed(SYMBOLIC[0]), SYMBOLIC[1]) == "correct"


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "unguarded.py"
    script.write_text(
        "from tw_jax.tasks.grader import Grader, GraderPool\n"
        "with GraderPool(Grader(workers=1, where='anywhere')) as pool:\n"
        "    pool.grade(chr(92) + 'boxed{x+1}', '1+x')\n"
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
    assert done.returncode != 0
    assert 'needs `if __name__ == "__main__"`' in done.stderr


@pytest.mark.parametrize("wrong", [{"workers": 0}, {"item_seconds": 0.0}])
def test_a_pool_that_could_not_work_is_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        Grader(**wrong)
