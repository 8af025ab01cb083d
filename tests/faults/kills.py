"""Kills a run at random moments, resumes it, and compares it with an uninterrupted run.

A run is killed and resumed until it is finished, and then a run in the next folder begins. After
every kill the folder is checked: finished work must exist and must equal that of the uninterrupted
run.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from faults.findings import Finding
from faults.runner import (
    Watch,
    assert_same,
    kill_all,
    listed,
    log_tail,
    members,
    phases,
    rollouts,
    survivors,
)
from faults.scene import Scene

from tw_jax.programs.pgrpo import Pgrpo
from tw_jax.programs.sft import Sft

ROOTS = {"sft": Sft, "pgrpo": Pgrpo}
START_SHARE = 0.3
"""Share of the kills before the process has changed its folder."""
SPREAD_SECONDS = {"sft": 0.8, "pgrpo": 1.6}
"""The other kills come within this time after the first change of the folder."""
ORPHAN_SECONDS = 5.0
"""The children of a process must end within this time after it."""
LONGEST_SECONDS = 300.0
"""A process that neither ends nor changes its folder within this time hangs."""
MAX_FINDINGS = 20
"""A campaign with more findings stops, because its processes may fail before they are killed."""


class Ledger:
    """The finished work of a run at the last check, and that of the uninterrupted run."""

    def __init__(self, folder: Path, whole: Path) -> None:
        """`whole` is the folder of the uninterrupted run."""
        self._folder = folder
        self._lines, self._batches = lines(whole), rollouts(whole)
        self._newest = 0
        self._part: tuple[str, list[bytes]] = ("", [])

    def look(self) -> list[str]:
        """Checks the folder between two processes; returns a message for each loss."""
        lost = []
        have, newest = lines(self._folder), newest_of(self._folder)
        if newest < self._newest:
            lost.append(f"checkpoint {self._newest} is gone, {newest} is the newest")
        if len(have) < newest:
            lost.append(f"{len(have)} lines of metrics beside checkpoint {newest}")
        if have != self._lines[: len(have)]:
            lost.append("a line of metrics is not that of the uninterrupted run")
        batches = rollouts(self._folder)
        for name, data in batches.items():
            if not name.startswith(".") and data != self._batches.get(name):
                lost.append(f"rollouts/{name} is not that of the uninterrupted run")
        name = f".{newest:06}.jsonl"
        part = batches.get(name, b"").split(b"\n")[:-1]
        before, old = self._part
        if before == name and name[1:] not in batches and part[: len(old)] != old:
            lost.append(f"rollouts/{name} had {len(old)} rollouts, which were drawn again")
        self._newest, self._part = newest, (name, part)
        return lost

    def count(self) -> tuple[int, int]:
        """The number of lines of metrics, and the newest checkpoint."""
        return len(lines(self._folder)), newest_of(self._folder)


def lines(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of metrics, without times."""
    file = folder / "metrics.jsonl"
    whole = file.read_text(encoding="utf-8").split("\n")[:-1] if file.exists() else []
    return [{n: v for n, v in json.loads(line).items() if "second" not in n} for line in whole]


def newest_of(folder: Path) -> int:
    """The newest complete checkpoint; 0 if there is none."""
    names = [file.name for file in listed(folder / "checkpoints")]
    return max((int(name) for name in names if name.isdigit()), default=0)


