"""`tw convert`: Hugging Face folders to our checkpoints, and back.

An import writes `checkpoints/`, with the tokenizer in it, which the other verbs read as `Sft.init`
or `Sample.checkpoint`. An export can be served by any engine that reads Hugging Face folders.
"""

from __future__ import annotations

import math
from pathlib import Path

from tw_jax import hosts, workdir
from tw_jax.bounds import require_text
from tw_jax.config import configurable
from tw_jax.models import hf
from tw_jax.models.hf_export import Export, export_folder
from tw_jax.models.hf_import import Import, import_folder
from tw_jax.models.load import LanguageModel
from tw_jax.models.transformer import Model
from tw_jax.tokenizer.hugging_face import HuggingFace

MANY_HOSTS = True
"""`tw convert --hosts` is one process of many, because a model may be too large for one host."""


@configurable
class Convert:
    """One conversion.

    Attributes:
      workdir: Folder of the results.
      job: An import or an export.
    """

    workdir: str
    job: Import | Export

    def check(self) -> None:
        """Refuses an empty path."""
        require_text(self, "workdir")


def run(cfg: Convert) -> None:
    """Runs the import or the export, and prints its result."""
    folder = Path(cfg.workdir)
    match cfg.job:
        case Import():
            made = import_folder(cfg.job, folder)
            result = f"{folder}/checkpoints: {_size(made.model)}, {_language(made)}"
        case Export():
            step, model = export_folder(cfg.job, folder / "hf")
            result = f"{folder}/hf: step {step}, {_size(model)}, as {cfg.job.dtype}"
    if hosts.is_first():
        print(result)
    workdir.record(cfg)


def _size(model: Model) -> str:
    return f"{sum(map(math.prod, hf.tensor_shapes(model).values())):,} parameters"


def _language(made: LanguageModel) -> str:
    ends = ""
    if isinstance(made.tokenizer, HuggingFace):
        ends = f", texts end with {' or '.join(made.tokenizer.eos)}"
    return f"chat template {made.chat.template!r}{ends}"
