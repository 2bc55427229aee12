"""Calls to an object store: transient failures are retried, lasting ones become one error with its fix.

Time-outs, broken connections, throttling and faults of the server are transient; a missing bucket, refused
access, a wrong region or a missing package are not. The libraries behind fsspec raise their own kinds of
errors, which are classified by the status and code of the response, and by type if there was no response.

The loop here replaces the retries of botocore and s3fs, which are switched off so that tries do not multiply:
with both on, a store that keeps answering 503 is given up after 140 s, here after 25 s. Of the faults that
the tests inject, those two outlive 500, 503, `RequestTimeout`, resets, time-outs and broken bodies, but not
429 `TooManyRequests`, a body that ends early without an error, or a PUT whose body is never requested, which
only a time limit on the whole call ends. Other stores, as `hf://`, retry only some of their calls.
"""

from __future__ import annotations

import errno
import http.client
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from dpo_cache.errors import StorageError, first_line
from dpo_cache.log import log_remark
from dpo_cache.store.folders.failures import ADVICE as DISK_ADVICE
from dpo_cache.store.folders.failures import TOO_MANY_OPEN

Result = TypeVar("Result")

# Between the tries; up to half of each is subtracted at random, so that writers do not collide again.
WAITS_S = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
REMARK_AFTER_S = 3.0  # seconds of failed attempts before the first remark

PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}
PASSING_CODES = {
    "RequestTimeout",
    "IncompleteBody",
    "BadDigest",
    "InternalError",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
}
PASSING_TYPES = (TimeoutError, ConnectionError, EOFError, http.client.HTTPException, socket.gaierror)
PASSING_ERRNO = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.EINTR,
    errno.ETIMEDOUT,
    errno.ENETUNREACH,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
}
PASSING_NAMES = {  # package.class: none of these packages need be installed
    "aiohttp.ClientConnectionError", "aiohttp.ClientPayloadError", "botocore.ConnectionError",
    "botocore.HTTPClientError", "botocore.IncompleteReadError", "fsspec.FSTimeoutError",
    "botocore.ResponseParserError", "httpx.TransportError", "httpx2.TransportError",
    "requests.ConnectionError", "requests.Timeout", "urllib3.HTTPError",
}  # fmt: skip
LASTING_NAMES = {
    "aiohttp.ClientSSLError",
    "botocore.SSLError",
    "huggingface_hub.OfflineModeIsEnabled",
    "requests.SSLError",
}

ADVICE = {
    "bucket": "There is no such bucket: check the URL, or create the bucket first.",
    "credentials": "Check the credentials of the store: for s3:// those of the AWS command line "
    "(AWS_PROFILE, AWS_ACCESS_KEY_ID), "
    "for gs:// `gcloud auth application-default login`, for hf:// `hf auth login` or HF_TOKEN.",
    "access": "Access was refused: check that these credentials may list, read and write there.",
    "region": "The bucket is in another region or behind another endpoint: set AWS_DEFAULT_REGION or "
    "AWS_ENDPOINT_URL.",
    "readonly": "This kind of URL can only be read: choose another `cache`, such as a folder or s3://….",
    "offline": "HF_HUB_OFFLINE is set: unset it to reach hf://.",
    "passing": "The store or the way to it fails: check the network and the endpoint, then run the same "
    "command again; what was published is kept.",
    "other": "Check the URL and run the same command again; what was published is kept.",
}
KINDS = {
    "NoSuchBucket": "bucket",
    "NoCredentialsError": "credentials",
    "PartialCredentialsError": "credentials",
    "ProfileNotFound": "credentials",
    "TokenRetrievalError": "credentials",
    "UnauthorizedSSOTokenError": "credentials",
    "InvalidAccessKeyId": "credentials",
    "SignatureDoesNotMatch": "credentials",
    "ExpiredToken": "credentials",
    "InvalidToken": "credentials",
    "401": "credentials",
    "RepositoryNotFoundError": "credentials",
    "AccessDenied": "access",
    "403": "access",
    "PermissionError": "access",
    "PermanentRedirect": "region",
    "AuthorizationHeaderMalformed": "region",
    "IllegalLocationConstraintException": "region",
    "301": "region",
    "OfflineModeIsEnabled": "offline",
    "NotImplementedError": "readonly",
}


