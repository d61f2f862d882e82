"""Classifies images with a visual memory and shows what decided.

python -m pipelines.classify --memory MEMORY IMAGE ...
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from pipelines import commands
from vm_core import storage, summary
from vm_core.classification import classify
from vm_core.errors import VisualMemoryError
from vm_core.gallery import Example
from vm_core.memory import Memory
from vm_core.report import render_explanations
from vm_core.terminal import console as make_console
from vm_core.voting import VOTERS


def command(arguments: Sequence[str]) -> None:
    """visual-memory classify"""
    parser = argparse.ArgumentParser(
        prog="visual-memory classify",
        description="Label, confidence, and the neighbours that decided: rank, distance, weight.",
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--memory", required=True, help="folder or bucket prefix of the memory")
    parser.add_argument("--k", type=int, default=10, help="neighbours that vote (default 10)")
    parser.add_argument("--voter", choices=VOTERS, default="rank", help="default: rank")
    parser.add_argument("--encoder", metavar="PATH", help="the encoder, if it has moved")
    parser.add_argument("--json", action="store_true", help="print JSON, one object per image")
    parser.add_argument(
        "--explain", metavar="OUT.html", help="write a page that shows the pictures"
    )
    commands.add_trust_files_option(parser)
    options = parser.parse_args(arguments)
    memory = Memory(options.memory, trust_files=bool(options.trust_files))
    answers, rejected = classify(memory, options.images, options.voter, options.k, options.encoder)
    console = make_console(soft_wrap=True)
    for answer in answers:
        if options.json:
            print(json.dumps(_as_json(memory, answer)))
        else:
            console.print(summary.of_answer(memory, answer))
    if options.explain:
        ids = {id for answer in answers for id in answer.neighbor_ids}
        facts = {"memory": f"{memory.root}, version {memory.manifest.version}"}
        facts["vote"] = f"{options.voter} over {options.k} neighbours"
        page = render_explanations(
            answers, memory.classes, memory.thumbnails(ids), "What decided", facts
        )
        storage.write_bytes(options.explain, page.encode())
    if rejected:
        listed = "".join(f"\n  {item.id}: {item.reason}" for item in rejected)
        raise VisualMemoryError(f"{len(rejected)} of {len(options.images)} images failed:{listed}")


def _as_json(memory: Memory, answer: Example) -> dict:
    return {
        "image": answer.query_id,
        "label": answer.prediction,
        "class": memory.classes.name(answer.prediction),
        "confidence": answer.confidence,
        "neighbors": [
            {
                "rank": rank,
                "id": id,
                "label": label,
                "class": memory.classes.name(label),
                "distance": distance,
                "weight": weight,
            }
            for rank, (id, label, distance, weight) in enumerate(
                zip(
                    answer.neighbor_ids,
                    answer.neighbor_labels,
                    answer.distances,
                    answer.weights,
                    strict=True,
                )
            )
        ],
    }


if __name__ == "__main__":
    sys.exit(commands.main(command))
