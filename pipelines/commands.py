"""What every command does around its task. Does not import Beam, which takes seconds."""

from __future__ import annotations

import argparse
import atexit
import gc
import logging
import os
import sys
from collections.abc import Callable, Sequence

from pipelines import signals
from vm_core import logs
from vm_core.errors import VisualMemoryError
from vm_core.terminal import console

EPILOG = (
    "--metrics-out=FILE.json (or .prom) writes what the stages did. --log-format=json makes every "
    "line on standard error one JSON object. Every other option goes to Beam, such as "
    "--runner=FlinkRunner."
)


class HandedOver(Exception):
    """The pipeline was given away to run elsewhere, and there is nothing to show yet."""


def add_set_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="sets a value of the configuration, such as index.kind=exact; repeatable",
    )


def add_trust_files_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-files",
        action="store_const",
        const=True,
        help="opens partitions on a disk without comparing them with their SHA-256",
    )


def main(
    command: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None
) -> int:
    """Runs a command and returns the exit status: the command's own, 0 if it has none.

    An error meant for the user is printed without a traceback.
    """
    # What imports have made stays. The garbage collector would walk through all of Beam and
    # TensorFlow again and again, and once more at the interpreter's exit, for a second and a
    # half; what is frozen it leaves alone.
    gc.freeze()
    atexit.register(gc.freeze)
    # Before TensorFlow is imported, here or in a worker: it reports on hardware it lacks.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--log-format", default=os.environ.get(logs.VARIABLE, "text"))
    options, arguments = own.parse_known_args(arguments)
    # Beam logs a user's error with its traceback before it raises it.
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    try:
        with signals.handled():
            logs.configure(options.log_format, terminal=not logging.getLogger().handlers)
            status = command(arguments) or 0
            sys.stdout.flush()
            return status
    except VisualMemoryError as error:
        return _failed(str(error))
    except HandedOver as remark:
        console(stderr=True, soft_wrap=True, highlight=False).print(str(remark), markup=False)
        return 0
    except BrokenPipeError:  # who reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 141
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        return _failed(f"{error.strerror or error}{place}")
    except MemoryError:
        return _failed("not enough memory. Ask for less at a time, or use a larger machine")


def _failed(text: str) -> int:
    if logs.chosen() == "json":
        logging.getLogger(__name__).error("%s", text)
    else:
        lines = console(stderr=True, soft_wrap=True, highlight=False)
        lines.print(f"error: {text}", markup=False)
    return 2
