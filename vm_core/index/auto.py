"""Picks exact search for small partitions and ScaNN for large ones."""

from __future__ import annotations

from typing import Literal

from vm_core.index import Index, exact
from vm_core.index.scann import Plugin as Scann


class Plugin(Index):
    """Exact under ``exact_below`` rows: there it is as fast, and it misses nothing.

    scann: the settings of ScaNN where it is taken.
    """

    kind: Literal["auto"] = "auto"
    exact_below: int = 20_000
    scann: Scann = Scann()

    def choose(self, rows: int) -> Index:
        return exact.Plugin() if rows < self.exact_below else self.scann.choose(rows)
