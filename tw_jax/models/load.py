"""A checkpoint is enough: its record says which model, tokenizer, chat and limits it belongs to.

`record_model` is called by every program that saves checkpoints: it puts the tokenizer's file into
the folder of checkpoints and returns the note that each checkpoint keeps. `load_model` reads such a
folder onto any mesh, on any number of hosts; `describe` gives the note as gin text. The folder can
be moved or copied, and nothing outside of it is read. This file does not know how a model is
trained or sampled.
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
"""Where a checkpoint's note keeps what this file writes."""


@configurable
class LanguageModel:
    """A model with all that its ids and its rollouts depend on.

    Attributes:
      model: sizes and numerics.
      tokenizer: text to ids.
      chat: how a question becomes a prompt.
      forkjoin: limits of fork and join.
    """

    model: Model
    tokenizer: Bytes | SentencePiece | HuggingFace
    chat: Chat
    forkjoin: ForkJoin


class Loaded(NamedTuple):
    """A model that is ready to be sampled, scored or trained.

    Attributes:
      network: pure functions of the parameters.
      params: on the devices that `load_model` was told, with adapters where the model has them.
      tokenizer: text to ids.
      chat: how a question becomes a prompt.
      protocol: decisions of fork and join, with the limits of `config.forkjoin`.
      config: all of it as config.
      step: of the checkpoint.
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
      folder: the `checkpoints/` of a run or an import; a URL such as gs://bucket/run/checkpoints is
        read too.
      mesh: devices to put the parameters on, whatever the mesh was that they were saved from; None
        for the first local device.
      rules: how the mesh splits parameters.
      step: which checkpoint; None for the newest.
      config: replaces what the checkpoint says, to change limits or the attention backend for
        instance. Its tokenizer must have the checkpoint's vocabulary.

    Raises:
      FileNotFoundError: there is no such checkpoint, or its tokenizer's file is missing.
      DamagedError: the checkpoint is damaged.
      ValueError: an earlier version wrote it, without its model; the tokenizer's file is another
        one; or `config` does not fit the parameters.
    """
    record = read_record(folder, step=step)
    chosen = record.config if config is None else config
    read = partial(_tokenizer, folder, chosen.tokenizer, record)
    tokenizer = hosts.together(read, ValueError, OSError)
    chosen.chat.answer_suffix(tokenizer)  # refuses a tokenizer of another family
    check_rows(tokenizer, chosen.model.vocab_size)
    protocol = ThreadWeaver(make_table(tokenizer), chosen.forkjoin)
    net = network(chosen.model, num_ids=tokenizer.vocab_size)
    params = restore_params(folder, step=record.step, abstract=abstract_params(net, mesh, rules))
    return Loaded(net, params, tokenizer, chosen.chat, protocol, chosen, record.step)


def describe(folder: str | Path) -> str:
    """What the newest checkpoint of a folder knows, as the gin text of a `LanguageModel`.

    Returns:
      Text that `load_config(LanguageModel, ...)` reads. The tokenizer's path is that of its file in
      `folder`.

    Raises:
      FileNotFoundError: there is no checkpoint.
      DamagedError: its record is damaged.
      ValueError: an earlier version wrote it, without its model.
    """
    # Without a word to other processes: configs are built before they are compared.
    return operative(_read(folder, newest(folder)).config)


class Record(NamedTuple):
    """What one checkpoint says of itself.

    Attributes:
      step: its step.
      config: the model and what belongs to it; the tokenizer's path is in the folder.
      fingerprint: of the tokenizer; "" where an import kept one that the library cannot use.
      control_tokens: the control tokens of the vocabulary and their ids.
      added: ids of the control tokens that the import added to the model; their rows are not
        pretrained.
    """

    step: int
    config: LanguageModel
    fingerprint: str
    control_tokens: dict[str, int]
    added: tuple[int, ...]


def read_record(folder: str | Path, *, step: int | None = None) -> Record:
    """Reads what a checkpoint says of itself; no array is read. All processes get the same.

    Raises:
      FileNotFoundError, DamagedError, ValueError: in every process; see `load_model`.
    """
    if step is None:
        # As process 0 sees it: a run may save another one at this moment.
        step = hosts.gather(hosts.together(partial(newest, folder), FileNotFoundError))[0]
    assert step is not None
    return hosts.together(partial(_read, folder, step), ValueError, OSError)


