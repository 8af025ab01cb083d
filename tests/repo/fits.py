"""Writes docs/fits.md, what fits where, from what `experiments/aot/run.sh` kept of `tw aot`."""

import json
import math
import pathlib
import re
from collections.abc import Sequence

from repo.sources import ROOT

from tw_jax import config
from tw_jax.programs.aot import HBM, Aot, PgrpoStep, Sampling, SftStep

RESULTS = ROOT / "experiments" / "aot" / "results"
HEAD = """# What fits where

Each config of `configs/aot/` is a model, a program and a pod. `experiments/aot/run.sh` compiles
them with `tw aot`, which needs libtpu and no TPU; this table is written by `make docs` from what it
kept. Memory is that of one chip: the peak of the program, and what the chip has. Rows are those
over all chips; a row of a sampler is a rollout, and its tokens are the slots of its cache. What a
sampler needs beside its cache is set against the cache. What does not fit is refused by the
compiler, with the bytes.

"""
COLUMNS = (
    "config",
    "model",
    "program",
    "topology",
    "chips",
    "rows x tokens",
    "fits",
    "peak, GiB",
    "temporaries / cache",
    "compiled in, s",
)
WORK = {SftStep: "SFT step", PgrpoStep: "P-GRPO step"}
INCLUDED = re.compile(r"^include '(\.\./models/\w+\.gin)'$", re.MULTILINE)


def fits() -> str:
    """docs/fits.md."""
    lines = [_line(path) for path in sorted((ROOT / "configs" / "aot").glob("*.gin"))]
    return HEAD + "".join(map(_row, [COLUMNS, ["---"] * len(COLUMNS), *lines]))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _line(path: pathlib.Path) -> list[str]:
    cfg = config.load_config(Aot, [path])
    how = cfg.program
    if isinstance(how, Sampling):
        work, rows, tokens = how.part, how.sampler.rows, how.slots
    else:
        work, rows, tokens = WORK[type(how)], how.batch_rows, how.row_tokens
    generation, _, sides = cfg.topology.partition(":")
    cells = [f"`{path.stem}`", _model(path), work, cfg.topology]
    cells += [str(math.prod(map(int, sides.split("x")))), f"{rows:,} x {tokens:,}"]
    return [*cells, *_found(path.stem, HBM[generation])]


def _model(path: pathlib.Path) -> str:
    """The name in the first line of the model's fragment, `# NAME: ...`, less its owner."""
    fragment = path.parent / INCLUDED.search(path.read_text(encoding="utf-8"))[1]
    name = fragment.read_text(encoding="utf-8").removeprefix("# ").partition(":")[0]
    return name.rpartition("/")[2]


def _found(name: str, hbm: int) -> list[str]:
    """Whether it fits, its peak, temporaries by the cache, and seconds of the compiler."""
    kept = RESULTS / f"{name}.json"
    if not kept.exists():
        return ["not compiled yet", "", "", ""]
    found = json.loads(kept.read_text(encoding="utf-8"))
    seconds = f"{found['compile_seconds']:.0f}"
    if not found["ok"]:
        return [f"no: {reason(found['error'])}", "", "", seconds]
    peak = f"{found['peak_bytes_per_chip'] / 2**30:.1f} of {hbm / 2**30:.0f}"
    beside = f"{found['temp_over_kv']:.3f}" if "temp_over_kv" in found else ""
    return ["yes", peak, beside, seconds]


def reason(error: str) -> str:
    """The sentence of a compiler's error that counts bytes, or its first one."""
    sentences = [part.strip(" .") for part in re.split(r"(?<=[.:])\s+", error)]
    return next((part for part in sentences if re.search(r"\d[GM]i?B?\b", part)), sentences[0])
