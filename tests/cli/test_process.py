"""What the command line sets for its process, and takes back."""

import logging
import subprocess
import sys

import pytest

from dpo_cache.cli.process import NOISY, process_settings, resource


def test_remarks_of_the_library_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("dpo_cache.somewhere")
    before = [*logging.getLogger("dpo_cache").handlers]
    with process_settings():
        logger.warning("a remark")
    assert capsys.readouterr() == ("", "a remark\n")
    assert logging.getLogger("dpo_cache").handlers == before


def test_loggers_of_other_packages_are_as_before() -> None:
    levels = [logging.getLogger(name).level for name in NOISY]
    with process_settings():
        assert not any(logging.getLogger(name).isEnabledFor(logging.WARNING) for name in NOISY)
    assert [logging.getLogger(name).level for name in NOISY] == levels


@pytest.mark.skipif(resource is None, reason="no such limit on this system")
def test_as_many_files_may_be_open_as_the_system_allows() -> None:
    code = """
import resource
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 256), hard))
from dpo_cache.cli.process import process_settings
with process_settings():
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
