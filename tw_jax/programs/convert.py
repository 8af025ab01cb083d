"""`tw convert`: Hugging Face folders to our checkpoints, and back.

What an import writes is what the other verbs read: `checkpoints/` for `Sft.init` or
`Sample.checkpoint`, `model.gin` to include, `hf/` with the tokenizer. What an export writes, any
engine that reads Hugging Face folders can serve.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import jax

from tw_jax import folders, sharding, workdir
from tw_jax.bounds import require, require_text
from tw_jax.checkpoint import Checkpoints, newest, restore_params
from tw_jax.config import configurable, operative
from tw_jax.models import hf, hf_config
from tw_jax.models.transformer import Dtype, Model, network
from tw_jax.sharding import Mesh, Rules
from tw_jax.tokenizer import AddedToken, add_control_tokens

_COPIED = (
    *("config.json", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt", "USE_POLICY.md"),
)
"""The files of a Hugging Face folder that go along; no code, no weights, nothing unknown."""


@configurable
class Import:
    """From a Hugging Face folder to `checkpoints/`, `model.gin` and `hf/` of the workdir.

    `hf/` gets the config, the files of the tokenizer, the chat template and the licence, and no
    other file: no code and no weights of other formats. A link that leads out of the folder is
    refused, except into the `blobs` of the Hub's cache that the folder belongs to.

    Attributes:
      source: the folder, with config.json, safetensors and, for control tokens, tokenizer.json.
      param_dtype: of the parameters; training wants float32, which holds bfloat16 exactly.
      compute_dtype: what `model.gin` says of activations.
      control_tokens: whether the tokenizer gets the twelve control tokens and the model their rows.
      vocab_multiple: the number of rows then is a multiple of this, so that a mesh can split them.
      mesh: devices that the parameters are read onto.
      rules: how parameters are split over them.
    """

    source: str
    param_dtype: Dtype = "float32"
    compute_dtype: Dtype = "bfloat16"
    control_tokens: bool = True
    vocab_multiple: int = 128
    mesh: Mesh = Mesh()
    rules: Rules = Rules()

    def check(self) -> None:
        """Refuses a folder without a name, and a multiple below one."""
        require_text(self, "source")
        require(self, "vocab_multiple", least=1)


@configurable
class Export:
    """From the newest of our checkpoints to a Hugging Face folder, `hf/` of the workdir.

    Attributes:
      checkpoint: folder of a run's checkpoints.
      model: the model that was trained; adapters that it has are merged into its weights.
      dtype: of the tensors written.
      files: folder whose config.json is kept beneath the model's own fields and whose other files
        (tokenizer, chat template) go along, such as the `hf/` of an import; None for none.
      mesh: devices that the checkpoint is read onto.
      rules: how parameters are split over them.
    """

    checkpoint: str
    model: Model
    dtype: Dtype = "bfloat16"
    files: str | None = None
    mesh: Mesh = Mesh()
    rules: Rules = Rules()

    def check(self) -> None:
        """Refuses folders without a name."""
        require_text(self, "checkpoint", "files")


@configurable
class Convert:
    """One conversion.

    Attributes:
      workdir: where its results go.
      job: which way.
    """

    workdir: str
    job: Import | Export

    def check(self) -> None:
        """Refuses a folder without a name."""
        require_text(self, "workdir")


def run(cfg: Convert) -> None:
    """Imports or exports."""
    folder = Path(cfg.workdir)
    match cfg.job:
        case Import():
            model = import_folder(cfg.job, folder)
            print(f"{folder}/checkpoints and {folder}/model.gin: {_described(model)}")
        case Export():
            step = export_folder(cfg.job, folder / "hf")
            print(f"{folder}/hf: step {step}, {_described(cfg.job.model)}, as {cfg.job.dtype}")
    workdir.record(cfg)


def import_folder(job: Import, folder: Path) -> Model:
    """Reads a Hugging Face folder and writes ours; returns the model as it became.

    All is written into a new folder in `folder`, and moved to its place when it is complete. After
    an error `folder` is as it was.

    Raises:
      FileNotFoundError: a file of the source is not there.
      ValueError: see `hf.read_params` and `hf_config.read_model`; or an import is there already;
        or a file to copy or to read weights from is a link that leaves the source.
    """
    source = Path(job.source)
    for name in ("checkpoints", "hf", "model.gin"):
        place = folder / name
        if place.is_file() or (place.is_dir() and any(place.iterdir())):
            raise ValueError(
                f"{place} is there already, and an import needs an empty place. Delete it to "
                "import again, or set Convert.workdir to another folder."
            )
    model = dataclasses.replace(
        hf_config.read_model(source), param_dtype=job.param_dtype, compute_dtype=job.compute_dtype
    )
    folder.mkdir(parents=True, exist_ok=True)
    with folders.building(folder / ".import.part") as part:
        model = _import_into(part, job, model)
        folders.sync(part)
        for name in ("checkpoints", "hf", "model.gin"):
            os.replace(part / name, folder / name)
    return model


def _import_into(part: Path, job: Import, model: Model) -> Model:
    source = Path(job.source)
    (part / "hf").mkdir()
    _copy_files(source, part / "hf")
    added = _with_control_tokens(source, part / "hf") if job.control_tokens else []
    for file in hf.weight_files(source):
        _refuse_link(file, source)
    mesh = sharding.make_mesh(job.mesh)
    params = hf.read_params(source, model, mesh=mesh, rules=job.rules)
    if job.control_tokens:
        with sharding.use(mesh, job.rules):
            words = {token.id: token.word for token in added}
            params, model = hf.add_rows(params, model, words, multiple=job.vocab_multiple)
    with Checkpoints(part / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(0, {"params": params}, {"source": str(source)})
    fields = hf_config.config_fields(
        model, dtype=job.param_dtype, base=hf_config.read_config(source)
    )
    _write_json(part / "hf" / "config.json", fields)
    head = f"# {source.name}, imported by tw convert: include this file and use @Model().\n"
    (part / "model.gin").write_text(head + operative(model), encoding="utf-8")
    return model


def export_folder(job: Export, folder: Path) -> int:
    """Writes the newest checkpoint as a Hugging Face folder; returns its step.

    After an error the folder is as it was.

    Raises:
      FileNotFoundError: there is no checkpoint.
      ValueError: the model is not the checkpoint's.
    """
    net = network(job.model)
    step = newest(job.checkpoint)
    mesh = sharding.make_mesh(job.mesh)
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    where = sharding.shardings(net.axes(), shapes, mesh, job.rules)
    abstract = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        where,
    )
    params = restore_params(job.checkpoint, step=step, abstract=abstract)
    base = {} if job.files is None else hf_config.read_config(job.files)
    with folders.replacing(folder, hf.is_replaced) as new:
        if job.files is not None:
            _copy_files(Path(job.files), new)
        hf.write(new, params, job.model, dtype=job.dtype, base=base)
    return step


def _with_control_tokens(source: Path, target: Path) -> list[AddedToken]:
    """Adds the control tokens to the tokenizer's files in `target`."""
    added = add_control_tokens(source / "tokenizer.json", target / "tokenizer.json")
    settings = target / "tokenizer_config.json"
    if settings.is_file():
        fields = hf_config.read_json(settings)
        # Where this table exists, some engines read added tokens from it alone.
        if "added_tokens_decoder" in fields:
            flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
            for token in added:
                entry = {"content": token.text, **flags, "special": True}
                fields["added_tokens_decoder"][str(token.id)] = entry
            _write_json(settings, fields)
    return added


def _copy_files(source: Path, target: Path) -> None:
    """Copies the content of the files that go along: config, tokenizer, chat template, licence."""
    for name in _COPIED:
        file = source / name
        if file.is_symlink() or file.exists():
            _refuse_link(file, source)
            shutil.copyfile(file, target / name)


def _refuse_link(file: Path, source: Path) -> None:
    """Refuses what is no regular file of the folder, or of the Hub's cache that it is part of."""
    inside, real = source.resolve(), file.resolve()
    places = [inside]
    # The Hub's cache keeps models--NAME/snapshots/COMMIT/FILE as links to models--NAME/blobs/HASH.
    if inside.parent.name == "snapshots" and inside.parent.parent.name.startswith("models--"):
        places.append(inside.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in places):
        raise ValueError(
            f"{file} is a link to {real}, outside of its folder, and is not read. Replace the "
            "link by the file that you mean."
        )
    if not real.is_file():
        raise ValueError(f"{file} is not a regular file. Replace it by the file that you mean.")


def _write_json(file: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8")


def _described(model: Model) -> str:
    return f"{sum(map(math.prod, hf.tensor_shapes(model).values())):,} parameters"
