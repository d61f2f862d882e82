import errno
import json
import traceback

import pytest

from pipelines import running
from pipelines.measuring import measured
from pipelines.reporting import WorkerError, find, reported
from vm_core.errors import VisualMemoryError

TEXT = "k = 0 is 'wrong':\n  line 2 [x] \\ \"ü\". Use\ttabs"


@pytest.mark.parametrize(
    "channel",
    [
        str,
        lambda text: (
            f"Traceback (most recent call last):\n  File\n{text} [while running 'Embed']\n"
        ),
        lambda text: text.replace("\n", "\n    "),
        json.dumps,
        lambda text: json.dumps(json.dumps(text)),
        lambda text: f"{text}\n{text}",
        lambda text: " ".join(text.split()),
    ],
)
def test_the_text_survives_what_runners_do_to_it(channel):
    assert find(channel(str(WorkerError(TEXT)))) == TEXT
    found = running._for_the_user(RuntimeError(channel(str(WorkerError(TEXT)))))
    assert isinstance(found, VisualMemoryError) and str(found) == TEXT


def test_other_errors_have_no_such_text():
    assert find("Traceback: vm_core.errors.VisualMemoryError: k = 0") is None
    assert find(str(WorkerError(TEXT))[:-20]) is None
    assert running._for_the_user(RuntimeError("a bug")) is None


@pytest.mark.parametrize("wrap", [reported, lambda function: measured("stage", function)])
@pytest.mark.parametrize(
    "error, text",
    [
        (VisualMemoryError(TEXT), TEXT),
        (
            OSError(errno.ENOSPC, "No space left on device", "/x"),
            "a worker failed: No space left on device (/x). Start the same command again",
        ),
        (
            MemoryError(),
            "a worker ran out of memory. Give workers more, or make smaller partitions",
        ),
    ],
)
def test_errors_of_functions_and_of_generators(wrap, error, text):
    def fail(_):
        raise error

    def fail_later(_):
        yield 1
        raise error

    for call in (lambda: wrap(fail)(0), lambda: list(wrap(fail_later)(0))):
        with pytest.raises(WorkerError) as raised:
            call()
        assert find("".join(traceback.format_exception(raised.value))) == text


def test_a_bug_stays_what_it_is():
    def fail(_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        reported(fail)(0)
    assert reported(lambda a, b: a + b)(1, 2) == 3
    assert list(reported(lambda n: (i for i in range(n)))(3)) == [0, 1, 2]
