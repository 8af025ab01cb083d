"""Imports a Hugging Face folder as a folder of checkpoints, from which models train and sample.

`checkpoints/` receives the parameters as step 0, the tokenizer with its control tokens, and in
`hf/` the small files that an export needs. Every process of a job reads its part of the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tw_jax import folders, hosts, sharding
from tw_jax.bounds import require, require_text
from tw_jax.checkpoint import Checkpoints, write_beside
from tw_jax.config import configurable
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.models import hf, hf_config, hf_files
from tw_jax.models.load import LanguageModel, record_model
from tw_jax.models.transformer import Dtype, Model
from tw_jax.sharding import Mesh, Rules
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.control import THREADWEAVER
from tw_jax.tokenizer.hugging_face import HuggingFace, read_vocabulary
from tw_jax.tokenizer.interface import Tokenizer
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece


@configurable
class Import:
    """Imports a Hugging Face folder into `checkpoints/` of the workdir.

    The parameters and the tokenizer are imported, and the config, the chat template and the licence
    are copied to `hf/`. No other file is copied: no code and no weights of other formats. A link
    that leads out of the folder is refused, except into the `blobs` of the Hub's cache that the
    folder belongs to.

    Attributes:
      source: The folder, with config.json, safetensors, and tokenizer.json or a tokenizer.model
        that train_sentencepiece wrote.
      param_dtype: Dtype of the parameters. Use float32 for training; it holds bfloat16 exactly.
      compute_dtype: Dtype of activations.
      control_tokens: Whether control tokens that are missing are added to the tokenizer, and rows
        for them to the model. A model without them can be exported and compared, but not trained or
        sampled.
      vocab_multiple: If control tokens are added, the number of rows is rounded up to a multiple of
        this, so that a mesh can split them.
      eos: Tokens that end a sampled text; None takes those that the folder's files name.
      chat: The chat template; None takes the family of the folder's template (qwen or llama), or
        plain.
      mesh: Devices onto which the parameters are read.
      rules: How parameters are split over them.
    """

    source: str
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "bfloat16"
    control_tokens: bool = True
    vocab_multiple: int = 128
    eos: tuple[str, ...] | None = None
    chat: Chat | None = None
    mesh: Mesh = Mesh()
    rules: Rules = Rules()

    def check(self) -> None:
        """Refuses an empty path, a multiple below 1 and an empty `eos`."""
        require_text(self, "source")
        require(self, "vocab_multiple", least=1)
        if self.eos is not None:
            require_text(self, "eos")
            if not self.eos:
                raise ValueError(
                    "Import.eos = () names no token, and sampling would never end. Name at least "
                    "one, or set Import.eos = None."
                )


def import_folder(job: Import, folder: Path) -> LanguageModel:
    """Reads a Hugging Face folder and writes `folder`/checkpoints; returns its config.

    All files are written into a new folder inside `folder`, which is moved to its place when it is
    complete. After an error `folder` is unchanged.

    Raises:
      FileNotFoundError: If a file of the source is missing.
      ValueError: If an import already exists, if a file is a link that leaves the source, if no end
        of sequence is found, or as in `hf.read_params` and `hf_config.read_model`.
    """
    place = folder / "checkpoints"
    source = Path(job.source)

    def read() -> tuple[Model, dict[str, bytes]]:
        if place.is_file() or (place.is_dir() and any(place.iterdir())):
            raise ValueError(
                f"{place} exists already, and an import needs an empty folder. Delete it to "
                "import again, or set Convert.workdir to another folder."
            )
        model = hf_config.read_model(source)
        for file in hf.weight_files(source):
            hf_files.require_own(file, source)
        return dataclasses.replace(
            model, param_dtype=job.param_dtype, compute_dtype=job.compute_dtype
        ), hf_files.read(source)

    model, contents = hosts.together(read, ValueError, OSError)
    folder.mkdir(parents=True, exist_ok=True)
    with _building(folder / ".import.part") as part:
        made = _write(part / "checkpoints", job, model, contents)
        hosts.gather("written")
        if hosts.is_first():
            folders.sync(part)
            os.replace(part / "checkpoints", place)
    return made


@contextlib.contextmanager
def _building(part: Path) -> Iterator[Path]:
    """A new folder that process 0 creates for all processes and deletes after the block."""
    with folders.building(part) if hosts.is_first() else contextlib.nullcontext():
        hosts.gather("made")
        yield part
        hosts.gather("moved")


def _write(
    checkpoints: Path, job: Import, model: Model, contents: Mapping[str, bytes]
) -> LanguageModel:
    """Writes the parameters as step 0, and the files beside it; returns the config."""
    source = Path(job.source)
    contents, words = _tokenizer_files(job, contents)
    chat, tokenizer = _language(job, contents)
    name = os.path.basename(tokenizer.path)
    mesh = sharding.make_mesh(job.mesh)
    params = hf.read_params(source, model, mesh=mesh, rules=job.rules)
    if job.control_tokens:
        with sharding.use(mesh, job.rules):
            params, model = hf.add_rows(params, model, words, multiple=job.vocab_multiple)
    fields = hf_config.config_fields(
        model, dtype=job.param_dtype, base=hf_config.read_config(source)
    )
    contents = {**contents, "config.json": hf_files.as_json(fields)}
    beside = {f"hf/{n}": content for n, content in contents.items() if n != name}
    write_beside(checkpoints, {**beside, name: contents[name]})
    config = LanguageModel(
        model=model,
        tokenizer=dataclasses.replace(tokenizer, path=str(checkpoints / name)),
        chat=chat,
        forkjoin=ForkJoin(),
    )
    built = _built(job, tokenizer, contents[name])
    note = record_model(checkpoints, config, built, added=sorted(words))
    with Checkpoints(checkpoints, keep=1) as out:
        out.save(0, {"params": params}, {"source": str(source), **note})
    return config


def _tokenizer_files(
    job: Import, contents: Mapping[str, bytes]
) -> tuple[Mapping[str, bytes], dict[int, list[int]]]:
    """The files with control tokens, and by id of each added token the ids of its word."""
    if not job.control_tokens or hf_files.TOKENIZER not in contents:
        return contents, {}
    made, added = hf_files.with_control_tokens(contents, THREADWEAVER, source=job.source)
    return made, {token.id: token.word for token in added}


def _language(
    job: Import, contents: Mapping[str, bytes]
) -> tuple[Chat, HuggingFace | SentencePiece]:
    """The chat template and the tokenizer: those of the job, or else of the folder's files."""
    if hf_files.TOKENIZER not in contents:
        if "tokenizer.model" in contents:
            path = str(Path(job.source, "tokenizer.model"))
            return job.chat or Chat(template="plain"), SentencePiece(path=path)
        raise FileNotFoundError(
            f"{job.source}/tokenizer.json: the tokenizer file is not there. Download it too, "
            "because a checkpoint stores its tokenizer."
        )
    chat = job.chat or hf_files.chat_of(contents, source=job.source)
    eos = job.eos or hf_files.eos_of(contents, chat, source=job.source)
    if not eos:
        raise ValueError(
            f"{job.source}: no end of sequence was found. Neither tokenizer_config.json nor "
            "generation_config.json nor config.json names a token that tokenizer.json has. Set "
            "Import.eos, such as ('<|im_end|>',) for Qwen."
        )
    return chat, HuggingFace(path=str(Path(job.source, hf_files.TOKENIZER)), eos=eos)


def _built(job: Import, cfg: HuggingFace | SentencePiece, content: bytes) -> Tokenizer | None:
    """The tokenizer; None if it has no control tokens and the library cannot use it."""
    if job.control_tokens:
        return load_tokenizer(cfg, content=content)
    control: Any = THREADWEAVER
    if isinstance(cfg, HuggingFace):
        vocabulary = read_vocabulary(content, source=cfg.path)
        control = [text for text in THREADWEAVER if text in vocabulary]
    try:
        return load_tokenizer(cfg, control=control, content=content)
    except ValueError:
        return None
