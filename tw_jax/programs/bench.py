"""`tw bench`: times tries, attention, train steps and the sampler, each beside a baseline.

A bar is a value that is expected on two idle CPU cores. A missed bar is printed but is not an
error, because machines differ. The sizes are in `data/workloads.py`, the runs in `benchmarks/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from tw_jax import benchmarks
from tw_jax.benchmarks.measure import BenchmarkReport
from tw_jax.data import workloads

CASES = {
    "trie": workloads.TRIE,
    "attention": workloads.ATTENTION,
    "step": workloads.STEP,
    "rows": workloads.ROWS,
    "sampler": workloads.SAMPLER,
    "parity": workloads.PARITY,
}
"""Cases by name; a benchmark is a module of `benchmarks` with `run(case) -> BenchmarkReport`."""


def main(argv: Sequence[str]) -> int:
    """Runs one benchmark and prints its table; with `--json`, one object on the last line.

    Raises:
      ValueError: If no benchmark has this name.
    """
    parser = argparse.ArgumentParser(prog="tw bench", description=__doc__)
    parser.add_argument("name", metavar="NAME", help=f"one of {', '.join(CASES)}")
    parser.add_argument("--json", action="store_true", help="a JSON object on the last line too")
    args = parser.parse_args(argv)
    if args.name not in CASES:
        raise ValueError(f"{args.name!r} is not a benchmark. Choose one of {', '.join(CASES)}.")
    # Only this benchmark is imported, because another one needs PyTorch.
    benchmark = importlib.import_module(f"{benchmarks.__name__}.{args.name}")
    report, where = benchmark.run(CASES[args.name]), _environment()
    print(f"tw bench {args.name}: {where['device']}, jax {where['versions']['jax']}")
    print(_table(report))
    if args.json:
        result = {
            "bench": args.name,
            **report.values,
            "times": {name: dataclasses.asdict(times) for name, times in report.times.items()},
            "bars": {
                name: {kind: bar, "met": report.meets(name)}
                for name, (kind, bar) in report.bars.items()
            },
            **where,
        }
        print(json.dumps(result))
    return 0


def _table(report: BenchmarkReport) -> str:
    lines = [f"\n{'milliseconds':32}{'fastest':>12}{'median':>12}"]
    for name, times in report.times.items():
        lines.append(f"  {name:30}{times.fastest_ms:12.2f}{times.median_ms:12.2f}")
    lines.append(f"\n{'':32}{'value':>12}  bar")
    for name, value in report.values.items():
        bar = ""
        if name in report.bars:
            kind, limit = report.bars[name]
            bar = f"at {kind} {limit:g}: {'met' if report.meets(name) else 'MISSED'}"
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
        lines.append(f"  {name:30}{shown:>12}  {bar}".rstrip())
    return "\n".join(lines)


def _environment() -> dict[str, Any]:
    """Device, versions and commit."""
    device = jax.devices()[0]
    cores = f", {os.cpu_count()} cores" if device.platform == "cpu" else ""
    libraries = ("jax", "jaxlib", "numpy")
    return {
        "device": f"{device.device_kind} x{jax.device_count()}{cores}",
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in libraries},
        },
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The commit of this checkout, followed by "+" if files differ; None outside a checkout."""
    package = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(package), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        # An installed package may be inside the checkout of another project.
        if Path(git("rev-parse", "--show-toplevel")) != package.parent:
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None
