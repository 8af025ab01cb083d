"""What is kept between programs: problems, written trajectories and sampled ones, in three formats.

A file holds one record a line (JSONL), a row (Parquet) or an entry (ArrayRecord, the bytes of the
same JSON); its suffix says which (`data/formats.py`). Rows that others wrote, Hugging Face columns
and ThreadWeaver's tables, are read as well. A sampled trajectory is kept by ids and never encoded
again. This file knows no tokenizer and no grammar; it hands on `Problem`, `Example` and `Rollout`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import mmap
import operator
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np

from tw_jax import files
from tw_jax.data import formats
from tw_jax.forkjoin.calls import StopReason, Trajectory
from tw_jax.strict_json import check_fields
from tw_jax.tasks.task import Problem


class _Record:
    def __post_init__(self) -> None:
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class Example(_Record):
    """A problem with a written response, control tokens included.

    Attributes:
      id: Name of the problem, unique within a file.
      question: Text that the model is asked.
      response: All text after the prompt, without the end of sequence.
      answer: The correct answer as text. "" means unknown.
      task: Name of the task or the data set that the problem comes from.
      extra: Further fields of the task, as JSON.
    """

    id: str
    question: str
    response: str
    answer: str = ""
    task: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def problem(self) -> Problem:
        """The problem without the response."""
        fields = {name: value for name, value in vars(self).items() if name != "response"}
        return Problem(**fields)


@dataclasses.dataclass(frozen=True, eq=False)
class CallRecord:
    """What an engine drew in one call; its context follows from the calls before it.

    Attributes:
      path: () for the parent; (round, label) for a thread.
      sampled: [m] int32 ids.
      logp: [m] float32 in nats, or None where no sampler was involved.
      stop_reason: why the call ended.
    """

    path: tuple[int | str, ...]
    sampled: np.ndarray
    logp: np.ndarray | None
    stop_reason: StopReason

    def __post_init__(self) -> None:
        want = f"{len(self.sampled)} numbers, one for each sampled id"
        fits = self.logp is None or self.logp.shape == self.sampled.shape
        _require(fits, "CallRecord.logp", self.logp, want)


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout(_Record):
    """A sampled trajectory by ids, from which its protocol can rebuild every context.

    Attributes:
      id: names the rollout.
      question: what the model was asked.
      answer: the right answer as text; "" where none is known.
      fingerprint: of the tokenizer that the ids belong to.
      prompt: [n] int32 ids.
      calls: in protocol order.
      finish: why the rollout ended.
      counts: events of interest by name.
      text: the joined path behind the prompt, decoded for readers and graders.
      extra: what else is known, as JSON: the hash of its problem; reward parts, group, advantage.
    """

    id: str
    question: str
    answer: str
    fingerprint: str
    prompt: np.ndarray
    calls: tuple[CallRecord, ...]
    finish: str
    counts: Mapping[str, int]
    text: str
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_trajectory(cls, trajectory: Trajectory, problem: Problem, **rest: Any) -> Rollout:
        """Keeps what was drawn, and `rest`; contexts and forced ids the protocol rebuilds."""
        return cls(
            question=problem.question,
            answer=problem.answer,
            prompt=trajectory.ids[: trajectory.prompt_tokens],
            calls=tuple(
                CallRecord(c.path, c.sampled, c.logp, c.stop_reason) for c in trajectory.calls
            ),
            finish=trajectory.finish,
            counts=trajectory.counts,
            **rest,
        )


Record = Problem | Example | Rollout
_KINDS: dict[str, type[Record]] = {"problem": Problem, "example": Example, "rollout": Rollout}


def read(path: str | Path) -> Iterator[Record]:
    """The records of a file in order; raises as `open_records` does."""
    return iter(open_records(path))


def open_records(path: str | Path) -> Records:
    """Opens a file for random access, without holding its records in memory.

    The sequence may be shared by threads and pickled. A file that is overwritten while it is read
    is refused by the next read; one that is replaced under its name is read on as it was. Reading
    Parquet out of order decodes a row group for a row; write ArrayRecord where records are
    shuffled.

    Args:
      path: a .jsonl, .parquet or .array_record file. A row without a `kind` is somebody else's:
        with `qwen_text`, or with `question` or ThreadWeaver's `prompt`, and with `response` it is
        an `Example`, else a `Problem`; `reward_model`, `answer`, `data_source`, `id` and `uuid`
        are understood.

    Returns:
      The records; one that does not fit raises ValueError when it is read, naming file and line.

    Raises:
      FileNotFoundError: the file is not there.
      ValueError: an unknown suffix, or a file of another format than its suffix says.
    """
    return Records(Path(path))


def write(path: str | Path, records: Iterable[Record]) -> None:
    """Writes a file in one move: it is there whole or, after an error, as it was before.

    Args:
      path: a .jsonl, .parquet or .array_record file; folders are made.
      records: a Parquet file takes one kind of record, the other formats any.

    Raises:
      ValueError: an unknown suffix, or a record that JSON cannot hold.
    """
    path = Path(path)
    write_file = formats.WRITERS[_suffix(path)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as part:
        write_file(part, map(_json_bytes, records))


@contextlib.contextmanager
def append(path: str | Path) -> Iterator[Callable[[Record], None]]:
    """Opens a JSONL file to add records as they are finished; each is handed to the system at once.

    A last line that a crash cut short is cut off with a warning, whole records are kept. So a
    program that resumes opens its file here first and then reads what it had finished.

    Args:
      path: a .jsonl file; it and its folders are made. One program at a time.

    Yields:
      add(record).

    Raises:
      ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"{path}: only .jsonl files can be appended to. Use that suffix.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        _mend(path)
    with path.open("ab") as file:

        def add(record: Record) -> None:
            file.write(_json_bytes(record) + b"\n")
            file.flush()

        yield add


