"""Remarks: what a run reports to its user besides its result. They go to the logger `dpo_cache` unless the
caller takes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

Log = Callable[[str], None]

log_remark: Log = logging.getLogger("dpo_cache").warning
