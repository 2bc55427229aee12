"""A file in a store, read by ranges: the same bytes, and few requests."""

import io

import numpy as np
import pyarrow as pa
import pytest

from dpo_cache.store.folders import ranges
from dpo_cache.store.folders.ranges import RangeFile, join_ranges

CONTENT = np.random.default_rng(0).bytes(5000)


class Store:
    def __init__(self, content: bytes = CONTENT):
        self.content, self.requests = content, list[tuple[int, int]]()

    def read(self, start: int, end: int) -> bytes:
        self.requests.append((start, end))
        return self.content[start:end]

    def open(self, tail: int = 1000) -> RangeFile:
        return RangeFile(len(self.content), self.content[-tail:] if tail else b"", self.read)


def test_any_position_reads_the_same_bytes() -> None:
    store, plain, generator = Store(), io.BytesIO(CONTENT), np.random.default_rng(1)
    source = store.open()
    for _ in range(200):
        at, size = (int(number) for number in generator.integers(0, 5500, 2))
        assert source.seek(at) == plain.seek(at)
        assert source.read(size) == plain.read(size)
        assert source.tell() == max(plain.tell(), at)
    source.seek(0)
    assert source.read() == CONTENT and source.read(1) == b""
    assert source.seek(-3, io.SEEK_END) == 4997 and source.read(10) == CONTENT[-3:]


def test_the_tail_and_what_is_loaded_need_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "GAP_BYTES", 10)
    store = Store()
    source = pa.PythonFile(store.open(), "r")
    assert source.size() == 5000 and source.read_at(800, 4200) == CONTENT[4200:] and store.requests == []
    file = store.open()
    file.load([(700, 800), (100, 200), (205, 300), (3900, 4100), (4500, 4600)])
    assert store.requests == [(100, 300), (700, 800), (3900, 4000)]
    source = pa.PythonFile(file, "r")
    for start, end in ((100, 300), (750, 800), (3900, 4100), (4500, 5000)):
        assert source.read_at(end - start, start) == CONTENT[start:end]
    assert len(store.requests) == 3
    assert source.read_at(50, 400) == CONTENT[400:450] and store.requests[3:] == [(400, 450)]


def test_a_small_file_is_all_tail() -> None:
    store = Store(b"abc")
    file = store.open()
    file.load([(0, 3)])
    assert file.read() == b"abc" and store.requests == []


@pytest.mark.parametrize(
    ("given", "joined"),
    [
        ([], []),
        ([(5, 9), (0, 3)], [(0, 9)]),
        ([(0, 9), (2, 5)], [(0, 9)]),
        ([(0, 3), (3 + 2**16, 3 + 2**17)], [(0, 3 + 2**17)]),
        ([(0, 3), (4 + 2**16, 3 + 2**17)], [(0, 3), (4 + 2**16, 3 + 2**17)]),
    ],
)
def test_ranges_near_each_other_are_one_request(given: list, joined: list) -> None:
    assert join_ranges(given) == joined
