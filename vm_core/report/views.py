"""What the report shows, ready to be laid out: sorted, cut to length, named."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vm_core.classes import ClassTable
from vm_core.gallery import Example
from vm_core.records import UNKNOWN

Results = Mapping[str, Any]

_MOST_CLASSES = 200
_WORST, _BEST = 100, 20
_MOST_CONFUSIONS = 20
# Pictures are most of the file: more would help nobody to see why a vote went as it did.
_MOST_NEIGHBORS = 20
_MOST_SHARES = 4
_NOTHING = "\N{EN DASH}"


def percent(share: float | None, digits: int = 1) -> str:
    return _NOTHING if share is None else f"{share:.{digits}%}"


def number(count: float | None) -> str:
    return _NOTHING if count is None else f"{count:,}"


def distance(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.3f}"


def digits(queries: int) -> int:
    """Decimals of a percentage that so many queries can tell apart."""
    return 2 if queries >= 10_000 else 1


@dataclass(frozen=True)
class Tile:
    """One headline number."""

    name: str
    value: str
    note: str


def tiles(results: Results) -> list[Tile]:
    """The few numbers to begin with."""
    test = results["test"]
    queries, headline = test["queries"], test["headline"]
    chosen = (results["chosen_k"] or {}).get(headline["voter"])
    k, accuracy = (chosen or headline)["k"], (chosen or headline)["accuracy"]
    how = "chosen on the tuning queries" if chosen else "fixed"
    places = digits(queries)
    shown = [
        Tile("Accuracy", percent(accuracy, places), f"{headline['voter']} voting, k = {k}, {how}")
    ]
    if accuracy is not None:
        low, high = _wilson(accuracy, queries)
        shown[0] = Tile(
            shown[0].name,
            shown[0].value,
            f"{shown[0].note}; 95% interval {100 * low:.{places}f} to {percent(high, places)}",
        )
    return [
        *shown,
        Tile(
            "Nearest neighbour right",
            percent(test["reliability_at_k"][0], places),
            "the accuracy without a vote, k = 1",
        ),
        Tile(
            "Calibration error",
            percent(test["calibration"]["expected_error"], 1),
            f"expected gap of confidence and accuracy, {headline['voter']}, k = {headline['k']}",
        ),
    ]


def _wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share seen in so many queries; honest near 0 and 1 too."""
    z2 = 1.96**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    spread = math.sqrt(share * (1 - share) * z2 / count + (z2 / (2 * count)) ** 2)
    spread /= 1 + z2 / count
    return max(0.0, centre - spread), min(1.0, centre + spread)


def evaluation_facts(results: Results) -> list[tuple[str, str]]:
    memory, queries, test = results["memory"], results["queries"], results["test"]
    kinds = Counter(memory["index"])
    counts = (
        f"{queries['read']:,} read = {queries['embedded']:,} embedded + "
        f"{queries['quarantined']:,} quarantined + {queries['duplicates']:,} duplicates"
    )
    split = f"{queries['tuning']:,} to choose k, {queries['test']:,} to test"
    if test["unknown"]:
        split += f"; {test['unknown']:,} of a class not in the memory count as wrong"
    if test["unscored"]:
        split += f"; {test['unscored']:,} without a label left out"
    return [
        ("Memory", memory["path"]),
        ("Version", f"{memory['version']} (content {memory['content_digest'][:12]})"),
        ("Encoder", f"{memory['encoder']} ({memory['encoder_fingerprint'][:12]})"),
        (
            "Index",
            ", ".join(
                kind if count == 1 else f"{kind}, {count:,} partitions"
                for kind, count in sorted(kinds.items())
            ),
        ),
        ("Queries", counts),
        ("Split", split),
    ]


@dataclass(frozen=True)
class AccuracyTable:
    """Accuracy by voter. rows: voter, chosen k, then (value, is the best) of every column.

    columns: the names of the fixed k; the accuracy at the chosen k stands before them.
    """

    columns: list[str]
    rows: list[tuple[str, int | None, list[tuple[float | None, bool]]]]

    @property
    def has_best(self) -> bool:
        return any(best for _, _, cells in self.rows for _, best in cells)


def accuracy_table(results: Results) -> AccuracyTable:
    at_k, chosen = results["test"]["accuracy_at_k"], results["chosen_k"]
    fixed = results["fixed_k"] or ([] if chosen else [results["test"]["headline"]["k"]])
    table = {
        voter: ([chosen[voter]["accuracy"]] if chosen else []) + [values[k - 1] for k in fixed]
        for voter, values in at_k.items()
    }
    best = [_best(column) for column in zip(*table.values(), strict=True)]
    return AccuracyTable(
        [f"k = {k}" for k in fixed],
        [
            (
                voter,
                chosen[voter]["k"] if chosen else None,
                [(v, v == b and b is not None) for v, b in zip(values, best, strict=True)],
            )
            for voter, values in table.items()
        ],
    )


