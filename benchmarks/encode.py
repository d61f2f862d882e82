"""Images per second of the build pipeline against a bare loop over the same images.

python -m benchmarks.encode [--images DIR] [--encoder PATH] [--count N] [--repetitions N]

Without --images it takes the demo's 2,000 textile photos (JPEG). The peer is a plain
Python loop: decoding threads one batch ahead of the same model; no Beam, no shards, no
checkpoints, nothing written. Ours is the whole build on the DirectRunner, from listing
the folder to the published version. Both load the model inside the measured time;
TensorFlow is imported before. The two alternate; the ratio is of the medians.

``ratio`` is for the same work: no thumbnails. ``ratio_with_thumbnails`` is the build as
configured by default, which also makes a picture of every image for the reports.

Expected: Beam is called once per split of 512 images, so it should cost next to nothing
beside 5 s of encoding a split; writing shards about a percent; thumbnails 0.4 ms an image.
Came, on 2 shared cores: decoding and encoding alone is as fast as the bare loop. A build
costs 0.8 s more, however few its images, most of it Beam making and starting its graph:
4% of 2,000 images. Single runs differ by 10%; medians gave 0.91 and 1.01 without
thumbnails, 0.88 and 0.94 with them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from demo.fetch import fetch
from pipelines.build import build
from vm_core import config, encoders
from vm_core.building import BuildConfig
from vm_core.encoders import Encoder
from vm_core.images import prepare


def bare_loop(paths: list[str], settings: Encoder) -> np.ndarray:
    """(N, D) embeddings; decodes the next batch while the model runs on this one."""
    embed = settings.load()

    def load(path: str) -> np.ndarray:
        return prepare(Path(path).read_bytes(), settings.preprocessing).pixels

    results = []
    with ThreadPoolExecutor() as pool:
        batches = [
            paths[start : start + settings.batch_size]
            for start in range(0, len(paths), settings.batch_size)
        ]
        following = [pool.submit(load, path) for path in batches[0]]
        for batch in itertools.chain(batches[1:], [[]]):
            waiting, following = following, [pool.submit(load, path) for path in batch]
            pixels = np.stack([future.result() for future in waiting])
            missing = settings.batch_size - len(pixels)
            padded = np.pad(pixels, [(0, missing), (0, 0), (0, 0), (0, 0)])
            results.append(embed(padded)[: len(pixels)])
    return np.concatenate(results)


def run_build(folder: str, settings: Encoder, thumbnail_pixels: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        options = {
            "memory": root,
            "sources": [{"kind": "folder", "path": folder}],
            "encoder": settings,
            "images": {"thumbnail_pixels": thumbnail_pixels},
        }
        memory = build(config.load(BuildConfig, None, [], options), ["--runner=FnApiRunner"])
        assert memory.manifest.total("quarantined") == 0


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def select(folder: str, count: int, target: str) -> list[str]:
    """Links the first ``count`` images below a folder into ``target``; returns their paths."""
    found = Path(folder).rglob("[!.]*")
    files = sorted(path for path in found if path.is_file())[:count]
    chosen: list[str] = []
    for path in files:
        link = Path(target, "class", f"{len(chosen):06d}{path.suffix}")
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(path.resolve())
        chosen.append(str(link))
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", help="folder of images (default: the demo's textiles)")
    parser.add_argument("--encoder", help="SavedModel (default: the demo's)")
    parser.add_argument("--count", type=int, default=2048)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    assets = fetch()
    settings = encoders.parse(
        {"kind": "saved_model", "path": options.encoder or assets.encoder, "batch_size": 32}
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = select(options.images or f"{assets.images}/textiles", options.count, folder)
        bare_loop(paths[:64], settings)  # imports TensorFlow, fills the page cache
        arms: dict[str, Callable[[], object]] = {
            "bare": lambda: bare_loop(paths, settings),
            "build": lambda: run_build(folder, settings, 0),
            "build_with_thumbnails": lambda: run_build(folder, settings, 96),
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for repetition in range(options.repetitions):
            for name, work in arms.items():
                seconds[name].append(timed(work))
                rate = len(paths) / seconds[name][-1]
                print(f"repetition {repetition + 1}: {name} {rate:.1f} images/s", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(
        json.dumps(
            {
                "name": "encode",
                "ratio": round(medians["bare"] / medians["build"], 3),
                "peer": "bare loop: same decoding, same model, no Beam",
                "ratio_with_thumbnails": round(
                    medians["bare"] / medians["build_with_thumbnails"], 3
                ),
                "images_per_s": {
                    name: round(len(paths) / median, 1) for name, median in medians.items()
                },
                "images": len(paths),
                "repetitions": options.repetitions,
            }
        )
    )


if __name__ == "__main__":
    main()
