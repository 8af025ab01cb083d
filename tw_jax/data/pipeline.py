"""Builds packed batches of tries from records.

Only this file imports grain. Every host reads its own share of the records, packs its own rows and
saves its own position. Sampled trajectories keep their ids, and only written text is encoded. This
file depends on no model. The train loop gets a `TrieBatch` of numpy arrays.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any, Literal

import grain
import numpy as np

from tw_jax.bounds import require, require_text
from tw_jax.config import configurable
from tw_jax.data.diagnose import MAX_LISTED, list_unusable
from tw_jax.data.records import Example, Record, Records, Rollout, open_records
from tw_jax.data.stored import fingerprint, trajectory_of
from tw_jax.forkjoin.calls import Trajectory
from tw_jax.forkjoin.replay import RecordError
from tw_jax.forkjoin.threadweaver.protocol import ThreadWeaver
from tw_jax.forkjoin.threadweaver.written import replay_response
from tw_jax.forkjoin.tries import chain_trie, trajectory_trie
from tw_jax.tokenizer.chat import Chat
from tw_jax.tokenizer.ids import check_ids
from tw_jax.tokenizer.interface import Tokenizer
from tw_jax.trie.batch import TrieBatch, stack_rows
from tw_jax.trie.pack import Packing, PackingStats, fit_row, pack
from tw_jax.trie.tree import Trie, flat_labels


@configurable
class Data:
    """The trajectories of a training run, and the tokens that are trained.

    Attributes:
      path: A file of examples or rollouts (JSONL, Parquet, ArrayRecord).
      chat: Chat template that turns a question into a prompt.
      labels: "calls" trains the sampled tokens of every call. "flat" trains all tokens after the
        prompt, each predicted from the token before it in the text, as the reference does.
        "sequential" trains the joined path as one plain sequence (the AR baseline).
      unusable: Treatment of records that no call of the protocol could have written, or whose
        threads have no numbered outlines: "refuse" stops and lists all of them, "drop" leaves them
        out, names each once and counts them.
      seed: Seed of the shuffle, which differs in each epoch. None keeps the order of the file.
    """

    path: str
    chat: Chat
    labels: Literal["calls", "flat", "sequential"] = "calls"
    unusable: Literal["refuse", "drop"] = "refuse"
    seed: int | None = 0

    def check(self) -> None:
        """Refuses an empty path and a seed below 0."""
        require_text(self, "path")
        require(self, "seed", least=0)


class Builder:
    """Builds the trie of a record."""

    def __init__(self, cfg: Data, tokenizer: Tokenizer, protocol: ThreadWeaver) -> None:
        """Stores the config, the tokenizer and the protocol."""
        self._cfg, self._tokenizer, self._protocol = cfg, tokenizer, protocol

    def trie(self, record: Record, where: str) -> Trie:
        """Returns the trie of a record, with the labels of the config.

        Raises:
          ValueError: If no calls of the protocol could have written the record. The message begins
            with `where`.
        """
        trajectory = self.trajectory(record, where)
        if self._cfg.labels == "sequential":
            return chain_trie(trajectory)
        trie = trajectory_trie(trajectory)
        if self._cfg.labels == "flat":
            return flat_labels(trie, trajectory.prompt_tokens)
        return trie

    def trajectory(self, record: Record, where: str) -> Trajectory:
        """Returns the calls of a record, replayed from its text or rebuilt from its ids."""
        if isinstance(record, Rollout):
            return self._rebuilt(record, where)
        if not isinstance(record, Example):
            raise ValueError(
                f"{where}: a {type(record).__name__.lower()} without a response has no trajectory. "
                "The record must be an example or a rollout. Write trajectories with `tw make` or "
                "`tw sample`."
            )
        try:
            return replay_response(
                self._protocol,
                self._tokenizer,
                self._cfg.chat,
                question=record.question,
                response=record.response,
            )
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _rebuilt(self, record: Rollout, where: str) -> Trajectory:
        if record.fingerprint != self._tokenizer.fingerprint:
            raise ValueError(
                f"{where}: the rollout has ids of the tokenizer {record.fingerprint[:12]}. They "
                f"must be of the tokenizer {self._tokenizer.fingerprint[:12]}. Use the tokenizer "
                "that the rollout was sampled with."
            )
        size = self._tokenizer.vocab_size
        check_ids(record.prompt, size, where)
        for call in record.calls:
            check_ids(call.sampled, size, where)
        try:
            return trajectory_of(self._protocol, record)
        except RecordError as error:
            raise ValueError(f"{where}: {error}") from error


class Batches(Iterator[TrieBatch]):
    """An endless iterator over packed batches. Its position can be saved and restored exactly.

    Attributes:
      fingerprint: Fingerprint of the file.
      stats: Numbers of packed tokens and rows, for `rows_filled` and `token_sharing`.
    """

    def __init__(
        self,
        cfg: Data,
        packing: Packing,
        builder: Builder,
        *,
        rows: int,
        host: int = 0,
        num_hosts: int = 1,
    ) -> None:
        """Opens the file.

        Args:
          cfg: The file of records, and the treatment of them.
          packing: Row size, window and treatment of long tries.
          builder: Builds the trie of each record.
          rows: Number of rows in this host's batch.
          host: Index of this host, 0 <= host < num_hosts.
          num_hosts: Number of hosts that share the records.

        Raises:
          FileNotFoundError: If the file does not exist.
          ValueError: If the file has fewer records than hosts.
        """
        records = self._records = open_records(cfg.path)
        if len(records) < num_hosts:
            raise ValueError(
                f"{cfg.path}: {len(records)} records for {num_hosts} hosts are too few. There must "
                "be at least one for each host. Add records, or use fewer hosts."
            )
        self.fingerprint = fingerprint(cfg.path)
        records.require_unchanged()
        self.stats, self._unusable = PackingStats(), set[int]()
        self._share = [host, num_hosts]
        self._cfg, self._packing, self._builder, self._rows = cfg, packing, builder, rows
        # Each host shuffles its own share, so no record is read twice in an epoch.
        source = grain.MapDataset.source(_Placed(records))[host::num_hosts]
        if cfg.seed is not None:
            source = source.shuffle(seed=cfg.seed)
        self._source = iter(source.repeat().to_iter_dataset(grain.ReadOptions(num_threads=0)))
        self._waiting: list[list[Trie]] = []
        # Position before the window whose rows are waiting, and number of rows taken from it.
        self._before: Any = self._source.get_state()
        self._taken = 0

    @property
    def unusable(self) -> int:
        """Number of different records that were left out because they cannot be used."""
        return len(self._unusable)

    def __next__(self) -> TrieBatch:
        """Returns the next [rows, row_tokens] batch of numpy arrays."""
        rows = [self._next_row() for _ in range(self._rows)]
        return stack_rows(rows, self._packing.row_tokens)

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON."""
        state = self._before
        counts = {"stats": vars(self.stats).copy(), "unusable": sorted(self._unusable)}
        of = {"file": self.fingerprint, "share": self._share}
        return {"source": state, "taken": self._taken, **of, **counts}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restores a position. The window of records around it is packed again.

        Raises:
          ValueError: If the position is in another file or in another share of it.
        """
        if state["file"] != self.fingerprint:
            raise ValueError(
                f"{self._cfg.path} has changed since the position in it was saved: "
                f"{self.fingerprint} now, {state['file']} then. Restore the file to resume, or "
                "start a new run from these parameters."
            )
        if state["share"] != self._share:
            raise ValueError(
                "The saved position is in share {} of {} of the records, and this process reads "
                "share {} of {}. Resume with the mesh that wrote it, or start a new run from these "
                "parameters.".format(*state["share"], *self._share)
            )
        self._source.set_state(state["source"])
        self._waiting, self._taken = [], 0
        self._unusable = set(state["unusable"])
        if state["taken"]:
            self._fill_window()
            del self._waiting[: state["taken"]]
            self._taken = state["taken"]
        self.stats.__init__(**state["stats"])

    def _next_row(self) -> list[Trie]:
        while not self._waiting:
            self._fill_window()
        self._taken += 1
        return self._waiting.pop(0)

    def _fill_window(self) -> None:
        self._before, self._taken = self._source.get_state(), 0
        tries: list[Trie] = []
        for _ in range(self._packing.window):
            number, record = next(self._source)
            where = self._records.where(number)
            try:
                trie = self._builder.trie(record, where)
            except ValueError as error:
                if self._cfg.unusable == "refuse":
                    raise ValueError(list_unusable(self._records, self._builder.trie)) from error
                self._drop(number, str(error))
                continue
            kept = fit_row(trie, self._packing, self.stats, name=where)
            if kept is not None:
                tries.append(kept)
        if not tries:
            raise ValueError(
                f"{self._cfg.path}: none of {self._packing.window} records in a row could be used. "
                "Set Data.unusable to 'refuse' to see why, or raise Packing.row_tokens."
            )
        self._waiting = pack(tries, self._packing, self.stats)

    def _drop(self, number: int, reason: str) -> None:
        """Counts a record that is left out, and warns the first time."""
        if number in self._unusable:
            return
        self._unusable.add(number)
        if self.unusable <= MAX_LISTED:
            warnings.warn(f"This record is left out. {reason}", stacklevel=4)
        elif self.unusable == MAX_LISTED + 1:
            warnings.warn(
                f"{self._cfg.path}: further records that are left out are only counted, in "
                "packing.json.",
                stacklevel=4,
            )


class _Placed:
    """Records with their indices, as a random access source for grain."""

    def __init__(self, records: Records) -> None:
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: Any) -> tuple[int, Record]:
        number = int(np.asarray(index))
        return number, self._records[number]
