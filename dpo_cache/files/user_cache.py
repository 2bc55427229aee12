"""The folder where the package keeps small files of this user: `~/.cache/dpo-cache`.

`$XDG_CACHE_HOME` replaces `~/.cache`. Everything in it can be deleted at any time.
"""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path | None:
    """The folder, which may not exist yet; None for a user without a home."""
    home = os.environ.get("XDG_CACHE_HOME")
    try:
        caches = Path(home) if home else Path.home() / ".cache"
    except RuntimeError:  # neither HOME nor an entry in the list of users
        return None
    return caches / "dpo-cache"