def with_retries(verb: str, place: str, call: Callable[[], Result]) -> Result:
    """The result of the call, which must be harmless to repeat.

    Raises `FileNotFoundError` if the file does not exist, and `StorageError` for any other failure that is
    lasting, or that still occurs at the seventh try: the waits add up to half a minute, without time-outs.
    """
    started, is_logged = time.monotonic(), False
    for tries, wait_s in enumerate((*WAITS_S, None), start=1):
        try:
            return call()
        except Exception as error:  # each library behind fsspec has its own tree of errors
            if isinstance(error, FileNotFoundError) and advice_kind(error) == "other":
                raise
            waited_s = time.monotonic() - started
            if wait_s is None or not may_pass(error) or too_many_open(error):
                raise remote_error(verb, place, error, tries, waited_s) from error
            if not is_logged and waited_s + wait_s > REMARK_AFTER_S:
                is_logged = True
                log_remark(
                    f"cannot {verb} {place} so far ({describe(error)}; tried {tries} of "
                    f"{len(WAITS_S) + 1} times); trying again."
                )
            time.sleep(wait_s * random.uniform(0.5, 1))
    raise AssertionError("the last try returns or raises")


def may_pass(error: BaseException) -> bool:
    """Return whether the same call may work a little later."""
    for link in _chain(error):
        names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(link).__mro__}
        if isinstance(link, FileNotFoundError | PermissionError | ImportError) or LASTING_NAMES & names:
            return False
        status, code = _answer(link)
        if status or code:
            return status in PASSING_STATUS or code in PASSING_CODES
        has_passing_errno = (
            isinstance(link, OSError) and link.errno in PASSING_ERRNO and link.__cause__ is None
        )
        if isinstance(link, PASSING_TYPES) or PASSING_NAMES & names or has_passing_errno:
            return True
    return False


def remote_error(verb: str, place: str, error: BaseException, tries: int, elapsed_s: float) -> StorageError:
    """The error with its fix: what failed, how often it was tried, what to do."""
    tried = f"Tried {tries} times in {elapsed_s:.0f} s. " if tries > 1 else ""
    if number := too_many_open(error):
        return StorageError(f"cannot {verb} {place}: {os.strerror(number)}.\n{DISK_ADVICE[number]}")
    return StorageError(f"cannot {verb} {place}: {describe(error)}.\n{tried}{ADVICE[advice_kind(error)]}")


def too_many_open(error: BaseException) -> int | None:
    """The error's number if a connection failed because too many files are open.

    The libraries report that as a connection that fails or a host without an address, often without the
    number, so it is tried whether a file can be opened.
    """
    for link in _chain(error):
        if isinstance(link, OSError) and link.errno in TOO_MANY_OPEN:
            return link.errno
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as refusal:
        return refusal.errno if refusal.errno in TOO_MANY_OPEN else None
    return None


def describe(error: BaseException) -> str:
    """The failure in one line: the store's own code, if there is one, then its message."""
    code = next((code for link in _chain(error) for code in [_answer(link)[1]] if code), "")
    message = ((isinstance(error, OSError) and error.strerror) or first_line(error)).rstrip(".")
    return message if not code or code in message else f"{code}: {message}"


def advice_kind(error: BaseException) -> str:
    """The key in `ADVICE` of the advice that fits."""
    for link in _chain(error):
        status, code = _answer(link)
        for mark in (code, *(kind.__name__ for kind in type(link).__mro__), str(status)):
            if mark in KINDS and not (mark == "PermissionError" and link.__cause__ is not None):
                return KINDS[mark]
    return "passing" if may_pass(error) else "other"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what caused it, outermost first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _answer(error: BaseException) -> tuple[int | None, str]:
    """HTTP status and error code of the store's answer, as far as this error carries them."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        code = str(response.get("Error", {}).get("Code", ""))
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode"), code
    for holder, name in ((response, "status_code"), (error, "status"), (error, "code")):
        status = getattr(holder, name, None)
        if str(status).isdecimal():
            return int(str(status)), ""
    return None, ""