def read_files(folder: str | Path, config: LanguageModel) -> dict[str, bytes]:
    """The tokenizer's file and what an import kept of its Hugging Face folder, by their names.

    Args:
      folder: of checkpoints.
      config: of one of them.
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
    """Makes a folder of checkpoints enough to load a model from.

    The tokenizer's file is copied into the folder, in one move and by process 0, and so are the
    files that an import left in `hf/`, so that an export finds them.

    Args:
      folder: of the checkpoints that will be saved.
      config: what they belong to.
      tokenizer: of `config`; None for one that can only be kept for an export.
      origin: the folder of checkpoints that the run begins with. It need not be there any more when
        a run is resumed.
      added: ids of the control tokens that an import has added. A run that begins with other
        checkpoints keeps those of them.

    Returns:
      What each checkpoint must keep in its `extra`: JSON, to be merged into what else it keeps.

    Raises:
      OSError: the file cannot be read or written.
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
        found = hosts.together(lambda: _kept_files(origin, fingerprint), ValueError, OSError)
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
    """Fills in `Lora.token_rows` where a config leaves them open.

    Args:
      model: of a run.
      folder: the run's own checkpoints, which may not exist yet.
      origin: the checkpoints that the run begins with.

    Returns:
      The model, whose adapters train the rows of the control tokens that the import has added.
    """
    if model.lora is None or model.lora.token_rows is not None:
        return model
    return with_token_rows(model, _added_before(folder, origin))


def abstract_params(net: Network, mesh: jax.sharding.Mesh | None, rules: Rules) -> Params:
    """Shapes and dtypes of a network's parameters, and where a mesh puts them.

    Args:
      net: the network.
      mesh: devices; None leaves the place open.
      rules: how the mesh splits parameters.

    Returns:
      The tree of parameters with `jax.ShapeDtypeStruct`s for leaves.
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
    """As `read_record`, without a word to other processes."""
    kept = read_note(folder, step=step).get(_KEY)
    if kept is None:
        raise ValueError(
            f"{folder}/{step} does not say which model, tokenizer and chat template it belongs to, "
            "because an earlier version of tw_jax wrote it. Run tw sft, tw pgrpo or tw convert "
            "again to write a new checkpoint."
        )
    try:
        lines = filter(None, kept["config"].split("\n"))
        config = load_config(LanguageModel, [], list(lines))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{folder}: this version of tw_jax cannot read what the checkpoint says of its model: "
            f"{error} Use the version that wrote it, or convert or train again."
        ) from error
    if not isinstance(config.tokenizer, Bytes):
        path = os.path.join(str(folder), _file_name(config.tokenizer))
        tokenizer = dataclasses.replace(config.tokenizer, path=path)
        config = dataclasses.replace(config, tokenizer=tokenizer)
    return Record(
        step, config, kept["tokenizer"], kept["control_tokens"], tuple(kept.get("added", ()))
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
            f"fingerprint of its vocabulary is {tokenizer.fingerprint[:16]}, and that of the "
            f"checkpoint's is {record.fingerprint[:16]}. Put the tokenizer's own file there."
        )
    require_single_ids(tokenizer, record.control_tokens)
    return tokenizer


def _kept_files(folder: str | Path, fingerprint: str) -> dict[str, bytes]:
    """What an import kept in `hf/`; nothing if its checkpoints have another tokenizer."""
    names = [f"hf/{name}" for name in hf_files.NAMES]
    found = {name: content for name in names if (content := read_beside(folder, name)) is not None}
    if found and read_note(folder).get(_KEY, {}).get("tokenizer") != fingerprint:
        return {}
    return found


def _added_before(folder: str | Path, origin: str | Path | None) -> tuple[int, ...]:
    """The ids of `Record.added`: of a run's own checkpoints, or of its origin."""

    def read() -> tuple[int, ...]:
        for place in (folder, origin):
            # A damaged checkpoint is set aside when the run resumes.
            with contextlib.suppress(FileNotFoundError, DamagedError):
                return tuple(read_note(place).get(_KEY, {}).get("added", ())) if place else ()
        return ()

    # Process 0 decides, because another process may see the folder a moment later.
    return tuple(hosts.gather(hosts.together(read, ValueError, OSError))[0])


def _file_name(cfg: SentencePiece | HuggingFace) -> str:
    """The name of the tokenizer's file in a folder of checkpoints."""
    return "tokenizer.model" if isinstance(cfg, SentencePiece) else "tokenizer.json"
