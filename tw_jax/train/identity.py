"""The identity of a run: its config, the content of its files, and its initial parameters.

Every checkpoint stores it as its note. A run is resumed only with the same identity, so that all
its numbers belong to one experiment. `MAY_CHANGE` lists the fields that may change; every other
field of every config must keep its value.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tw_jax import hosts
from tw_jax.checkpoint import Checkpoints, identity, newest, restore_params
from tw_jax.config import operative
from tw_jax.contracts import Params
from tw_jax.models.lora import without_adapters

_KINDS: Mapping[str, tuple[str, ...]] = {
    # The folder can be moved. A file can be moved too, because its content is compared.
    "place": (
        *("Sft.workdir", "Pgrpo.workdir", "Sft.init", "Pgrpo.init", "Data.path", "Pgrpo.problems"),
        *("Evaluation.problems", "HuggingFace.path", "SentencePiece.path"),
    ),
    # The schedule that follows from these is compared.
    "schedule": (
        *("Sft.steps", "Pgrpo.steps"),
        *("Optim.decay_steps", "Optim.warmup_ratio", "Optim.warmup_steps"),
    ),
    # Saving, reporting and guards. No parameter depends on them.
    "report": (
        *("Sft.save_every", "Pgrpo.save_every", "Sft.keep", "Pgrpo.keep"),
        *("Evaluation.every", "Grader.workers", "Pgrpo.max_mismatch"),
    ),
    # How the same sums are computed. Numbers are equal up to rounding, no longer bit by bit.
    "rounding": (
        *("Sft.mesh", "Pgrpo.mesh", "Mesh.*", "Sft.rules", "Pgrpo.rules", "Rules.*"),
        *("Sft.accumulation_steps", "Sft.chunk_tokens", "Pgrpo.chunk_tokens"),
        "Pgrpo.microbatch_rows",
        *("Model.attention", "Model.remat", "Sampler.prefill_chunk"),
    ),
}
MAY_CHANGE: Mapping[str, str] = {name: kind for kind, names in _KINDS.items() for name in names}
"""The fields that may differ when a run is resumed, and the kind of each.