def _mend(path: Path) -> None:
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = data.rfind(b"\n") + 1
            tail = data[start:]
        if not tail:
            return
        try:
            # Only the newline is missing: no part of an object is an object.
            with contextlib.suppress(RecursionError):  # whoever reads the line refuses it
                json.loads(tail)
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        except ValueError:
            number, end = sum(1 for _ in file), tail.decode(errors="replace")[-20:]
            file.truncate(start)
            told = f"the last line was cut short (…{end}) and is removed; the others are kept."
            warnings.warn(f"{path}:{number}: {told}", stacklevel=4)


def to_json(record: Record) -> dict[str, Any]:
    """The record as a mapping that JSON can hold; `kind` says which record it is."""
    kind = type(record).__name__.lower()
    row = {"kind": kind} | vars(record)
    if isinstance(record, Rollout):
        row["prompt"] = record.prompt.tolist()
        row["counts"] = dict(record.counts)
        row["calls"] = [
            {
                "path": list(call.path),
                "sampled": call.sampled.tolist(),
                "logp": None if call.logp is None else call.logp.tolist(),
                "stop_reason": call.stop_reason.value,
            }
            for call in record.calls
        ]
    return row


def from_json(row: Mapping[str, Any], *, where: str, task: str, index: int) -> Record:
    """The record that a mapping holds: one of ours by its `kind`, else somebody else's columns.

    Args:
      row: the mapping.
      where: file and line, to begin a sentence with.
      task: names the set where a foreign row does not.
      index: with `task` names the record where a foreign row does not.

    Raises:
      ValueError: a field is missing, unknown or of another type.
    """
    try:
        if "kind" not in row:
            return _from_foreign(row, task, index)
        kind = row["kind"]
        _require(kind in list(_KINDS), "kind", kind, f"one of {', '.join(_KINDS)}")
        fields = {name: value for name, value in row.items() if name != "kind"}
        _require_fields(fields, _KINDS[kind], kind)
        if kind == "rollout":
            calls, counts = row["calls"], row["counts"]
            _require(isinstance(calls, list), "calls", calls, "a list")
            whole = isinstance(counts, dict) and _is_list([*counts.values()], int)
            _require(whole, "counts", counts, "an object of integers")
            fields |= {"prompt": _ids(row["prompt"], "prompt"), "calls": tuple(map(_call, calls))}
        return _KINDS[kind](**fields)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from None


def _call(row: Any) -> CallRecord:
    _require(isinstance(row, dict), "calls", row, "an object for each call")
    _require_fields(row, CallRecord, "call")
    path, logp, stop_reason = row["path"], row["logp"], row["stop_reason"]
    _require(_is_list(path, int, str), "calls: path", path, "a list of integers and strings")
    _require(logp is None or _is_list(logp, int, float), "calls: logp", logp, "numbers or null")
    reasons = [member.value for member in StopReason]
    _require(
        stop_reason in reasons, "calls: stop_reason", stop_reason, f"one of {', '.join(reasons)}"
    )
    with np.errstate(over="ignore"):  # refused on the next line
        logp = None if logp is None else np.array(logp, np.float32)
    finite = logp is None or bool(np.isfinite(logp).all())
    _require(finite, "calls: logp", row["logp"], "finite float32 numbers")
    return CallRecord(
        tuple(path), _ids(row["sampled"], "calls: sampled"), logp, StopReason(stop_reason)
    )


def _ids(value: Any, name: str) -> np.ndarray:
    valid = _is_list(value, int) and all(0 <= id < 2**31 for id in value)
    _require(valid, name, value, "a list of token ids, integers from 0")
    return np.array(value, np.int32)


def _is_list(value: Any, *kinds: type) -> bool:
    # By exact type: a bool is an int to isinstance.
    return isinstance(value, list) and all(type(entry) in kinds for entry in value)


def _require(valid: bool, name: str, value: Any, want: str) -> None:
    if not valid:
        raise TypeError(f"{name} = {value!r:.40} must be {want}.")


