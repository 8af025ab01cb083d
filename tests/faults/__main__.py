"""`make faults`: kills, hostile texts and damaged checkpoints; one line of JSON with the counts.

Two processes run at the same time. Progress is printed to standard error. The exit status is 1 if
finished work was lost or a fault was silent. The folder is then kept, and its path is printed.
"""

import argparse
import concurrent.futures
import contextlib
import json
import multiprocessing
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import damages, kills, scene, texts
from faults.findings import Finding

WORKERS = 2
SHARE = 20_000
"""Number of texts of one job of a worker."""
VERBS = ("sft", "pgrpo")
MAX_PRINTED = 100
"""Maximum number of findings that are printed. All are counted."""

# The function of a job is not in this file, because the processes of the pool do not import it.
Job = tuple[str, Callable[..., tuple[Counter[str], list[Finding]]], tuple[Any, ...]]
"""The part of the report to which it belongs, a function and its arguments."""


def main() -> int:
    """Runs all parts; returns the exit status."""
    args = _arguments()
    began, folder = time.monotonic(), Path(tempfile.mkdtemp(prefix="faults_"))
    print(f"faults: seed {args.seed}, in {folder}", file=sys.stderr)
    counts: dict[str, Counter[str]] = {}
    findings: list[Finding] = []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(WORKERS, context) as pool:
        waiting = {pool.submit(work, *words): part for part, work, words in _jobs(args, folder)}
        for done in concurrent.futures.as_completed(waiting):
            part = waiting[done]
            try:
                counted, found = done.result()
            except Exception:  # the process died, or the fault run itself is wrong
                traceback.print_exc()
                counted, found = Counter(), [Finding("silent", traceback.format_exc(), part)]
            counts.setdefault(part, Counter()).update(counted)
            findings += found
            done_so_far = {name: count[name.partition("_")[0]] for name, count in counts.items()}
            seconds, number = time.monotonic() - began, len(findings)
            print(f"faults: {seconds:.0f} s, {done_so_far}, {number} findings", file=sys.stderr)
    return _report(args.seed, counts, findings, folder, time.monotonic() - began)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of each of tw sft and tw pgrpo")
    parser.add_argument("--texts", default="1000000", help="number of texts, or FIRST:STOP")
    parser.add_argument("--damages", type=int, default=200, help="damaged checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _jobs(args: argparse.Namespace, folder: Path) -> list[Job]:
    """All jobs, the longest first."""
    jobs: list[Job] = []
    if args.kills or args.damages:
        with contextlib.redirect_stdout(sys.stderr):
            made = scene.make(folder)
        for verb in reversed(VERBS):
            if args.kills:
                jobs.append((f"kills_{verb}", kills.campaign, (made, verb, args.kills, args.seed)))
        for number, verb in enumerate(VERBS):
            count = (args.damages + number) // len(VERBS)
            jobs.append(("damages", damages.damage, (made, verb, count, args.seed)))
    first, _, stop = args.texts.rpartition(":")
    for start in range(int(first or 0), int(stop), SHARE):
        words = (args.seed, start, min(start + SHARE, int(stop)), folder)
        jobs.append(("texts", texts.judge_share, words))
    return jobs


def _report(
    seed: int,
    counts: dict[str, Counter[str]],
    findings: list[Finding],
    folder: Path,
    seconds: float,
) -> int:
    for finding in findings[:MAX_PRINTED]:
        print(f"faults: {finding.kind}: {finding.what}\n  {finding.where}", file=sys.stderr)
    kinds = Counter(finding.kind for finding in findings)
    line = {"seed": seed, "seconds": round(seconds), "lost": kinds["lost"]}
    line |= {"silent": kinds["silent"]}
    print(json.dumps(line | {part: dict(sorted(counts[part].items())) for part in sorted(counts)}))
    if findings:
        print(f"faults: {folder} is kept.", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
