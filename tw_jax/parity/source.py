"""The weights that `tw parity` compares: where they come from, and one Hugging Face folder of them.

A config class describes each kind of source. `write_source` returns the folder that both
frameworks then read. This module compares nothing.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal

import jax

from tw_jax.bounds import require, require_text
from tw_jax.checkpoint import restore_params
from tw_jax.config import configurable
from tw_jax.models import hf
from tw_jax.models.transformer import Model, network


@configurable
class Folder:
    """A folder in the layout of the Hugging Face Hub.

    Attributes:
      path: The folder with `config.json` and safetensors files.
    """

    path: str

    def check(self) -> None:
        """Refuses an empty path."""
        require_text(self, "path")


@configurable
class Gguf:
    """A GGUF file inside an installed package; transformers dequantises it.

    Attributes:
      package: The package, which is located but not imported.
      file: The file in the package's folder.
    """

    package: str
    file: str

    def check(self) -> None:
        """Refuses empty names."""
        require_text(self, "package", "file")


@configurable
class Random:
    """Random weights that transformers makes from fields of a `config.json`.

    Attributes:
      model_type: Architecture.
      vocab_size: Rows of the embedding table.
      hidden_size: Width of the model.
      intermediate_size: Width of the MLP.
      num_hidden_layers: Number of blocks.
      num_attention_heads: Number of query heads.
      num_key_value_heads: Number of key and value heads.
      head_dim: Width of a head.
      tie_word_embeddings: Whether the embedding table also computes the logits.
      rope_theta: Base of the rotary wavelengths.
      rms_norm_eps: Added to the mean square in norms.
      seed: Seed of the weights.
    """

    model_type: Literal["qwen3", "llama"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool = False
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    seed: int = 0

    def check(self) -> None:
        """Refuses sizes that do not fit each other."""
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
        require(self, *sizes, *heads, least=1)
        require(self, "rope_theta", above=1)
        require(self, "rms_norm_eps", above=0)
        require(self, "seed", least=0)
        if self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"Random.num_key_value_heads = {self.num_key_value_heads} must divide "
                f"Random.num_attention_heads = {self.num_attention_heads}, and Random.head_dim = "
                f"{self.head_dim} must be even."
            )


@configurable
class Trained:
    """A checkpoint of this library, exported to the Hugging Face format.

    Attributes:
      checkpoint: Folder of a training run's checkpoints; the newest one is read.
      model: The model that was trained.
    """

    checkpoint: str
    model: Model

    inherits: ClassVar[str] = "checkpoint"

    def check(self) -> None:
        """Refuses an empty path."""
        require_text(self, "checkpoint")


Source = Folder | Gguf | Random | Trained


def write_source(source: Source, folder: Path, torch_oracle: ModuleType) -> Path:
    """Returns a folder with the weights and writes it first unless the source is a `Folder`.

    Args:
      source: Where the weights come from.
      folder: Where they are written.
      torch_oracle: The module `parity/torch_oracle.py`. It is an argument because it needs PyTorch,
        which may not be installed.

    Raises:
      ValueError: If the package of a GGUF file is not installed.
      NotImplementedError: If the reader of GGUF files is not installed.
    """
    match source:
        case Folder():
            return Path(source.path)
        case Random():
            fields = {name: value for name, value in vars(source).items() if name != "seed"}
            torch_oracle.write_random(folder, fields, seed=source.seed)
        case Trained():
            abstract = jax.eval_shape(network(source.model).init, jax.random.key(0))
            params = restore_params(source.checkpoint, abstract=abstract)
            hf.write(folder, params, source.model, dtype="float32")
        case Gguf():
            try:
                torch_oracle.write_gguf(_find_packaged(source), folder)
            except ImportError as error:
                raise NotImplementedError(
                    f"Gguf.file = {source.file!r} cannot be read ({error}). Install the parity "
                    "extra with `pip install -e '.[parity]'`."
                ) from error
    return folder


def _find_packaged(source: Gguf) -> Path:
    """Locates the file of a package without running the package's code."""
    spec = importlib.util.find_spec(source.package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"Gguf.package = {source.package!r}: no such package is installed. Install it with "
            f"`pip install {source.package.replace('_', '-')}`."
        )
    return Path(next(iter(spec.submodule_search_locations))) / source.file