def _require_fields(row: Mapping[str, Any], cls: type[Any], kind: str) -> None:
    """Refuses a row that lacks a field without a default, or has a field that `cls` does not."""
    fields = dataclasses.fields(cls)
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    optional = [f.name for f in fields if f.name not in required]
    missing = [name for name in required if name not in row]
    unknown = [name for name in row if name not in required + optional]
    if missing or unknown:
        faults = [f"lacks {', '.join(missing)}"] if missing else []
        faults += [f"has the unknown {', '.join(unknown)}"] if unknown else []
        rest = f" and may have {', '.join(optional)}" if optional else ""
        raise ValueError(
            f"the {kind} {' and '.join(faults)} ({dict(row)!r:.60}). A {kind} must have "
            f"{', '.join(required)}{rest}. Add, rename or remove fields."
        )


# Rows that others wrote.

_QWEN_TEXT = re.compile(
    r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(.*)<\|im_end\|>\n?",
    re.DOTALL,
)

_READ_COLUMNS = (
    "id uuid question prompt qwen_text response answer reward_model task data_source extra"
)
_COLUMNS = frozenset(_READ_COLUMNS.split())
"""The columns that are read. All others become entries of `extra`."""


def _from_foreign(row: Mapping[str, Any], task: str, index: int) -> Problem | Example:
    response = row.get("response")
    if "qwen_text" in row:
        question, response = _from_qwen_text(row["qwen_text"])
    elif "prompt" in row:
        question = _from_messages(row["prompt"])
    elif "question" in row:
        question = row["question"]
    else:
        raise ValueError(
            f"the columns {', '.join(row) or '(none)'} make no record ({dict(row)!r:.60}). A row "
            "needs question, or prompt with one user message, or qwen_text; docs/data.md lists "
            "all columns."
        )
    model, extra = row.get("reward_model"), row.get("extra")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    answer = _first(truth, row.get("answer"), "")
    want = "text or a whole number in answer or reward_model.ground_truth. Write it in quotes"
    _require(type(answer) in (int, str), "answer", answer, want)
    _require(extra is None or isinstance(extra, dict), "extra", extra, "an object")
    others = {name: value for name, value in row.items() if name not in _COLUMNS}
    fields = {
        "id": str(_first(row.get("id"), row.get("uuid"), f"{task}:{index}")),
        "question": question,
        "answer": str(answer),
        "task": _first(row.get("task"), row.get("data_source"), task),
        "extra": others | (extra or {}),
    }
    return Problem(**fields) if response is None else Example(response=response, **fields)


def _first(*values: Any) -> Any:
    # Parquet has null where a row lacks a column that others have.
    return next((value for value in values if value is not None), None)


def _from_qwen_text(text: Any) -> tuple[str, str]:
    match = _QWEN_TEXT.fullmatch(text) if isinstance(text, str) else None
    question, response = match.groups() if match else ("<|im_", "")
    want = "Qwen's template with one user turn, one assistant turn and nothing else"
    _require("<|im_" not in question + response, "qwen_text", text, want)
    return question, response


def _from_messages(prompt: Any) -> str:
    match prompt:
        case [{"role": "user", "content": content}]:
            return content
    raise ValueError(
        f"prompt = {prompt!r:.60} must be a list of one message, "
        '[{"role": "user", "content": "…"}]. Put a plain question into the column question.'
    )


# A file of records.


class Records(Sequence[Record]):
    """Random access to a file; thread-safe. A pickled copy reads the same file or refuses."""

    def __init__(self, path: Path, facts: formats.Facts | None = None) -> None:
        """Opens the file; see `open_records`. `facts` are of the file that must be there."""
        self._path = path
        suffix = _suffix(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file. Write it, or mend the path.")
        self._rows = formats.OPENERS[suffix](path, facts)

    def __reduce__(self) -> tuple[type[Records], tuple[Path, formats.Facts]]:
        return Records, (self._path, self._rows.facts)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: SupportsIndex) -> Record:
        i = operator.index(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self._path}: record {i} of {len(self)}.")
        i %= len(self)
        row, where = self._rows.row(i), self.where(i)
        try:
            return from_json(row, where=where, task=self._path.stem, index=i)
        except RecursionError:  # of a fault that quotes what it found
            raise ValueError(f"{where}: lists or objects are nested too deeply.") from None

    def where(self, index: int) -> str:
        """File and line, row or record, to begin a sentence with; 0 <= index < len."""
        return self._rows.where(index)

    def require_unchanged(self) -> None:
        """Refuses a file that was overwritten or replaced since it was opened.

        Raises:
          ValueError: the file of this name is not the one that was opened.
        """
        self._rows.require_unchanged()


def _suffix(path: Path) -> str:
    if path.suffix not in formats.OPENERS:
        raise ValueError(
            f"{path}: want a file name that ends in {', '.join(formats.OPENERS)}. Rename it; a "
            ".json file of one object a line is .jsonl."
        )
    return path.suffix


def _json_bytes(record: Record) -> bytes:
    try:
        return json.dumps(to_json(record), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{type(record).__name__} {record.id!r} does not fit into JSON: {error}. Keep to "
            "finite numbers, strings, lists and mappings."
        ) from None