`Mesh.*` stands for all fields of `Mesh`.
"""


class Origin(NamedTuple):
    """The initial parameters of a run: a checkpoint of another run."""

    step: int
    identity: str


class Identity(NamedTuple):
    """The identity of a run, and the changes since its newest checkpoint."""

    config: str
    contents: dict[str, str]
    origin: Origin | None
    changed: tuple[str, ...] = ()

    @property
    def note(self) -> dict[str, Any]:
        """The JSON value that every checkpoint of the run stores."""
        origin = None if self.origin is None else self.origin._asdict()
        return {"config": self.config, "contents": self.contents, "origin": origin}

    @property
    def digest(self) -> str:
        """16 hexadecimal digits of a hash of everything that must not change."""
        kept = {name: value for name, value in _fields(self.config).items() if not _may(name)}
        text = json.dumps([kept, self.contents, self.origin], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def establish(
    cfg: Any, checkpoints: Checkpoints, *, needs_init: bool = False, **contents: str
) -> Identity:
    """Returns the identity of a run, and refuses to resume a run with another identity.

    Args:
      cfg: Root config with `workdir`, `steps` and `init`.
      checkpoints: Checkpoints of the run.
      needs_init: Whether a resumed run reads the parameters of `init` again.
      contents: Fingerprints of the files that the config names.

    Returns:
      The identity; `changed` lists the fields that differ from the newest checkpoint's.

    Raises:
      ValueError: In every process, if the run was started with another identity, has taken more
        steps than the config asks for, or needs parameters that are gone or changed.
      FileNotFoundError: If the run starts and `init` has no checkpoint.
    """
    now = Identity(operative(cfg), dict(contents), None)
    # All processes check what process 0 has read, so that either all or none of them stop.
    before, taken = hosts.gather([checkpoints.note(), checkpoints.latest() or 0])[0]
    if before is None:
        now = now._replace(origin=hosts.together(lambda: _origin_of(cfg.init), ValueError, OSError))
    else:
        changed = _refuse_changes(cfg, now, before, taken=taken)
        origin = before.get("origin") and Origin(**before["origin"])
        is_moved = any(name.endswith(".init") for name in changed)
        if origin is not None and (needs_init or is_moved):
            hosts.together(lambda: _refuse_other_origin(cfg, origin), ValueError, OSError)
        now = now._replace(origin=origin, changed=tuple(changed.values()))
    hosts.agree(run=now.digest)
    return now


def origin_params(init: str, origin: Origin, abstract: Params) -> Params:
    """The initial parameters of a run, without adapters if the checkpoint has none.

    Args:
      init: Folder of checkpoints.
      origin: The checkpoint to read.
      abstract: The tree of the run's parameters, with shardings.

    Raises:
      FileNotFoundError: If the checkpoint does not exist any more.
      ValueError: If its parameters do not fit `abstract`.
    """
    core = without_adapters(abstract)
    return restore_params(init, step=origin.step, abstract=abstract, core=core)


def standing(who: Identity, *, first: int, steps: int) -> str:
    """Lines for the user: the changed fields, and whether the run is finished."""
    lines = ""
    if first and who.changed:
        lines = (
            f"Resumed with {'; '.join(who.changed)}. Another mesh, backend or chunk size changes "
            "numbers by rounding.\n"
        )
    return lines + (
        f"The run is finished: all {steps} steps are taken.\n" if first >= steps else ""
    )


def differences(before: str, now: str) -> dict[str, tuple[str | None, str | None]]:
    """The fields whose values differ between two configs as `operative` writes them.

    Returns:
      (old, new) by field, as gin text; None if a config lacks the field. If only one of the two has
      a class, only the field that refers to that class is listed.
    """
    old, new = _fields(before), _fields(now)
    common = {_holder(name) for name in old} & {_holder(name) for name in new}
    return {
        name: (old.get(name), new.get(name))
        for name in {**new, **old}
        if _holder(name) in common and old.get(name) != new.get(name)
    }


def _refuse_changes(
    cfg: Any, now: Identity, before: Mapping[str, Any], *, taken: int
) -> dict[str, str]:
    """The allowed changes by field; raises one error about all others."""
    root = type(cfg).__name__
    found = differences(before.get("config", ""), now.config)
    changes = {name: f"{name} = {new} (was {old})" for name, (old, new) in found.items()}
    # A run that begins with a checkpoint and one that begins without are different runs.
    is_place = {name for name in found if MAY_CHANGE.get(name) == "place"}
    allowed = {
        name: text
        for name, text in changes.items()
        if _may(name) and not (name in is_place and {None, "None"} & {*found[name]})
    }
    refused = [text for name, text in changes.items() if name not in allowed]
    # Two verbs can agree in all configs that they share, but their step numbers mean different
    # things.
    root_then = _holder(next(iter(_fields(before.get("config", ""))), "")) or "none recorded"
    if root_then != root:
        refused.insert(0, f"root config: {root} (was {root_then})")
    recorded = before.get("contents", {})
    for name, value in now.contents.items():
        if recorded.get(name) != value:
            refused.append(f"{name}: {value} (was {recorded.get(name, 'not recorded')})")
    advice = ""
    if f"{root}.steps" in found and recorded.get("schedule") != now.contents.get("schedule"):
        advice = f" Set Optim.decay_steps = {_length(before['config'], root)} to keep the schedule."
    if cfg.steps < taken:
        refused.append(f"{root}.steps = {cfg.steps} ({taken} steps are taken)")
    if refused:
        raise ValueError(
            f"{cfg.workdir} holds a run with other settings: {'; '.join(refused)}.{advice} Set "
            f"them back to resume that run, or set another {root}.workdir; {root}.init = "
            f"'{cfg.workdir}/checkpoints' there begins with the parameters of this one."
        )
    return allowed


def _refuse_other_origin(cfg: Any, origin: Origin) -> None:
    name = f"{type(cfg).__name__}.init = {cfg.init!r}"
    recorded = f"The run began with its step {origin.step}, identity {origin.identity}"
    advice = "Put that checkpoint back to resume, or start a new run in another workdir."
    try:
        found = identity(cfg.init, step=origin.step)
    except FileNotFoundError as error:
        raise ValueError(
            f"{name} lacks the parameters of this run. {recorded}. {error} {advice}"
        ) from error
    if found != origin.identity:
        raise ValueError(
            f"{name} has other parameters than before. {recorded}; now the identity is {found}. "
            f"{advice}"
        )


def _origin_of(init: str | None) -> Origin | None:
    if init is None:
        return None
    step = newest(init)
    return Origin(step, identity(init, step=step))


# Configs as text.


def _fields(text: str) -> dict[str, str]:
    lines = (line.partition(" = ") for line in text.splitlines() if line)
    return {name: value for name, _, value in lines}


def _holder(name: str) -> str:
    return name.rpartition(".")[0]


def _may(name: str) -> bool:
    return name in MAY_CHANGE or f"{_holder(name)}.*" in MAY_CHANGE


def _length(config: str, root: str) -> str:
    """The length of the schedule of a config."""
    fields = _fields(config)
    length = fields.get("Optim.decay_steps", "None")
    return fields.get(f"{root}.steps", "?") if length == "None" else length
