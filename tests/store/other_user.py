"""What another user of the machine may do, whom the file system refuses what it does not refuse root."""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable

import pytest

OTHER = 54321  # a user and a group of no account
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become another user"
)


def as_other_user(
    call: Callable[[], object], *, user: int = OTHER, groups: tuple[int, ...] = (), umask: int = 0o022
) -> str:
    """The result of the call as text, or its traceback, in a child process of another user."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork amid threads: the child uses none
        child = os.fork()
    if child == 0:
        try:
            os.umask(umask)
            os.setgroups(groups)
            os.setgid(user)
            os.setuid(user)
            text = str(call())
        except BaseException:
            text = traceback.format_exc()
        os.write(writing, text.encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text
