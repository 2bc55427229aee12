"""An S3 server on loopback, and a proxy before it that misbehaves by a plan."""

from __future__ import annotations

import http.client
import re
import socket
import struct
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

ERROR = "<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"


@dataclass
class Fault:
    """What happens to the next `times` requests of this method whose path and query hold `where`.

    `status` and `code` are an answer instead of the server's own; `kind` is one of

        none    counts, and harms nothing
        error   `status` and `code`
        hang    no answer
        mute    a PUT is never asked for its body
        reset   the connection is closed unanswered
        cut     half of the body, then a reset
        late    keys with `hidden` in them are left out of a listing
        stale   the key `hidden` stands in a listing
    """

    kind: str
    method: str = ""
    where: str = ""
    times: int = 1
    status: int = 500
    code: str = "InternalError"
    hidden: str = ""


@dataclass
class Proxy:
    """The proxy: its address, its plan, and what it saw."""

    url: str
    plan: list[Fault] = field(default_factory=list)
    seen: list[str] = field(default_factory=list)  # "METHOD path?query"
    hit: Counter[str] = field(default_factory=Counter)  # faults by kind
    hang_s: float = 3.0

    def reset(self) -> None:
        self.plan.clear()
        self.seen.clear()
        self.hit.clear()

    def count(self, method: str, where: str = "") -> int:
        """Requests seen of this method whose path and query hold `where`."""
        return sum(request.startswith(f"{method} ") and where in request for request in self.seen)

    def next_fault(self, method: str, path: str) -> Fault | None:
        for fault in self.plan:
            if (
                fault.kind != "mute"
                and fault.times > 0
                and fault.method in ("", method)
                and fault.where in path
            ):
                fault.times -= 1
                self.hit[fault.kind] += 1
                return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: two would wait for each other's receipt
    disable_nagle_algorithm = True
    proxy: Proxy
    server_port: int

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.proxy.seen.append(f"{self.command} {self.path}")
        fault = self.proxy.next_fault(self.command, self.path)
        if fault is not None and fault.kind in ("hang", "reset"):
            time.sleep(self.proxy.hang_s if fault.kind == "hang" else 0)
            self._drop()
        elif fault is not None and fault.kind == "error":
            self._answer(
                fault.status, {}, b"" if self.command == "HEAD" else ERROR.format(code=fault.code).encode()
            )
        else:
            status, headers, content = self._forward(body)
            if fault is not None and fault.kind == "late":
                content = _hide(content, fault.hidden)
            elif fault is not None and fault.kind == "stale":
                content = _add(content, fault.hidden)
            self._answer(status, headers, content, is_cut=fault is not None and fault.kind == "cut")

    def handle_expect_100(self) -> bool:
        """Ask for the body; under the fault `mute` let the client wait for that."""
        fault = next((fault for fault in self.proxy.plan if fault.kind == "mute" and fault.times > 0), None)
        if fault is not None:
            fault.times -= 1
            self.proxy.hit["mute"] += 1
            time.sleep(self.proxy.hang_s)
            self._drop()
            return False
        asked = super().handle_expect_100()
        self.wfile.flush()
        return asked

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server_port, timeout=20)
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("connection", "expect")
        }
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        kept = {
            name: value
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "date", "server")
        }
        return answer.status, kept, content

    def _answer(self, status: int, headers: dict[str, str], content: bytes, *, is_cut: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() != "content-length" or self.command == "HEAD":
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        elif "Content-Length" not in headers and "content-length" not in headers:
            self.send_header("Content-Length", "0")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if is_cut else content)
        if is_cut:
            self._drop()

    def _drop(self) -> None:
        """Close the connection with a reset instead of an orderly end."""
        self.wfile.flush()
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve

    def log_message(self, *_: object) -> None:
        pass


def _hide(listing: bytes, hidden: str) -> bytes:
    """The listing as if keys with this in them, and folders of them, were not known yet."""
    entry = rb"<(Contents|CommonPrefixes)>(?:(?!</\1>).)*?" + re.escape(hidden.encode()) + rb".*?</\1>"
    shown, count = re.subn(entry, b"", listing, flags=re.DOTALL)
    return re.sub(rb"<KeyCount>(\d+)<", lambda match: b"<KeyCount>%d<" % (int(match[1]) - count), shown)


def _add(listing: bytes, key: str) -> bytes:
    """The listing as if this key were still there."""
    entry = f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>e</ETag><Size>1</Size></Contents>"
    return listing.replace(b"</ListBucketResult>", entry.encode() + b"</ListBucketResult>")


class _QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that went away is what the tests are about."""


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Proxy]:
    """An S3 server behind the proxy, for the session."""
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    _, port = moto.get_host_and_port()
    handler = type("Handler", (_Handler,), {"server_port": port})
    server = _QuietServer(("127.0.0.1", 0), handler)
    proxy = Proxy(f"http://127.0.0.1:{server.server_address[1]}")
    handler.proxy = proxy  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield proxy
    server.shutdown()
    server.server_close()
    thread.join()
    moto.stop()


@pytest.fixture
def s3(
    s3_server: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxy]:
    """The server with a fresh plan, as the environment's S3, the bucket `bucket`, and short waits between
    tries.
    """
    import boto3

    for name, value in {
        "AWS_ENDPOINT_URL": s3_server.url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "DPO_CACHE_PARTS": str(tmp_path_factory.mktemp("parts")),
        "NO_PROXY": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dpo_cache.store.folders.retries.WAITS_S", (0.01,) * 6)
    monkeypatch.setattr("dpo_cache.store.folders.remote.READ_S", 1)
    monkeypatch.setattr("dpo_cache.store.folders.remote._own_changes", {})
    s3_server.reset()
    urllib.request.urlopen(urllib.request.Request(f"{s3_server.url}/moto-api/reset", method="POST")).close()
    boto3.client("s3").create_bucket(Bucket="bucket")
    s3_server.reset()
    yield s3_server
    s3_server.reset()
