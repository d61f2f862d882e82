"""Damaged files: the same answer or a clear error that names the file, never anything else."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import faults

COUNT = 240


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return faults.make_cases(tmp_path_factory.mktemp("damage"))


def test_every_kind_of_file_is_damaged(cases):
    kinds = {faults.kind_of(name) for case in cases[0] for name in case.files()}
    for part in (
        *("CURRENT", "versions/", "embeddings-", "thumbnails-", "quarantine-", "shard-"),
        *("classes.parquet", "centroids.npy", "rows.parquet", "vectors.npy", "partition-"),
        *("weights/", "scores.json", "items-", "sample-", "assigned-", "home-", "visits-"),
        *("sums-", "pairs-", "groups", "written-", "held_out_", ".arrow"),
    ):
        assert any(part in kind for kind in kinds), part


def test_damage_is_healed_or_named(cases):
    found, settings = cases
    outcomes: Counter[str] = Counter()
    bad = []
    for case, name, how, seed in faults.damages(found, COUNT, seed=0):
        for command, what in faults.outcome(case, name, how, seed, settings).items():
            outcomes[what.partition(":")[0]] += 1
            if what.startswith(faults.BAD):
                bad.append(f"{case.name}, {command}: {name}, {how}, seed {seed}: {what}")
    assert not bad, "\n".join(bad)
    assert outcomes["same"] > COUNT / 4 and outcomes["error"] > COUNT / 20
