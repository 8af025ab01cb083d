"""`tw parity`: compares this library with PyTorch, from rotary frequencies to a loss curve.

Both sides read one Hugging Face folder and receive the same tries. The table, `parity.json` and
`parity.png` show their differences in float32 and bfloat16, and the first stage that is outside its
tolerance. The last line is one JSON object. The exit status is 1 if float32 fails.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from tw_jax import files, workdir
from tw_jax.bounds import require, require_text
from tw_jax.config import configurable
from tw_jax.contracts import Params
from tw_jax.models import hf
from tw_jax.models.hf_config import read_model
from tw_jax.models.transformer import Dtype, Model
from tw_jax.parity import compare, stages
from tw_jax.parity.material import Material, Problems, Texts, Trajectories, read_material
from tw_jax.parity.source import Folder, Gguf, Random, Trained, write_source
from tw_jax.parity.stages import Training
from tw_jax.parity.summary import summarize
from tw_jax.tokenizer.ids import check_ids
from tw_jax.view.plots import parity_figure
from tw_jax.view.style import save


@configurable
class Parity:
    """A comparison with PyTorch.

    Attributes:
      workdir: Folder of `model/` (if one is made), `parity.json` and `parity.png`.
      source: Where the weights come from.
      material: The texts, problems or trajectories that both sides read.
      row_tokens: Tokens of a row into which tries are packed.
      dtypes: Dtypes of activations to compare, float32 first.
      training: The training curve; None skips gradients, the single step and the curve.
      greedy_tokens: Tokens that both sides decode greedily after each prompt; 0 skips this.
      forkjoin: Whether both sides decode the prompts greedily with threads.
    """

    workdir: str
    source: Folder | Gguf | Random | Trained
    material: Trajectories | Texts | Problems
    row_tokens: int = 512
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    training: Training | None = None
    greedy_tokens: int = 0
    forkjoin: bool = False

    def check(self) -> None:
        """Refuses dtypes without float32, and threads without problems."""
        require_text(self, "workdir")
        require(self, "row_tokens", least=1)
        require(self, "greedy_tokens", least=0)
        if self.dtypes[:1] != ("float32",) or len(set(self.dtypes)) < len(self.dtypes):
            raise ValueError(
                f"Parity.dtypes = {self.dtypes} must begin with 'float32' and name no dtype twice, "
                "because decoding and the exit status use float32."
            )
        if self.forkjoin and not isinstance(self.material, Problems):
            raise ValueError(
                "Parity.forkjoin = True needs problems to decode. Set Parity.material = "
                "@Problems(), or Parity.forkjoin = False."
            )


def run(cfg: Parity) -> int:
    """Compares, prints the tables and writes the files; returns the exit status."""
    torch_oracle = _import_torch_oracle()
    folder = write_source(cfg.source, Path(cfg.workdir) / "model", torch_oracle)
    model, material = read_model(folder), read_material(cfg.material, cfg.row_tokens)
    check_ids(np.ravel(material.calls.tokens), model.vocab_size, "Parity.material")
    params = hf.read_params(folder, model)
    results: dict[str, dict[str, Any]] = {}
    exact_logits = None
    with jax.default_matmul_precision("highest"):
        for dtype in cfg.dtypes:
            oracle = torch_oracle.Oracle(folder, dtype)
            theirs = stages.their_side(oracle, material, cfg.training, torch_oracle)
            typed_model = dataclasses.replace(model, compute_dtype=dtype)
            ours = stages.our_side(typed_model, params, material, cfg.training)
            report = compare.report(ours, theirs, dtype)
            print(report.table())
            results[dtype] = summarize(report, ours, theirs, material=material)
            if dtype == "float32":
                exact_logits = theirs["logits"]
            results[dtype]["logits_from_float32"] = {
                "ours": compare.error(ours["logits"], exact_logits).l2,
                "theirs": compare.error(theirs["logits"], exact_logits).l2,
            }
            if dtype == "float32":
                results[dtype] |= _match_decoding(cfg, model, params, oracle, material)
    workdir.record(cfg)
    _write(Path(cfg.workdir), results)
    return _exit_status(results["float32"])


def _import_torch_oracle() -> ModuleType:
    try:
        from tw_jax.parity import torch_oracle
    except ImportError as error:
        raise NotImplementedError(
            f"tw parity needs PyTorch and transformers ({error}). Install the parity extra with "
            "`pip install -e '.[parity]'`."
        ) from error
    return torch_oracle


def _match_decoding(
    cfg: Parity, model: Model, params: Params, oracle: Any, material: Material
) -> dict[str, float | None]:
    """Shares of prompts that both sides continue with equal ids; None if the config skips this."""
    greedy = forkjoin = None
    if cfg.greedy_tokens:
        greedy = stages.greedy_match(model, params, oracle, material, tokens=cfg.greedy_tokens)
    if cfg.forkjoin:
        torch_oracle = _import_torch_oracle()
        forkjoin = stages.forkjoin_match(model, params, oracle, material, torch_oracle=torch_oracle)
    return {"greedy_match": greedy, "forkjoin_match": forkjoin}


def _write(folder: Path, results: dict[str, dict[str, Any]]) -> None:
    """Writes the files and prints the numbers, except stages and curves."""
    folder.mkdir(parents=True, exist_ok=True)
    files.write_text(folder / "parity.json", json.dumps(results, indent=2) + "\n")
    save(parity_figure(results), folder / "parity.png", "png")
    print(f"{folder}/parity.json, {folder}/parity.png")
    short = {
        dtype: {name: value for name, value in figures.items() if name not in ("stages", "curve")}
        for dtype, figures in results.items()
    }
    exact = short.pop("float32")
    print(json.dumps({**exact, **short}))


def _exit_status(exact: dict[str, Any]) -> int:
    """0 if all stages of float32 are within their tolerances and all decoded ids are equal."""
    is_within = exact["first_layer_out_of_tolerance"] is None
    is_same = all(exact[name] in (None, 1.0) for name in ("greedy_match", "forkjoin_match"))
    return int(not (is_within and is_same))
