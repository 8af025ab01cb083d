"""Exports a checkpoint as a Hugging Face folder that other engines can serve.

The checkpoint records its model, and the tokenizer and the other small files are beside it. Every
process of a job reads its part of the parameters. Process 0 gathers and writes one tensor at a
time.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tw_jax import sharding
from tw_jax.bounds import require_text
from tw_jax.checkpoint import restore_params
from tw_jax.config import configurable
from tw_jax.models import hf, hf_files
from tw_jax.models.load import abstract_params, read_files, read_record
from tw_jax.models.transformer import Dtype, Model, network
from tw_jax.sharding import Mesh, Rules


@configurable
class Export:
    """Exports the newest checkpoint as a Hugging Face folder, `hf/` of the workdir.

    Adapters are merged into the weights. The tokenizer's file is copied, and so are the files that
    an import kept of its source (chat template, generation settings, licence, config.json).

    Attributes:
      checkpoint: Folder of a run's checkpoints.
      dtype: Dtype of the tensors in the files.
      mesh: Devices onto which the checkpoint is read.
      rules: How parameters are split over them.
    """

    checkpoint: str
    dtype: Dtype = "bfloat16"
    mesh: Mesh = Mesh()
    rules: Rules = Rules()

    def check(self) -> None:
        """Refuses an empty path."""
        require_text(self, "checkpoint")


class Exported(NamedTuple):
    """The step of the exported checkpoint, and its model."""

    step: int
    model: Model


def export_folder(job: Export, folder: Path) -> Exported:
    """Writes the newest checkpoint as a Hugging Face folder.

    After an error the folder is unchanged.

    Raises:
      FileNotFoundError: If there is no checkpoint.
      ValueError: If an earlier version wrote the checkpoint without its model.
    """
    record = read_record(job.checkpoint)
    model = record.config.model
    abstract = abstract_params(network(model), sharding.make_mesh(job.mesh), job.rules)
    params = restore_params(job.checkpoint, step=record.step, abstract=abstract)
    contents = read_files(job.checkpoint, record.config)
    if hf_files.TOKENIZER in contents:
        contents, _ = hf_files.with_control_tokens(
            contents, list(record.control_tokens), source=job.checkpoint
        )
    base = hf_files.parsed(contents, "config.json", source=job.checkpoint)
    hf.write(folder, params, model, dtype=job.dtype, base=base, others=contents)
    return Exported(record.step, model)
