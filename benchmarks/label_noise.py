"""Wrong labels in a memory: found by leave-one-out scores, and pruned away.

python -m benchmarks.label_noise [--images DIR] [--queries DIR] [--encoder PATH] [--limit N]
                                 [--seeds N] [--logistic]

Without --images it takes the demo's photos of ten flowers; of a folder without --queries
60% of the images are the memory and the rest the queries. Images are encoded once (by the
demo's EfficientNet-lite0 unless told otherwise). Then 10% and 30% of the memory's items get
a wrong label, uniformly among the other classes, by a seed; medians over the seeds count.

Found: of the M wrong labels, the share among the M items that a score says are the worst;
ties are broken at random, for all alike. Ours are the scores of visual-memory score, none of
which is trained. The peer is cleanlab, on the same embeddings: the quality of a label by
out-of-fold probabilities (five folds) of scikit-learn's nearest-neighbour classifier, cosine
distance, with 5, 10, 20 and 50 neighbours; --logistic adds a logistic regression, which
learns more of the classes than any neighbour knows and takes far longer. ``ratio`` is the
best of ours over the best of cleanlab's nearest neighbours, at 30%: of both the best is
taken with hindsight, from about as many.

Accuracy: of the rank voter with 10 neighbours on the test queries, whose labels are right:
as it is, without noise (what pruning could reach at most), and pruned. Soft is the paper's
1.75 / (1 + wrong_at_10). Hard removes a share by a score, both chosen on the tuning queries,
one half of the queries, and never on the test queries. The paper's threshold, wrong_at_100
of 128, stands beside it: chosen on ImageNet, it removes nothing from a memory of about a
hundred items, and of a larger one the items that are everybody's neighbour. So does what is
left when the items that cleanlab calls issues are removed.

Expected: most wrong labels found, at least as many as by cleanlab's nearest neighbours, by
reliability or Shapley value; wrong counts find fewer, since few items are anybody's
neighbour often. Of the accuracy lost to 30% noise hard pruning wins back most, soft less.
Came, on CIFAR-10 (3,000 items, two seeds) at 10% and 30%: reliability finds 73% and 82%,
cleanlab's best 70% and 80%, wrong counts 26% and 42%. Accuracy at 30%: 60.3% noisy, 63.9%
hard, 60.9% soft, 65.1% by cleanlab's issues, 68.0% without noise. At 10% nobody gained a
point. On Imagenette (1,000 items) reliability finds 98% of both, cleanlab 96% and 97%.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from statistics import median

import numpy as np
import pyarrow as pa
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from demo.fetch import fetch
from vm_core import encoders, item_scores, sources, weights
from vm_core.classes import ClassTable
from vm_core.embedding import BatchedEncoder, ImageSettings, embed_records
from vm_core.encoders import Encoder
from vm_core.exact import top_k
from vm_core.item_scores import Lists
from vm_core.partitions import Members, Partition
from vm_core.pruning import HARD_THRESHOLD, ROW_WEIGHTS_SCHEMA, hard, scores_of, soft, worst_share
from vm_core.records import EmbeddingBlock, unit_interval
from vm_core.search import search_partition
from vm_core.sources import Source
from vm_core.voting import vote

RATES = (0.1, 0.3)
K = 10
KS = (10, 100)
PEER_NEIGHBORS = (5, 10, 20, 50)
SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
HIGHEST_IS_WORST = {
    "wrong_at_10": True,
    "wrong_at_100": True,
    "reliability": False,
    "shapley": False,
}


def embed(
    source: Source,
    classes: ClassTable,
    load: Callable[[], BatchedEncoder],
    encoder: Encoder,
    limit: int,
) -> EmbeddingBlock:
    """The images of a source in the order of their ids; about ``limit`` of them, by a hash."""
    listing = source.listing()
    total = sum(source.expected(split) for split in listing.splits)
    records = (
        record
        for split in listing.splits
        for record in source.records(split, classes)
        if unit_interval(record.id, "limit") * total < limit
    )
    block = embed_records(records, load, encoder, ImageSettings(thumbnail_pixels=0)).block
    return block.take(np.argsort(block.ids))


def mislabelled(labels: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """The labels with a share of them moved to another class."""
    noisy = labels.copy()
    places = rng.choice(len(labels), round(rate * len(labels)), replace=False)
    classes, codes = np.unique(labels, return_inverse=True)
    moved = codes[places] + rng.integers(1, len(classes), len(places))
    noisy[places] = classes[moved % len(classes)]
    return noisy


def item_tables(
    ids: np.ndarray, labels: np.ndarray, rows: np.ndarray, distances: np.ndarray
) -> dict[str, pa.Table]:
    """Leave-one-out scores by name, as pruning has them, from (N, K) nearest other rows."""
    lists = Lists(rows, distances, (rows >= 0) & (labels[rows] == labels[:, None]))
    complete = lists.lengths == len(ids) - 1
    values = item_scores.shapley(lists.correct, lists.lengths, complete, K)
    found, sums = item_scores.tally(lists, values, KS)
    columns = np.zeros((len(ids), sums.shape[1]), np.int64)
    columns[found] = sums
    scores = dict(zip(item_scores.columns(KS), columns.T.astype(np.float64), strict=True))
    counted = scores["correct_at_100"] + scores["wrong_at_100"]
    # Nobody's neighbour: nothing speaks against it.
    scores["reliability"] = np.where(counted, scores["correct_at_100"] / np.maximum(counted, 1), 1)
    table = pa.table({"row": range(len(ids)), "id": pa.array(ids, pa.string()), **scores})
    return {name: scores_of([table], name, ties=True) for name in HIGHEST_IS_WORST}


def found_share(badness: np.ndarray, wrong: np.ndarray, rng: np.random.Generator) -> float:
    """Of the M wrong labels, the share among the M worst items."""
    order = np.lexsort((rng.random(len(badness)), -badness))
    return float(wrong[order[: wrong.sum()]].mean())


def peers(
    vectors: np.ndarray, codes: np.ndarray, logistic: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Out-of-fold probabilities (N, C) of some classifiers."""
    folds = StratifiedKFold(5, shuffle=True, random_state=0)
    for k in PEER_NEIGHBORS:
        if k < len(codes) * 4 // 5:
            nearest = KNeighborsClassifier(k, metric="cosine")
            yield (
                f"nearest_{k}",
                cross_val_predict(nearest, vectors, codes, cv=folds, method="predict_proba"),
            )
    if logistic:
        regression = LogisticRegression(max_iter=300)
        yield (
            "logistic",
            cross_val_predict(regression, vectors, codes, cv=folds, method="predict_proba"),
        )


