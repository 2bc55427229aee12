"""A worker in a process of its own, `python -m dpo_cache.precomputing.workers.process DESCRIPTOR`.

The descriptor is this end of a socket to the driver. Over it come, pickled by the driver of this run, the
worker's class and the job, and then numbered units. The process sends a first message when it has started,
and a receipt for each unit. It ends when the driver closes the socket or has ended; in the middle of a unit
it first publishes the scores that it has computed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import closing
from multiprocessing.connection import Connection
from types import FrameType

STARTED = "started"
LOOK_S = 1.0  # seconds between checks whether the driver has ended
_has_ended = threading.Event()  # set by SIGTERM


class Terminated(BaseException):
    """Raised on SIGTERM: as the stack unwinds, computed scores are published."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver handles Ctrl-C
    signal.signal(signal.SIGTERM, _terminate)
    threading.Thread(target=_end_with, args=(os.getppid(),), name="driver", daemon=True).start()
    connection, name = Connection(int(sys.argv[1])), sys.argv[2]
    try:
        connection.send(STARTED)
        make_worker, job = connection.recv()
        with closing(make_worker(job)) as worker:
            worker.name = name
            while True:
                number, unit = connection.recv()
                receipt = worker.score(number, unit)
                if _has_ended.is_set():  # an error while scores were published took the signal's place
                    raise Terminated
                connection.send(receipt)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the run has ended
        pass
    except Terminated:
        os._exit(128 + signal.SIGTERM)  # skips the clean-up of libraries: the driver waits for this process


def _end_with(driver: int) -> None:
    """End this process once the process with the driver's id is no longer its parent."""
    while os.getppid() == driver:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _terminate(_: int, __: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal has no effect
    _has_ended.set()
    raise Terminated


if __name__ == "__main__":
    main()
