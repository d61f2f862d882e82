"""One model a process, however many threads encode."""

import threading
import time
from typing import Literal

from apache_beam.internal import pickler

from pipelines.embedding import LazyEncoder
from vm_core.encoders import Encoder


class Counted(Encoder):
    kind: Literal["counted"] = "counted"
    path: str = ""

    def load(self):
        loads.append(threading.get_ident())
        time.sleep(0.1)  # so that another thread would come in between
        return lambda pixels: pixels


loads: list[int] = []


def test_threads_and_copies_share_one_model():
    """As in a worker: every thread has copies of the steps, unpickled from the same bytes."""
    loads.clear()
    pickled = pickler.dumps(LazyEncoder(Counted()))
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(pickler.loads(pickled)())) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len(found) == 8 and all(each is found[0] for each in found)
