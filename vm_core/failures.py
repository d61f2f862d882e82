"""Unusable inputs: the table they go to, and when they are too many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa

from vm_core.errors import VisualMemoryError
from vm_core.records import Rejected

QUARANTINE_SCHEMA = pa.schema(
    [("id", pa.string()), ("source", pa.string()), ("reason", pa.string()), ("images", pa.int64())]
)

KINDS: dict[str, str | tuple[str, ...]] = {
    "empty": "the file is empty",
    "unrecognised": "not a",
    "too_large": "too large",
    "damaged": "damaged",
    "unreadable": "the file cannot be read",
    "no_embedding": "the encoder returned no usable embedding",
    "lost": "rest of the file lost",
    "conflicting": "the id has",
    "incomplete": ("the record ", "the manifest's row ", "label "),
}
"""Kinds of reasons, and how the reasons of each begin."""

OTHER = "other"


def count_kinds(rejected: Sequence[Rejected]) -> dict[str, int]:
    """How many inputs were rejected for each kind of reason: all of KINDS, and OTHER."""
    found: Counter[str] = Counter()
    for item in rejected:
        found[_kind(item.reason)] += item.images
    return {kind: found[kind] for kind in (*KINDS, OTHER)}


def _kind(reason: str) -> str:
    return next((kind for kind, begins in KINDS.items() if reason.startswith(begins)), OTHER)


def quarantine_table(rejected: Sequence[Rejected]) -> pa.Table:
    """One row per rejected input."""
    return pa.Table.from_pylist([item._asdict() for item in rejected], QUARANTINE_SCHEMA)


def count_reasons(rejected: Sequence[Rejected], most: int = 20) -> dict[str, int]:
    """How often each of the most frequent reasons occurred."""
    found: Counter[str] = Counter()
    for item in rejected:
        found[item.reason] += item.images
    return dict(found.most_common(most))


def check_failures(
    read: int, failed: int, reasons: Mapping[str, int], limit: float, tables: str
) -> None:
    """Raises VisualMemoryError if nothing was read, or a larger share than ``limit`` failed.

    reasons: counts, most of which the message shows. tables: where quarantine tables are.
    """
    if not read:
        raise VisualMemoryError(
            "there are no images to read: the sources have none in their configured share"
        )
    if failed < read and failed <= limit * read:
        return
    frequent = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))[:5]
    listed = "".join(f"\n  {count:>7,}  {reason}" for reason, count in frequent)
    remedy = "Mend or remove them"
    if failed < read:
        share = min(1.0, int(failed / read * 100 + 1) / 100)
        remedy += f", or go on without them: --set max_failure_share={share:.2f}"
    raise VisualMemoryError(
        f"{failed:,} of {read:,} images ({failed / read:.1%}) are unusable; max_failure_share "
        f"allows {limit:.1%}. Most frequent reasons:{listed}\nEvery one is listed in "
        f"{tables}. {remedy}"
    )
