"""Settings of the process that only the command line changes: logging, limits, progress bars."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dpo_cache.cli.output import remark
from dpo_cache.progress import bars_shown

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

NOISY = ("bitsandbytes",)  # loggers whose warnings do not help a user of the command line


@contextmanager
def process_settings(*, is_rank: bool = False, is_quiet: bool = False) -> Iterator[None]:
    """The settings of a command; its loggers are as before when the block ends.

    With `is_rank`, this is one of several processes that train together; with `is_quiet`, another one of them
    shows the same progress and warnings.
    """
    if is_rank:  # hides torch's advice on DDP's options; read when torch is imported
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if is_quiet or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # no animation without a terminal
    if is_quiet:
        os.environ["DPO_CACHE_PROGRESS"] = "off"
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
    raise_file_limit()
    logger, handler = logging.getLogger("dpo_cache"), _Remarks()
    levels = {name: logging.getLogger(name).level for name in NOISY}
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logger.addHandler(handler)
    try:
        with bars_shown():
            yield
    finally:
        logger.removeHandler(handler)
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def raise_file_limit() -> None:
    """Let the process open as many files as the system allows: a pair set may have thousands of parts."""
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):  # macOS accepts no unlimited number
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _Remarks(logging.Handler):
    """Writes the library's log records to stderr as remarks."""

    def emit(self, record: logging.LogRecord) -> None:
        remark(self.format(record))