def _best(column: tuple[float | None, ...]) -> float | None:
    """The highest value, None where no voter is better than another."""
    values = {value for value in column if value is not None}
    return max(values) if len(values) > 1 else None


@dataclass(frozen=True)
class ClassRow:
    name: str
    queries: int
    accuracy: Mapping[str, float]


@dataclass(frozen=True)
class ClassTableView:
    """Classes by accuracy, the worst first. best: empty unless some are left out between."""

    voter: str
    voters: list[str]
    worst: list[ClassRow]
    best: list[ClassRow]
    left_out: int


def class_table(test: Results, classes: ClassTable) -> ClassTableView:
    voter = test["headline"]["voter"]
    rows = [
        ClassRow(classes.name(int(label)), each["queries"], each["accuracy"])
        for label, each in test["per_class"].items()
    ]
    rows.sort(key=lambda row: (row.accuracy[voter], -row.queries, row.name))
    voters = [voter, *(each for each in test["accuracy_at_k"] if each != voter)]
    if len(rows) <= _MOST_CLASSES:
        return ClassTableView(voter, voters, rows, [], 0)
    left_out = len(rows) - _WORST - _BEST
    return ClassTableView(voter, voters, rows[:_WORST], rows[-_BEST:], left_out)


@dataclass(frozen=True)
class Confusion:
    """share: of the queries of that class."""

    truth: str
    predicted: str
    count: int
    share: float | None


@dataclass(frozen=True)
class Confusions:
    rows: list[Confusion]
    mistakes: int


def confusions(test: Results, classes: ClassTable) -> Confusions:
    """The most frequent mistakes."""
    wrong = [row for row in test["confusion"] if row[0] != row[1]]
    totals = {int(label): each["queries"] for label, each in test["per_class"].items()}
    totals[UNKNOWN] = test["unknown"]
    rows = [
        Confusion(
            classes.name(truth),
            classes.name(predicted),
            count,
            count / totals[truth] if totals.get(truth) else None,
        )
        for truth, predicted, count in sorted(wrong, key=lambda row: (-row[2], row[0], row[1]))
    ]
    return Confusions(rows[:_MOST_CONFUSIONS], sum(row[2] for row in wrong))


@dataclass(frozen=True)
class Picture:
    """uri: a data URI, None where there is only the name to show."""

    id: str
    uri: str | None

    @property
    def name(self) -> str:
        return self.id.rpartition("/")[2] or self.id


@dataclass(frozen=True)
class NeighborView:
    """agrees: has the true class, or where that is not known, the predicted one."""

    rank: int
    picture: Picture
    name: str
    agrees: bool
    distance: float
    weight: float
    bar: float


@dataclass(frozen=True)
class Share:
    """What part of the vote a class got."""

    name: str
    weight: float
    agrees: bool


@dataclass(frozen=True)
class Card:
    """One query. truth, right: None where no true class is known."""

    picture: Picture
    truth: str | None
    prediction: str
    right: bool | None
    confidence: float
    neighbors: list[NeighborView]
    hidden: int
    hidden_weight: float
    shares: list[Share]
    other_classes: int
    other_weight: float


def card(
    example: Example, classes: ClassTable, thumbnails: Mapping[str, bytes], labelled: bool
) -> Card:
    """labelled: a query of UNKNOWN label has a true class, one that the memory has not."""
    has_truth = labelled or example.label != UNKNOWN
    wanted = example.label if has_truth else example.prediction
    votes: dict[int, float] = {}
    for label, weight in zip(example.neighbor_labels, example.weights, strict=True):
        votes[label] = votes.get(label, 0.0) + weight
    shares = sorted(votes.items(), key=lambda item: (item[0] != example.prediction, -item[1]))
    top = max(example.weights, default=0.0)
    neighbors = [
        NeighborView(
            rank,
            _picture(id, thumbnails.get(id)),
            classes.name(label),
            label == wanted,
            distance,
            weight,
            weight / top if top else 0.0,
        )
        for rank, (id, label, distance, weight) in enumerate(
            zip(
                example.neighbor_ids,
                example.neighbor_labels,
                example.distances,
                example.weights,
                strict=True,
            ),
            1,
        )
    ]
    return Card(
        _picture(example.query_id, example.thumbnail or thumbnails.get(example.query_id)),
        classes.name(example.label) if has_truth else None,
        classes.name(example.prediction),
        example.prediction == example.label if has_truth else None,
        example.confidence,
        neighbors[:_MOST_NEIGHBORS],
        len(neighbors[_MOST_NEIGHBORS:]),
        _sum(neighbor.weight for neighbor in neighbors[_MOST_NEIGHBORS:]),
        [Share(classes.name(label), w, label == wanted) for label, w in shares[:_MOST_SHARES]],
        len(shares[_MOST_SHARES:]),
        _sum(weight for _, weight in shares[_MOST_SHARES:]),
    )


def _sum(values: Any) -> float:
    return math.fsum(values)


def _picture(id: str, jpeg: bytes | None) -> Picture:
    uri = None if not jpeg else "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    return Picture(id, uri)
