"""Files of rows in three formats: JSON lines, Parquet and ArrayRecord.

Only this file imports pyarrow and array_record. A row is a mapping, which `data/records.py` turns
into a record. Every error message begins with the file and the line, row or record.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import json
import os
import threading
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from tw_jax import strict_json

Facts = tuple[int, int, int]
"""Inode, size and modification time in nanoseconds of a file."""

_NESTED = ("extra", "prompt", "calls", "counts")  # stored as JSON text in Parquet
_GROUP_ROWS = 256  # small, because a whole Parquet row group is decoded to read one row


class Rows:
    """The rows of one file, in any order. Threads may share them.

    The file stays open, so another file that takes its name later is not read. If the file is
    overwritten while it is open, the next read raises an error.

    Attributes:
      facts: Facts of the opened file.
    """

    def __init__(self, path: Path, facts: Facts | None = None) -> None:
        """Opens the file.

        Args:
          path: The file.
          facts: If given, the file must have these facts.

        Raises:
          ValueError: If the file has another format or other facts.
        """
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        self.facts = _facts(os.fstat(self._descriptor))
        if facts is not None:
            self._require(facts == self.facts)
        try:
            self._length = self._index()
        finally:
            self.require_unchanged()

    def __len__(self) -> int:
        return self._length

    def row(self, index: int) -> Mapping[str, Any]:
        """Returns one row, 0 <= index < len.

        Raises:
          ValueError: If the row cannot be read, or if the file has changed since it was opened.
        """
        try:
            data = self._data(index)
        finally:
            # An overwritten file must be reported as such, and not as a damaged row.
            self._require(_facts(os.fstat(self._descriptor)) == self.facts)
        return data if isinstance(data, Mapping) else parse(data, self.where(index))

    def where(self, index: int) -> str:
        """Returns the file and the place of a row, which begin an error message."""
        raise NotImplementedError

    def require_unchanged(self) -> None:
        """Refuses a file that was overwritten or replaced since it was opened.

        Raises:
          ValueError: If the file with this name is not the opened one.
        """
        self._require(_facts(os.fstat(self._descriptor)) == self.facts)
        with contextlib.suppress(FileNotFoundError):
            self._require(_facts(os.stat(self._path)) == self.facts)

    def _require(self, same: bool) -> None:
        if not same:
            raise ValueError(
                f"{self._path} was changed while it was being read. Old and new records would be "
                "mixed, so reading stops. Start the same command again, and write a changed file "
                "under another name."
            )

    def _index(self) -> int:
        """Finds the rows and returns their number."""
        raise NotImplementedError

    def _data(self, index: int) -> bytes | Mapping[str, Any]:
        """Returns a row or its JSON text."""
        raise NotImplementedError


def _facts(stat: os.stat_result) -> Facts:
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


class _Jsonl(Rows):
    def _index(self) -> int:
        self._starts, self._ends, self._numbers, at = array("q"), array("q"), array("q"), 0
        # A binary file splits lines only at \n, and not at U+2028 inside a string.
        with open(self._descriptor, "rb", closefd=False) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    self._starts.append(at)
                    self._ends.append(at + len(line))
                    self._numbers.append(number)
                at += len(line)
        return len(self._starts)

    def where(self, index: int) -> str:
        return f"{self._path}:{self._numbers[index]}"

    def _data(self, index: int) -> bytes:
        # pread has no shared position, so threads and forked processes can read in parallel.
        start, parts = self._starts[index], []
        while start < self._ends[index]:
            part = os.pread(self._descriptor, self._ends[index] - start, start)
            if not part:
                break
            parts.append(part)
            start += len(part)
        return b"".join(parts).rstrip(b"\r\n")


class _Parquet(Rows):
    def _index(self) -> int:
        try:
            file = pq.ParquetFile(self._path)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(
                f"{self._path}: not a Parquet file ({error}). Write it again."
            ) from None
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"{self._path}: the column {twice[0]!r} occurs twice. Keep one of them."
            )
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        self._ends = list(itertools.accumulate(sizes, initial=0))
        self._table_of = functools.lru_cache(maxsize=4)(file.read_row_group)
        self._lock = threading.Lock()
        return self._ends[-1]

    def where(self, index: int) -> str:
        return f"{self._path}: row {index}"

    def _data(self, index: int) -> Mapping[str, Any]:
        group, where = bisect.bisect_right(self._ends, index) - 1, self.where(index)
        try:
            with self._lock:
                table = self._table_of(group)
            fields = table.slice(index - self._ends[group], 1).to_pylist()[0]
        except (pa.ArrowException, OSError, ValueError, TypeError, ArithmeticError) as error:
            raise ValueError(
                f"{where}: a column cannot be read ({error}). Write the file again with columns "
                "of text, numbers, lists and structs."
            ) from None
        if "kind" in fields:
            texts = (name for name in _NESTED if isinstance(fields.get(name), str))
            fields |= {n: _load(fields[n], f"{where}, column {n}") for n in texts}
        return fields


class _ArrayRecord(Rows):
    def _index(self) -> int:
        # Records are read one by one in any order, so reading ahead would be wasted.
        self._reader = array_record_module.ArrayRecordReader(
            str(self._path), options="readahead_buffer_size:0", file_reader_buffer_size=1 << 15
        )
        if not self._reader.ok():
            raise ValueError(
                f"{self._path}: not an ArrayRecord file, or cut short. Write it again."
            )
        return self._reader.num_records()

    def where(self, index: int) -> str:
        return f"{self._path}: record {index}"

    def _data(self, index: int) -> bytes:
        try:
            return self._reader.read([index])[0]
        except RuntimeError as error:
            raise ValueError(
                f"{self.where(index)}: damaged ({error}). Write the file again."
            ) from None


# Writing: one JSON object for each row.


def _write_jsonl(path: Path, rows: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        file.writelines(row + b"\n" for row in rows)


def _write_array_record(path: Path, rows: Iterable[bytes]) -> None:
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    with contextlib.closing(writer):
        for row in rows:
            writer.write(row)


def _write_parquet(path: Path, rows: Iterable[bytes]) -> None:
    read: Iterator[dict[str, Any]] = map(json.loads, rows)
    group = list(itertools.islice(read, _GROUP_ROWS))
    names = list(group[0]) if group else ["kind"]
    kind = group[0]["kind"] if group else ""
    schema = pa.schema([(name, pa.string()) for name in names])
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        while group:
            for row in group:
                if row["kind"] != kind:
                    raise ValueError(
                        f"{path}: a Parquet file must have one kind of record, got {kind} and "
                        f"{row['kind']}. Write two files, or a .jsonl file."
                    )
                nested = (name for name in _NESTED if name in row)
                row |= {name: json.dumps(row[name], ensure_ascii=False) for name in nested}
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
            group = list(itertools.islice(read, _GROUP_ROWS))


OPENERS: dict[str, type[Rows]] = {
    ".jsonl": _Jsonl,
    ".parquet": _Parquet,
    ".array_record": _ArrayRecord,
}
WRITERS: dict[str, Callable[[Path, Iterable[bytes]], None]] = {
    ".jsonl": _write_jsonl,
    ".parquet": _write_parquet,
    ".array_record": _write_array_record,
}


# Parsing JSON.


def parse(data: bytes, where: str) -> Mapping[str, Any]:
    """Returns the JSON object of a line.

    Raises:
      ValueError: If the line is not UTF-8, not JSON or not an object, has a key twice, or is nested
        too deeply. The message begins with `where`.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        text = data[: error.start].decode()
        if error.reason != "unexpected end of data":  # a cut is reported as JSON below
            fault = f"byte {error.start} is not UTF-8 (…{text[-20:]}). Save the file as UTF-8."
            raise ValueError(f"{where}: {fault}") from None
    row = _load(text, where)
    if not isinstance(row, dict):
        raise ValueError(f"{where}: {text[:40]} must be a JSON object. Give each value a name.")
    return row


def _load(text: str, where: str) -> Any:
    try:
        return strict_json.parse(text)
    except json.JSONDecodeError as error:
        fault = f"not JSON at column {error.colno}: {error.msg} ({text[:60]}). Correct that line."
        inside = "string" if error.msg.startswith("Unterminated string") else "object"
        is_open = error.pos >= len(text) or (text[:1] == "{" and text[-1:] != "}")
        if is_open or inside == "string":
            fault = (
                f"the line ends inside a JSON {inside} (…{text[-20:]}). The file was cut short; "
                "delete that line or write the file again."
            )
        raise ValueError(f"{where}: {fault}") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
