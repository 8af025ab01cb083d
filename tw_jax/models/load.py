"""Loads a model from a folder of checkpoints, with its tokenizer, chat template and limits.

Every program that saves checkpoints calls `record_model`. It copies the tokenizer's file into the
folder of checkpoints and returns a note, which each checkpoint stores. `load_model` reads such a
folder onto any mesh, on any number of hosts. `describe` returns the note as gin text. The folder
can be moved or copied, because nothing outside of it is read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tw_jax import hosts
from tw_jax.checkpoint import newest, read_beside, read_note, restore_params, write_beside
from tw_jax.config import configurable, load_config, operative
from tw_jax.contracts import Network, Params
from tw_jax.damage import DamagedError
from tw_jax.forkjoin.limits import ForkJoin
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.table import make_table
from tw_jax.models import hf_files
from tw_jax.models.transformer import Model, network, with_token_rows
from tw_jax.sharding import Rules, shardings
from tw_jax.tokenizer.bytes import Bytes
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.hugging_face import HuggingFace
from tw_jax.tokenizer.interface import Tokenizer, check_rows, require_single_ids
from tw_jax.tokenizer.load import load_tokenizer
from tw_jax.tokenizer.sentencepiece import SentencePiece

_KEY = "language_model"
"""Key of what this file writes into the note of a checkpoint."""


@configurable
class LanguageModel:
    """A model with everything that its ids and its rollouts depend on.

    Attributes:
      model: Sizes and numerics.
      tokenizer: The tokenizer.
      chat: The chat template.
      forkjoin: Limits of fork and join.
    """

    model: Model
    tokenizer: Bytes | SentencePiece | HuggingFace
    chat: Chat
    forkjoin: ForkJoin


class Loaded(NamedTuple):
    """A model that is ready to be sampled, scored or trained.

    Attributes:
      network: Pure functions of the parameters.
      params: Parameters on the mesh that `load_model` received, with adapters if the model has any.
      tokenizer: The tokenizer.
      chat: The chat template.
      protocol: Decisions of fork and join, with the limits of `config.forkjoin`.
      config: The config of all of these.
      step: Step of the checkpoint.
    """

    network: Network
    params: Params
    tokenizer: Tokenizer
    chat: Chat
    protocol: ThreadWeaver
    config: LanguageModel
    step: int


def load_model(
    folder: str | Path,
    *,
    mesh: jax.sharding.Mesh | None = None,
    rules: Rules = Rules(),  # noqa: B008  (immutable)
    step: int | None = None,
    config: LanguageModel | None = None,
) -> Loaded:
    """Reads and verifies a model from a folder of checkpoints; nothing is written.

    Every process of a job calls it with the same arguments and reads its part of the parameters.

    Args:
      folder: The `checkpoints/` of a run or an import, as a path or a URL such as
        gs://bucket/run/checkpoints.
      mesh: Devices to put the parameters on; None for the first local device. The mesh may differ
        from the one that saved the parameters.
      rules: How the mesh splits parameters.
      step: Which checkpoint; None for the newest.
      config: Replaces the recorded config, for example to change limits or the attention backend.
        Its tokenizer must have the checkpoint's vocabulary.

    Raises:
      FileNotFoundError: If there is no such checkpoint, or its tokenizer's file is missing.
      DamagedError: If the checkpoint is damaged.
      ValueError: If an earlier version wrote the checkpoint without its model, if the tokenizer's
        file is not that of the checkpoint, or if `config` does not fit the parameters.
    """
    record = read_record(folder, step=step)
    chosen = record.config if config is None else config
    if chosen.model.lora != record.config.model.lora:
        raise ValueError(
            f"{folder} has parameters for Model.lora = {record.config.model.lora}, and the config "
            f"has Model.lora = {chosen.model.lora}. Leave Model.lora out of the config."
        )
    read = partial(_tokenizer, folder, chosen.tokenizer, record)
    tokenizer = hosts.together(read, ValueError, OSError)
    chosen.chat.answer_suffix(tokenizer)  # refuses a tokenizer of another family
    check_rows(tokenizer, chosen.model.vocab_size)
    protocol = ThreadWeaver(make_table(tokenizer), chosen.forkjoin)
    net = network(chosen.model, num_ids=tokenizer.vocab_size)
    params = restore_params(folder, step=record.step, abstract=abstract_params(net, mesh, rules))
    return Loaded(net, params, tokenizer, chosen.chat, protocol, chosen, record.step)


def describe(folder: str | Path) -> str:
    """The recorded config of the newest checkpoint, as the gin text of a `LanguageModel`.

    Returns:
      Text that `load_config(LanguageModel, ...)` reads. The tokenizer's path is that of its file in
      `folder`.

    Raises:
      FileNotFoundError: If there is no checkpoint.
      DamagedError: If its record is damaged.
      ValueError: If an earlier version wrote it without its model.
    """
    # This does not communicate, because each process builds its config before they are compared.
    return operative(_read(folder, newest(folder)).config)


class Record(NamedTuple):
    """The record of a checkpoint about its model.

    Attributes:
      step: Step of the checkpoint.
      config: Config of the model. The path of its tokenizer is in the folder of checkpoints.
      fingerprint: Fingerprint of the tokenizer; "" if an import copied a tokenizer that this
        library cannot use.
      control_tokens: The control tokens of the vocabulary and their ids.
      added: Ids of the control tokens that the import added to the model. Their rows are not
        pretrained.
    """

    step: int
    config: LanguageModel
    fingerprint: str
    control_tokens: dict[str, int]
    added: tuple[int, ...]


def read_record(folder: str | Path, *, step: int | None = None) -> Record:
    """Reads the record of a checkpoint, the same in all processes; no array is read.

    Raises:
      FileNotFoundError, DamagedError, ValueError: In every process; see `load_model`.
    """
    if step is None:
        # Process 0 decides, because a run may save another checkpoint at this moment.
        step = hosts.gather(hosts.together(partial(newest, folder), FileNotFoundError))[0]
    assert step is not None
    return hosts.together(partial(_read, folder, step), ValueError, OSError)


def read_files(folder: str | Path, config: LanguageModel) -> dict[str, bytes]:
    """The tokenizer's file and the files that an import copied, by name.

    Args:
      folder: Folder of checkpoints.
      config: Config of one of them.
    """
    names = {name: f"hf/{name}" for name in hf_files.NAMES}
    if not isinstance(config.tokenizer, Bytes):
        own = _file_name(config.tokenizer)
        names[own] = own
    found = {name: read_beside(folder, place) for name, place in names.items()}
    return {name: content for name, content in found.items() if content is not None}


def record_model(
    folder: str | Path,
    config: LanguageModel,
    tokenizer: Tokenizer | None,
    *,
    origin: str | Path | None = None,
    added: Sequence[int] = (),
) -> dict[str, Any]:
    """Prepares a folder of checkpoints so that `load_model` can read it.

    Process 0 copies the tokenizer's file into the folder, atomically. It also copies the files that
    an import left in `hf/` of the origin, because an export needs them.

    Args:
      folder: Folder of the checkpoints that will be saved.
      config: Config of their model.
      tokenizer: The tokenizer of `config`; None if this library cannot use it and only an export
        will.
      origin: The folder of checkpoints that the run begins with. It may have been deleted when a
        run is resumed.
      added: Ids of the control tokens that an import has added. A run that begins with other
        checkpoints records those of them.

    Returns:
      A JSON object that each checkpoint must store in its `extra`, beside its other entries.

    Raises:
      OSError: If the file cannot be read or written.
    """
    portable = config
    if not isinstance(config.tokenizer, Bytes):
        name = _file_name(config.tokenizer)
        content = hosts.together(Path(config.tokenizer.path).read_bytes, OSError)
        write_beside(folder, {name: content})
        portable = dataclasses.replace(
            config, tokenizer=dataclasses.replace(config.tokenizer, path=name)
        )
    if origin is not None and tokenizer is not None:
        fingerprint = tokenizer.fingerprint
        found = hosts.together(lambda: _files_of_import(origin, fingerprint), ValueError, OSError)
        write_beside(folder, found)
        added = _added_before(folder, origin)
    return {
        _KEY: {
            "config": operative(portable),
            "tokenizer": "" if tokenizer is None else tokenizer.fingerprint,
            "control_tokens": {} if tokenizer is None else dict(tokenizer.control_ids),
            "added": list(added),
        }
    }


def with_added_rows(model: Model, folder: str | Path, origin: str | Path | None) -> Model:
    """Sets `Lora.token_rows` if a config does not.

    Args:
      model: The model of a run.
      folder: Folder of the run's own checkpoints, which may not exist yet.
      origin: Folder of the checkpoints that the run begins with.

    Returns:
      The model, whose adapters train the rows of the control tokens that the import has added.
    """
    if model.lora is None or model.lora.token_rows is not None:
        return model
    return with_token_rows(model, _added_before(folder, origin))


def abstract_params(net: Network, mesh: jax.sharding.Mesh | None, rules: Rules) -> Params:
    """Shapes, dtypes and shardings of a network's parameters.

    Args:
      net: The network.
      mesh: Devices; None leaves out the shardings.
      rules: How the mesh splits parameters.

    Returns:
      The tree of parameters with `jax.ShapeDtypeStruct`s as leaves.
    """
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    if mesh is None:
        return shapes
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        shardings(net.axes(), shapes, mesh, rules),
    )


def _read(folder: str | Path, step: int) -> Record:
    """As `read_record`, but without communication between processes."""
    note = read_note(folder, step=step).get(_KEY)
    if note is None:
        raise ValueError(
            f"{folder}/{step} does not say which model, tokenizer and chat template it belongs to, "
            "because an earlier version of tw_jax wrote it. Run tw sft, tw pgrpo or tw convert "
            "again to write a new checkpoint."
        )
    try:
        lines = filter(None, note["config"].split("\n"))
        config = load_config(LanguageModel, [], list(lines))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: this version of tw_jax cannot read the config that the checkpoint records: "
            f"{error} Use the version that wrote it, or convert or train again."
        ) from error
    if not isinstance(config.tokenizer, Bytes):
        path = os.path.join(str(folder), _file_name(config.tokenizer))
        tokenizer = dataclasses.replace(config.tokenizer, path=path)
        config = dataclasses.replace(config, tokenizer=tokenizer)
    return Record(
        step, config, note["tokenizer"], note["control_tokens"], tuple(note.get("added", ()))
    )


def _tokenizer(
    folder: str | Path, cfg: Bytes | SentencePiece | HuggingFace, record: Record
) -> Tokenizer:
    """Builds the tokenizer and compares its vocabulary with that of the checkpoint."""
    content = None
    if not isinstance(cfg, Bytes):
        name = _file_name(cfg)
        if cfg.path == os.path.join(str(folder), name):
            content = read_beside(folder, name)
    control = sorted(record.control_tokens, key=record.control_tokens.__getitem__)
    tokenizer = load_tokenizer(cfg, control=control, content=content)
    if tokenizer.fingerprint != record.fingerprint:
        raise ValueError(
            f"{tokenizer.source} is not the tokenizer of the checkpoints in {folder}: the "
            f"fingerprint of its vocabulary is {tokenizer.fingerprint[:16]}, and the checkpoint "
            f"records {record.fingerprint[:16]}. Put the original file of the tokenizer there."
        )
    require_single_ids(tokenizer, record.control_tokens)
    return tokenizer


def _files_of_import(folder: str | Path, fingerprint: str) -> dict[str, bytes]:
    """The files that an import left in `hf/`; none if its checkpoints have another tokenizer."""
    names = [f"hf/{name}" for name in hf_files.NAMES]
    found = {name: content for name in names if (content := read_beside(folder, name)) is not None}
    if found and read_note(folder).get(_KEY, {}).get("tokenizer") != fingerprint:
        return {}
    return found


def _added_before(folder: str | Path, origin: str | Path | None) -> tuple[int, ...]:
    """The ids of `Record.added`: of a run's own checkpoints, or of its origin."""

    def read() -> tuple[int, ...]:
        for place in (folder, origin):
            # A damaged checkpoint is renamed when the run resumes.
            with contextlib.suppress(FileNotFoundError, DamagedError):
                return tuple(read_note(place).get(_KEY, {}).get("added", ())) if place else ()
        return ()

    # Process 0 decides, because another process may see the folder a moment later.
    return tuple(hosts.gather(hosts.together(read, ValueError, OSError))[0])


def _file_name(cfg: SentencePiece | HuggingFace) -> str:
    """The name of the tokenizer's file in a folder of checkpoints."""
    return "tokenizer.model" if isinstance(cfg, SentencePiece) else "tokenizer.json"
