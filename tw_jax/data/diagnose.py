"""Lists all unusable records of a file; `data/pipeline.py` decides what to do with them."""

from __future__ import annotations

from collections.abc import Callable

from tw_jax.data.records import Record, Records
from tw_jax.metrics import progress

MAX_LISTED = 20
"""Number of unusable records that an error lists, and that a run names while it drops them."""


def list_unusable(records: Records, use: Callable[[Record, str], object]) -> str:
    """Returns a report of all records of a file that cannot be used.

    Args:
      records: The file.
      use: Raises ValueError for a record, at a place, that cannot be used.

    Returns:
      The number of such records, and the first `MAX_LISTED` of them with place and reason.
    """
    faults = []
    for index in progress(range(len(records)), desc="check records"):
        try:
            use(records[index], records.where(index))
        except ValueError as error:
            faults.append(str(error))
    rest = len(faults) - MAX_LISTED
    lines = [*faults[:MAX_LISTED], *([f"and {rest} more."] if rest > 0 else [])]
    return (
        f"{len(faults)} of {len(records)} records cannot be used. Correct them, or set "
        "Data.unusable to 'drop'.\n" + "\n".join(lines)
    )
