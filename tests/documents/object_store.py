"""An S3 server on this machine, for pages that show `s3://bucket`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def bucket(is_wanted: bool) -> Iterator[None]:
    """While open, `s3://bucket` is an empty bucket, if it is wanted."""
    if not is_wanted:
        yield
        return
    import boto3
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(
        {
            "AWS_ENDPOINT_URL": f"http://{host}:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }
    )
    try:
        boto3.client("s3").create_bucket(Bucket="bucket")
        yield
    finally:
        server.stop()
