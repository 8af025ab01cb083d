"""Records that programs exchange: problems, written trajectories and sampled trajectories.

A file has one record per line (JSONL), per row (Parquet) or per entry (ArrayRecord, with the bytes
of the same JSON). The suffix of its name selects the format (`data/formats.py`). Foreign rows are
read too: columns of Hugging Face data sets and ThreadWeaver's tables. A sampled trajectory is
stored by its ids, and its text is never encoded again. This file depends on no tokenizer and no
grammar. It reads and writes `Problem`, `Example` and `Rollout`.
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
    """The tokens that an engine sampled in one call.

    The context of the call is not stored, because it follows from the calls before it.

    Attributes:
      path: () for the parent, (round, label) for a thread.
      sampled: [m] int32 ids.
      logp: [m] float32 log-probs in nats, or None if no sampler produced the ids.
      stop_reason: Reason for the end of the call.
    """

    path: tuple[int | str, ...]
    sampled: np.ndarray
    logp: np.ndarray | None
    stop_reason: StopReason

    def __post_init__(self) -> None:
        needed = f"{len(self.sampled)} numbers, one for each sampled id"
        fits = self.logp is None or self.logp.shape == self.sampled.shape
        _require(fits, "CallRecord.logp", self.logp, needed)


@dataclasses.dataclass(frozen=True, eq=False)
class Rollout(_Record):
    """A sampled trajectory by its ids. Its protocol can rebuild every context from them.

    Attributes:
      id: Name of the rollout.
      question: Text that the model was asked.
      answer: The correct answer as text. "" means unknown.
      fingerprint: Fingerprint of the tokenizer that the ids belong to.
      prompt: [n] int32 ids.
      calls: The calls in the order of the protocol.
      finish: Reason for the end of the rollout.
      counts: Numbers of events by name.
      text: The joined path after the prompt, decoded for readers and graders.
      extra: Further fields as JSON: the hash of the problem, parts of the reward, the group and the
        advantage.
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
        """Makes a rollout of the sampled tokens and the fields `rest`; contexts are not stored."""
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
    """Returns the records of a file in order, and raises the errors of `open_records`."""
    return iter(open_records(path))


def open_records(path: str | Path) -> Records:
    """Opens a file for random access, without loading its records into memory.

    Threads may share the records, and they can be pickled. If the file is overwritten while it is
    open, the next read raises an error. If another file takes its name, the old file is read on.
    Parquet is slow out of order, because a whole row group is decoded to read one row. Use
    ArrayRecord for records that are shuffled.

    Args:
      path: A .jsonl, .parquet or .array_record file. A row without `kind` is a foreign row. Its
        question is in `qwen_text`, `prompt` or `question`. It becomes an `Example` if it has
        `qwen_text` or `response`, and a `Problem` otherwise. docs/data.md lists all columns.

    Returns:
      The records. Reading a record that is not valid raises a ValueError with file and line.

    Raises:
      FileNotFoundError: If the file does not exist.
      ValueError: If the suffix is unknown, or if the content does not have the suffix's format.
    """
    return Records(Path(path))


