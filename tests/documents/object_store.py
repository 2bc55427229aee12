"""An S3 server on this machine, for pages that show `s3://bucket`."""

from __future__ import annotations

import atexit
import logging
import os
import urllib.request
from functools import cache


def make_bucket() -> None:
    """Make an empty bucket `s3://bucket`, and set this environment's S3 to its server."""
    import boto3

    os.environ.update(
        {
            "AWS_ENDPOINT_URL": _server(),
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }
    )
    urllib.request.urlopen(urllib.request.Request(f"{_server()}/moto-api/reset", method="POST")).close()
    boto3.client("s3").create_bucket(Bucket="bucket")


@cache  # one for the process: fsspec keeps its connections
def _server() -> str:
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    atexit.register(server.stop)
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"
