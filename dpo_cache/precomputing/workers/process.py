"""A worker in a process of its own, `python -m dpo_cache.precomputing.workers.process DESCRIPTOR`.

The descriptor is this end of a socket to the driver. Over it come, pickled by the driver of this run, the
worker's class and the job, and then numbered units; back go a first word that the process has started, and a
receipt for each unit. The process ends when the driver closes the socket, or has ended; in the midst of a
unit it publishes what it has computed.
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
LOOK_S = 1.0  # between looks whether the driver has ended


class Terminated(BaseException):
    """SIGTERM: unwinds, so that scores that were computed are published."""


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver decides
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
                connection.send(worker.score(number, unit))
    except (EOFError, BrokenPipeError, ConnectionResetError):  # the run has ended
        pass
    except Terminated:
        os._exit(128 + signal.SIGTERM)  # no clean-up of libraries: the driver waits


def _end_with(driver: int) -> None:
    """End this process when the driver, whose id is given, is not its parent any more."""
    while os.getppid() == driver:
        time.sleep(LOOK_S)
    os.kill(os.getpid(), signal.SIGTERM)


def _terminate(_: int, __: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once
    raise Terminated


if __name__ == "__main__":
    main()
