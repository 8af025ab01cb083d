"""The worst error of each row of the table of tolerances, in four settings of the compiler.

`make tolerances` runs the whole suite once in each setting and writes the worst errors into the
table, tests/conftest.py. It ends with status 1 if a test failed or a bound leaves too little room.
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

from repo.sources import ROOT

SETTINGS = {
    "default": "",
    "AVX2": "--xla_cpu_max_isa=AVX2",
    "SSE4_2": "--xla_cpu_max_isa=SSE4_2",
    "one thread": "--xla_cpu_multi_thread_eigen=false",
}
"""Columns of the table, and their XLA_FLAGS."""

ROOM = 3
"""A bound is at least this many times the worst error that was seen."""

TABLE = ROOT / "tests" / "conftest.py"
ROW = re.compile(r'^    "(\w+)": Row\(([^,]+), [^)]*\),', re.MULTILINE)
WORKERS = ("-n", "2", "--dist", "loadfile", "--no-loadscope-reorder")


def worst_in(flags: str, words: list[str]) -> tuple[dict[str, tuple[float, str]], bool]:
    """Runs the suite in one setting.

    Args:
      flags: XLA_FLAGS.
      words: more words for pytest, such as files.

    Returns:
      Row -> the worst error and the test that saw it; and whether all tests passed.
    """
    found: dict[str, tuple[float, str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        here = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        command = [sys.executable, "-m", "pytest", "-q", *WORKERS, f"--worst={folder}", *words]
        done = subprocess.run(command, env=here, cwd=ROOT, check=False)
        for file in pathlib.Path(folder).iterdir():
            for row, (error, test) in json.loads(file.read_text(encoding="utf-8")).items():
                found[row] = max(found.get(row, (-1.0, "")), (error, test))
    return found, done.returncode == 0


def written(text: str, worst: dict[str, list[float]]) -> str:
    """The text of the table with these errors, a list for each row in the order of `SETTINGS`."""

    def row(match: re.Match[str]) -> str:
        errors = worst.get(match[1])
        if errors is None:
            return match[0]
        numbers = ", ".join(f"{error:.1e}" if error else "0" for error in errors)
        return f'    "{match[1]}": Row({match[2]}, {numbers}),'

    return ROW.sub(row, text)


def main(words: list[str]) -> int:
    """Measures, prints, writes; the exit status."""
    columns, failed = {}, []
    for name, flags in SETTINGS.items():
        columns[name], passed = worst_in(flags, words)
        failed += [name] * (not passed)
    rows = sorted(set().union(*columns.values()))
    text = TABLE.read_text(encoding="utf-8")
    bounds = {name: float(bound) for name, bound in ROW.findall(text)}
    worst, short = {}, []
    for row in rows:
        seen = [column.get(row, (0.0, "")) for column in columns.values()]
        worst[row] = [error for error, _ in seen]
        most, test = max(seen)
        numbers = " ".join(f"{error:.1e}" for error in worst[row])
        sys.stdout.write(f"{row:20} {numbers} of {bounds[row]:.0e} {test}\n")
        short += [row] * (not ROOM * most <= bounds[row])
    TABLE.write_text(written(text, worst), encoding="utf-8")
    if short:
        sys.stdout.write(
            f"{', '.join(short)}: the bound is less than {ROOM} times the worst error.\n"
        )
    if failed:
        sys.stdout.write(f"Tests failed in: {', '.join(failed)}.\n")
    return int(bool(short or failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["tests"]))