def write(path: str | Path, records: Iterable[Record]) -> None:
    """Writes a file atomically. After an error the file is as it was before.

    Args:
      path: A .jsonl, .parquet or .array_record file. Its folders are created.
      records: The records. In a Parquet file all must be of one kind.

    Raises:
      ValueError: If the suffix is unknown, or if JSON cannot represent a record.
    """
    path = Path(path)
    write_file = formats.WRITERS[_suffix(path)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as part:
        write_file(part, map(_json_bytes, records))


@contextlib.contextmanager
def append(path: str | Path) -> Iterator[Callable[[Record], None]]:
    """Opens a JSONL file to add records one by one. Each record is flushed at once.

    If a crash left an incomplete last line, it is removed with a warning, and complete records are
    kept. A program that resumes must open its file here before it reads the finished records.

    Args:
      path: A .jsonl file. It and its folders are created. Only one program may append at a time.

    Yields:
      The function add(record).

    Raises:
      ValueError: If the suffix is not .jsonl.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f"{path}: only .jsonl files can be appended to. Use that suffix.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        _repair(path)
    with path.open("ab") as file:

        def add(record: Record) -> None:
            file.write(_json_bytes(record) + b"\n")
            file.flush()

        yield add


def _repair(path: Path) -> None:
    """Ends the last line with a newline, or removes it if it is incomplete."""
    with path.open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = data.rfind(b"\n") + 1
            tail = data[start:]
        if not tail:
            return
        try:
            # A line that parses is complete, because a part of an object is not valid JSON.
            with contextlib.suppress(RecursionError):  # an error when the line is read
                json.loads(tail)
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        except ValueError:
            number, end = sum(1 for _ in file), tail.decode(errors="replace")[-20:]
            file.truncate(start)
            fault = f"the last line was cut short (…{end}) and is removed; the others are kept."
            warnings.warn(f"{path}:{number}: {fault}", stacklevel=4)


def to_json(record: Record) -> dict[str, Any]:
    """Returns a record as a mapping for JSON. Its `kind` is the class of the record."""
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
    """Returns the record of a mapping. A mapping without `kind` is a foreign row.

    Args:
      row: The mapping.
      where: File and line, which begin every error message.
      task: Name of the data set, for a foreign row that has none.
      index: Number of the record. A foreign row without an id gets the id "task:index".

    Raises:
      ValueError: If a field is missing, unknown or of the wrong type.
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
    # The exact type is compared, because isinstance accepts a bool as an int.
    return isinstance(value, list) and all(type(entry) in kinds for entry in value)


def _require(valid: bool, name: str, value: Any, needed: str) -> None:
    if not valid:
        raise TypeError(f"{name} = {value!r:.40} must be {needed}.")


def _require_fields(row: Mapping[str, Any], cls: type[Any], kind: str) -> None:
    """Refuses a row without a required field of `cls`, or with a field that `cls` lacks."""
    fields = dataclasses.fields(cls)
    required = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
    optional = [f.name for f in fields if f.name not in required]
    missing = [name for name in required if name not in row]
    unknown = [name for name in row if name not in required + optional]
    if missing or unknown:
        faults = [f"lacks {', '.join(missing)}"] if missing else []
        faults += [f"must not have {', '.join(unknown)}"] if unknown else []
        article = "An" if kind[0] in "aeiou" else "A"
        rest = f" and may have {', '.join(optional)}" if optional else ""
        raise ValueError(
            f"the {kind} {' and '.join(faults)} ({dict(row)!r:.60}). {article} {kind} must have "
            f"{', '.join(required)}{rest}. Add, rename or remove fields."
        )


# Foreign rows.

_QWEN_TEXT = re.compile(
    r"<\|im_start\|>user\n(.*?)<\|im_end\|>\n<\|im_start\|>assistant\n(.*)<\|im_end\|>\n?",
    re.DOTALL,
)

_READ_COLUMNS = (
    "id uuid question prompt qwen_text response answer reward_model task data_source extra"
)
_COLUMNS = frozenset(_READ_COLUMNS.split())
"""Columns that are read. All others become entries of `extra`."""


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
            f"the columns {', '.join(row) or '(none)'} are not those of a record "
            f"({dict(row)!r:.60}). A row must have question, or prompt with one user message, or "
            "qwen_text. docs/data.md lists all columns."
        )
    model, extra = row.get("reward_model"), row.get("extra")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    answer = _first(truth, row.get("answer"), "")
    needed = "text or a whole number in answer or reward_model.ground_truth. Write it in quotes"
    _require(type(answer) in (int, str), "answer", answer, needed)
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
    # In Parquet a missing value of a row is null.
    return next((value for value in values if value is not None), None)


def _from_qwen_text(text: Any) -> tuple[str, str]:
    match = _QWEN_TEXT.fullmatch(text) if isinstance(text, str) else None
    question, response = match.groups() if match else ("<|im_", "")
    needed = "Qwen's template with one user turn, one assistant turn and nothing else"
    _require("<|im_" not in question + response, "qwen_text", text, needed)
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
    """Random access to the records of a file. Threads may share it.

    A pickled copy opens the same file again, and raises an error if the file has changed.
    """

    def __init__(self, path: Path, facts: formats.Facts | None = None) -> None:
        """Opens the file; see `open_records`. If `facts` are given, the file must have them."""
        self._path = path
        suffix = _suffix(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file. Write it, or correct the path.")
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
        except RecursionError:  # from an error message that quotes the value
            raise ValueError(f"{where}: lists or objects are nested too deeply.") from None

    def where(self, index: int) -> str:
        """Returns the file and the line, row or record of an index, 0 <= index < len."""
        return self._rows.where(index)

    def require_unchanged(self) -> None:
        """Refuses a file that was overwritten or replaced since it was opened.

        Raises:
          ValueError: If the file with this name is not the opened one.
        """
        self._rows.require_unchanged()


def _suffix(path: Path) -> str:
    if path.suffix not in formats.OPENERS:
        raise ValueError(
            f"{path}: the file name must end in {', '.join(formats.OPENERS)}. Rename it. A file "
            "with one JSON object per line is .jsonl."
        )
    return path.suffix


def _json_bytes(record: Record) -> bytes:
    try:
        return json.dumps(to_json(record), ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{type(record).__name__} {record.id!r} does not fit into JSON: {error}. Use only "
            "finite numbers, strings, lists and mappings."
        ) from None
