"""Whole files in a cache folder, on a disk (`local.py`) or behind any fsspec URL (`remote.py`).

Every file is immutable and published in one step, so a reader sees all of it or nothing. Names are relative
to the folder, with `/` between their parts; dot-files are scratch and never listed.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from dpo_cache.errors import OptionError
from dpo_cache.files.locations import is_url
from dpo_cache.store.folders.local import LocalFolder
from dpo_cache.store.folders.remote import PACKAGES, RemoteFolder, open_remote

Folder = LocalFolder | RemoteFolder

LOCAL_SCHEMES = ("file", "local")  # those of fsspec
# `s3:/bucket` and `file:cache`, which would be folders of that name here
MISTYPED = re.compile(rf"({'|'.join([*PACKAGES, *LOCAL_SCHEMES, 'http', 'https'])}):(?!//)", re.IGNORECASE)


def open_folder(location: str | os.PathLike[str]) -> Folder:
    """The folder at a path or fsspec URL. Nothing is created until something is published.

    Raises `OptionError` for a URL that names no folder.
    """
    text = os.fspath(location)
    if not text or "\0" in text:
        raise OptionError(f"{text!r} cannot be the place of a cache.\nGive a folder's path, or a URL.")
    scheme = text.partition("://")[0] if is_url(text) else ""
    if scheme.lower() in LOCAL_SCHEMES:
        return LocalFolder(path_of_url(text))
    if scheme:
        return open_remote(text)
    try:
        path = Path(text).expanduser()
    except RuntimeError as error:
        raise OptionError(f"{text}: {error}\nGive the folder's whole path.") from error
    if (found := MISTYPED.match(text)) and not path.exists():
        raise OptionError(
            f"{text}: neither a path nor a URL.\n"
            f"Write {found[1].lower()}://…, or ./{text} for a folder of this name."
        )
    return LocalFolder(path)


def path_of_url(url: str) -> Path:
    """The path in a file URL: `file:///x` and `file://localhost/x` are /x, and `%20` is a space. Raises
    `OptionError` for a URL that names another host, or has a query.
    """
    parts = urlsplit(url)
    if parts.netloc.lower() not in ("", "localhost") or not parts.path:
        raise OptionError(
            f"{url}: expected the URL of a folder of this machine, file:///PATH.\n"
            f"{parts.netloc or 'Nothing'} would be the name of a host; a relative path is written without file://."
        )
    if parts.query or parts.fragment:
        raise OptionError(f"{url}: a cache's URL has no query (?…) and no fragment (#…).\nGive its path.")
    return Path(url2pathname(parts.path))