class Accuracy:
    """Accuracy of the rank voter, of a memory with given labels and weights."""

    def __init__(self, memory: EmbeddingBlock, queries: EmbeddingBlock):
        self._memory, self._queries = memory, queries
        tuning = [unit_interval(id, "tuning") < 0.5 for id in queries.ids]
        self.tuning = np.array(tuning, bool)

    def __call__(self, labels: np.ndarray, pruned: pa.Table | None = None) -> tuple[float, float]:
        """On the tuning queries, and on the test queries."""
        block = self._memory
        count = len(block)
        names = pa.array(block.ids, pa.string())
        members = Members(np.arange(count), names, labels, np.ones(count, bool), block.vectors)
        partition = Partition(members, lambda queries, k: top_k(queries, block.vectors, k))
        if pruned is not None:
            columns = [names.take(pruned["row"].combine_chunks()), pruned["weight"]]
            items = pa.table(columns, schema=weights.WEIGHTS_SCHEMA)
            partition = weights.apply(partition, items)
        found = search_partition(partition, self._queries, K)
        votes = vote(found.labels, found.distances, ["rank"], multiplier=found.weights)["rank"]
        right = votes.predictions[:, -1] == self._queries.labels
        return float(right[self.tuning].mean()), float(right[~self.tuning].mean())


