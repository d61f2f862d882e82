"""Picks exact search for small partitions and ScaNN for large ones."""

from __future__ import annotations

from typing import Literal

from vm_core.index import Index


class Plugin(Index):
    """Exact under ``exact_below`` rows: there it is as fast, and it misses nothing."""

    kind: Literal["auto"] = "auto"
    exact_below: int = 20_000

    def choose(self, rows: int) -> Index:
        from vm_core.index import exact, scann

        return exact.Plugin() if rows < self.exact_below else scann.Plugin()
