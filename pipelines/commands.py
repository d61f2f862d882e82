"""What every command does around its task. Does not import Beam, which takes seconds."""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import os
import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from vm_core.errors import VisualMemoryError

EPILOG = "Every other option goes to Beam, such as --runner=FlinkRunner."


def add_set_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="sets a value of the configuration, such as index.kind=exact; repeatable",
    )


def main(command: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> int:
    """Runs a command; an error meant for the user is printed without a traceback."""
    # The collections at the interpreter's exit would walk through all of Beam and TensorFlow
    # once more, for a second and a half; what is frozen they leave alone.
    atexit.register(gc.freeze)
    # Before TensorFlow is imported, here or in a worker: it reports on hardware it lacks.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    # Beam logs a user's error with its traceback before it raises it.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    try:
        command(sys.argv[1:] if arguments is None else arguments)
    except VisualMemoryError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {error}", markup=False)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; a rerun goes on where this one was")
        return 130
    return 0