def measure(
    memory: EmbeddingBlock,
    neighbors: tuple[np.ndarray, np.ndarray],
    accuracy: Accuracy,
    rate: float,
    seed: int,
    logistic: bool,
) -> dict[str, dict[str, float]]:
    """One round of planted noise: found shares of ours and of the peer's, and accuracies."""
    rng = np.random.default_rng([seed, round(100 * rate)])
    labels = mislabelled(memory.labels, rate, rng)
    wrong = labels != memory.labels
    tables = item_tables(memory.ids, labels, *neighbors)
    ours, choices = {}, []
    for name, highest in HIGHEST_IS_WORST.items():
        values = tables[name]["score"].to_numpy()
        ours[name] = found_share(values if highest else -values, wrong, rng)
        for share in SHARES:
            removed = worst_share(tables[name], share, highest) if share else None
            tuning, test = accuracy(labels, removed)
            choices.append((tuning, -share, name, test))
    best = max(choices, key=lambda choice: choice[:2])
    threshold = hard(tables["wrong_at_100"], HARD_THRESHOLD)
    accuracies = {
        "no_noise": accuracy(memory.labels)[1],
        "noisy": accuracy(labels)[1],
        "soft": accuracy(labels, soft(tables["wrong_at_10"]))[1],
        "hard": best[3],
        "hard_share": -best[1],
        "hard_at_128": accuracy(labels, threshold)[1],
        "removed_at_128": len(threshold) / len(memory),
    }
    print(f"  seed {seed}: hard pruning removes {-best[1]:.0%} by {best[2]}, as tuning chose")
    peer = {}
    _, codes = np.unique(labels, return_inverse=True)
    for name, probabilities in peers(memory.vectors, codes, logistic):
        quality = get_label_quality_scores(codes, probabilities)
        peer[name] = found_share(-quality, wrong, rng)
        issues = find_label_issues(codes, probabilities)
        rows = np.flatnonzero(issues)
        columns = [rows, np.zeros(len(rows), np.float32)]
        removed = pa.table(columns, schema=ROW_WEIGHTS_SCHEMA)
        accuracies[f"cleanlab_{name}"] = accuracy(labels, removed)[1]
    return {"ours": ours, "cleanlab": peer, "accuracy": accuracies}


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    return {
        group: {name: round(median(each[group][name] for each in rounds), 4) for name in names}
        for group, names in rounds[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", metavar="DIR", help="the memory: a folder per class")
    parser.add_argument("--queries", metavar="DIR", help="a folder per class")
    parser.add_argument("--encoder", metavar="PATH", help="a SavedModel")
    parser.add_argument("--limit", type=int, default=1 << 60, help="images of each, about")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--logistic", action="store_true", help="cleanlab's harder way too")
    options = parser.parse_args()
    assets = None if options.images and options.encoder else fetch()
    images = options.images or f"{assets.images}/flowers"  # type: ignore[union-attr]
    encoder = encoders.parse(
        {"kind": "saved_model", "path": options.encoder or assets.encoder}  # type: ignore[union-attr]
    )
    parts = [{"path": images}, {"path": options.queries}]
    if options.queries is None:
        parts = [{"path": images, "share": (0.0, 0.6)}, {"path": images, "share": (0.6, 1.0)}]
    of_memory, of_queries = (sources.parse({"kind": "folder", **part}) for part in parts)
    classes = ClassTable.from_keys([of_memory.listing().class_keys], {})
    model = BatchedEncoder(encoder.load(), encoder.batch_size)
    memory, queries = (
        embed(source, classes, lambda: model, encoder, options.limit)
        for source in (of_memory, of_queries)
    )
    accuracy = Accuracy(memory, queries)
    print(
        f"{len(memory):,} items of {len(np.unique(memory.labels))} classes, "
        f"{accuracy.tuning.sum():,} tuning and {(~accuracy.tuning).sum():,} test queries"
    )
    rows, distances = top_k(memory.vectors, memory.vectors, min(max(KS) + 1, len(memory)))
    lists = Lists(rows, distances, np.zeros(rows.shape, bool))
    lists = lists.without(rows == np.arange(len(memory))[:, None]).first(max(KS))
    results = {}
    for rate in RATES:
        print(f"{rate:.0%} of the labels are wrong")
        rounds = [
            measure(memory, (lists.rows, lists.distances), accuracy, rate, seed, options.logistic)
            for seed in range(options.seeds)
        ]
        results[rate] = medians(rounds)
        for group, text in (
            ("ours", "found by our scores"),
            ("cleanlab", "found by cleanlab"),
            ("accuracy", "accuracy"),
        ):
            shown = ", ".join(f"{name} {value:.1%}" for name, value in results[rate][group].items())
            print(f"  {text}: {shown}")
    ours = max(results[0.3]["ours"].values())
    peer = max(v for name, v in results[0.3]["cleanlab"].items() if name.startswith("nearest"))
    print(
        json.dumps(
            {
                "name": "label_noise",
                "ratio": round(ours / peer, 3),
                "peer": "cleanlab, out-of-fold nearest neighbours on the same embeddings",
                "found_at_30": ours,
                "peer_found_at_30": peer,
                "rates": {f"{rate:.0%}": result for rate, result in results.items()},
                "items": len(memory),
                "queries": len(queries),
                "classes": len(np.unique(memory.labels)),
                "seeds": options.seeds,
            }
        )
    )


if __name__ == "__main__":
    main()
