"""Writes docs/fits.md from the results of `tw aot` in `experiments/aot/results`."""

import json
import math
import pathlib
import re
from collections.abc import Sequence

from repo.sources import ROOT

from tw_jax import config
from tw_jax.aot.steps import PgrpoStep, Sampling, SftStep
from tw_jax.aot.topology import hbm_bytes
from tw_jax.programs.aot import Aot

RESULTS = ROOT / "experiments" / "aot" / "results"
HEAD = """# What fits where

After reading this page you can choose a pod for a program. Each config of `configs/aot/` names a
model, a program and a pod. `experiments/aot/run.sh` compiles them with `tw aot`, which needs libtpu
but no TPU, and `make docs` writes this table from the results. The table gives the peak memory of
the program on one chip, and the memory of the chip. Rows are counted over all chips. A row of a
sampler is a rollout, and its tokens are the slots of its cache. The temporaries of a sampler are
given as a multiple of the cache. If a program does not fit, the table quotes the compiler's error.

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
STEPS = {SftStep: "SFT step", PgrpoStep: "P-GRPO step"}
INCLUDED = re.compile(r"^include '(\.\./models/\w+\.gin)'$", re.MULTILINE)


def fits() -> str:
    """docs/fits.md."""
    lines = [_line(path) for path in sorted((ROOT / "configs" / "aot").glob("*.gin"))]
    return HEAD + "".join(map(_row, [COLUMNS, ["---"] * len(COLUMNS), *lines]))


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _line(path: pathlib.Path) -> list[str]:
    cfg = config.load_config(Aot, [path])
    step = cfg.program
    if isinstance(step, Sampling):
        name, rows, tokens = step.part, step.sampler.rows, step.slots
    else:
        name, rows, tokens = STEPS[type(step)], step.batch_rows, step.row_tokens
    chips = cfg.topology.partition(":")[2].split("x")
    cells = [f"`{path.stem}`", _model(path), name, cfg.topology]
    cells += [str(math.prod(map(int, chips))), f"{rows:,} x {tokens:,}"]
    return [*cells, *_result(path.stem, hbm_bytes(cfg.topology))]


def _model(path: pathlib.Path) -> str:
    """The model of the fragment, from its first line `# OWNER/NAME: ...`, without the owner."""
    fragment = path.parent / INCLUDED.search(path.read_text(encoding="utf-8"))[1]
    name = fragment.read_text(encoding="utf-8").removeprefix("# ").partition(":")[0]
    return name.rpartition("/")[2]


def _result(name: str, hbm: int) -> list[str]:
    """Cells: whether it fits, peak memory, temporaries over cache, and seconds of compilation."""
    file = RESULTS / f"{name}.json"
    if not file.exists():
        return ["not compiled yet", "", "", ""]
    result = json.loads(file.read_text(encoding="utf-8"))
    seconds = f"{result['compile_seconds']:.0f}"
    if not result["ok"]:
        return [f"no: {reason(result['error'])}", "", "", seconds]
    peak = f"{result['peak_bytes_per_chip'] / 2**30:.1f} of {hbm / 2**30:.0f}"
    over_cache = f"{result['temp_over_kv']:.3f}" if "temp_over_kv" in result else ""
    return ["yes", peak, over_cache, seconds]


def reason(error: str) -> str:
    """The sentence of a compiler's error that contains bytes, or its first sentence."""
    sentences = [part.strip(" .") for part in re.split(r"(?<=[.:])\s+", error)]
    return next((part for part in sentences if re.search(r"\d[GM]i?B?\b", part)), sentences[0])