class Campaign:
    """The kills of one verb."""

    def __init__(self, scene: Scene, verb: str, seed: int, tell: Callable[[str], None]) -> None:
        """`tell` receives lines about the progress."""
        self._scene, self._verb, self._tell = scene, verb, tell
        self._runner = scene.runners[verb]
        self._rng = np.random.default_rng([seed, len(verb)])
        self._start_seconds = 4.0
        self.counts: Counter[str] = Counter()
        self.findings: list[Finding] = []

    def run(self, kills: int) -> None:
        """Kills runs, then finishes every run that was begun and compares its folder."""
        while self.counts["kills"] < kills and len(self.findings) < MAX_FINDINGS:
            folder = self._scene.folder / f"{self._verb}_{self.counts['runs']}"
            ledger = Ledger(folder, self._scene.whole(self._verb))
            found = len(self.findings)
            is_over = False
            while not is_over and len(self.findings) == found:
                is_over = self._life(folder, ledger, is_last=self.counts["kills"] >= kills)
                self._lost(folder, ledger.look())
            if is_over and len(self.findings) == found:
                self._compare(folder)
            self.counts["runs"] += 1
            self._tell(f"{self._verb}: {dict(self.counts)}")

    def _life(self, folder: Path, ledger: Ledger, *, is_last: bool) -> bool:
        """One process from its start to its end; returns whether the run is finished."""
        watch = Watch(folder)
        process = self._runner.start(folder)
        try:
            if not is_last and self._await(process, watch, folder):
                self._kill(process, folder, ledger, watch)
                return False
            code = process.wait(timeout=LONGEST_SECONDS)
            if code:
                self._silent(folder, f"exit status {code}: {log_tail(folder)[-500:]}")
            return code == 0
        except subprocess.TimeoutExpired:
            self._silent(folder, f"nothing ended in {LONGEST_SECONDS} seconds")
            return False
        finally:
            if left := survivors(process, ORPHAN_SECONDS):
                self._silent(folder, f"{ORPHAN_SECONDS} seconds after their parent lived {left}")
                self.counts["orphans"] += len(left)
            kill_all(process)

    def _await(self, process: subprocess.Popen, watch: Watch, folder: Path) -> bool:
        """Waits for a random moment; False if the process ended before it."""
        began = time.monotonic()
        if self._rng.random() < START_SHARE:
            until = began + self._rng.uniform(0, self._start_seconds)
        else:
            until = began + LONGEST_SECONDS
            while process.poll() is None and not watch.new() and time.monotonic() < until:
                time.sleep(0.01)
            seconds = time.monotonic() - began
            if seconds >= LONGEST_SECONDS:
                self._silent(folder, f"nothing was done in {LONGEST_SECONDS} seconds")
            self._start_seconds += (seconds - self._start_seconds) / 4
            until = began + seconds + self._rng.uniform(0, SPREAD_SECONDS[self._verb])
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=max(until - time.monotonic(), 0))
        return process.returncode is None

    def _kill(self, process: subprocess.Popen, folder: Path, ledger: Ledger, watch: Watch) -> None:
        """Kills the process alone, or with its children, or asks it to stop, at random."""
        kind = self._rng.choice(["alone", "all", "sigterm"], p=[0.65, 0.2, 0.15])
        self.counts["with_grader"] += any("spawn_main" in one for one in members(process.pid))
        if kind == "alone":
            process.kill()
        elif kind == "all":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.terminate()
        code = process.wait(timeout=LONGEST_SECONDS)
        self.counts["kills"] += 1
        self.counts[f"kills_{kind}"] += 1
        self.counts[f"in_{_phase({phase for phase, _ in phases(watch.new())})}"] += 1
        if kind != "sigterm":
            return
        is_graceful = code == 128 + signal.SIGINT
        self.counts["stopped_gracefully"] += is_graceful
        if is_graceful and len(set(ledger.count())) > 1:
            self._lost(folder, [f"{ledger.count()} lines and checkpoint after a graceful stop"])
        if code not in (0, -signal.SIGTERM, 128 + signal.SIGINT):
            self._silent(folder, f"exit status {code} after SIGTERM: {log_tail(folder)[-500:]}")

    def _compare(self, folder: Path) -> None:
        whole = self._scene.whole(self._verb)
        try:
            assert lines(folder) == lines(whole), "the lines of metrics differ"
            assert rollouts(folder) == rollouts(whole), "the rollouts differ"
            kind, config = ROOTS[self._verb], self._runner.config
            assert_same(kind, config, whole, folder, sets=self._runner.sets)
        except AssertionError as error:
            self._lost(folder, [str(error)[:500]])

    def _lost(self, folder: Path, lost: list[str]) -> None:
        self.findings += [Finding("lost", what, str(folder)) for what in lost]

    def _silent(self, folder: Path, what: str) -> None:
        self.findings.append(Finding("silent", what, str(folder)))


def _phase(found: set[str]) -> str:
    """The phase that a kill interrupted: the latest one that was begun."""
    order = ("saving", "sampling", "training", "saved", "line")
    return next((phase for phase in order if phase in found), "start")


def campaign(scene: Scene, verb: str, kills: int, seed: int) -> tuple[Counter[str], list[Finding]]:
    """Kills runs of a verb; returns the counts and the findings."""
    one = Campaign(scene, verb, seed, lambda line: print(f"faults: {line}", file=sys.stderr))
    try:
        one.run(kills)
    except Exception:
        traceback.print_exc()
        one.findings.append(Finding("silent", traceback.format_exc()[-500:], str(scene.folder)))
    return one.counts, one.findings
