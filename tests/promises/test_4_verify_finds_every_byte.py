"""Promise 4, the side of `verify`: every flipped byte and every truncation is found, in every file of the
cache.

`make test` takes every few bytes, others each day, `make test-slow` all of them. Afterwards `repair` and `precompute` give
the same rows.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.errors import NewerFormatError
from dpo_cache.store import Cache
from dpo_cache.store.upkeep.contents import read_contents
from dpo_cache.store.upkeep.repair import repair_cache
from dpo_cache.store.upkeep.verify import verify_cache
from tests.conftest import chat_rows, write_rows
from tests.rotation import today
from tests.store.caches import make_cache
from tests.store.conftest import flip, plain

STRIDES = [pytest.param(41, id="some"), pytest.param(1, marks=pytest.mark.slow, id="all")]


def damaged(content: bytes, stride: int) -> Iterator[bytes]:
    """Each byte flipped in one bit, another from byte to byte; then the file cut short at each length."""
    for position in range(today() % stride, len(content), stride):
        yield flip(content, position, 1 << position % 8)
    for length in range(today() % stride, len(content), stride):
        yield content[:length]


@pytest.mark.parametrize("stride", STRIDES)
def test_verify_names_the_file_each_time(tmp_path: Path, stride: int) -> None:
    root = tmp_path / "cache"
    make_cache(root)
    files = sorted(path for path in root.rglob("*") if path.is_file())
    assert len(files) == 6 and verify_cache(root).is_whole
    newer = 0
    for path in files:
        content, name = path.read_bytes(), path.relative_to(root).as_posix()
        for number, bad in enumerate(damaged(content, stride)):
            path.write_bytes(bad)
            try:
                report = verify_cache(root)
            except (
                NewerFormatError
            ) as error:  # a flipped digit of the version: it may be true, so nothing is repaired
                assert name == "format.json" and "its format.json is damaged" in str(error)
                newer += 1
                continue
            assert name in {problem.file for problem in report.problems}, (name, number)
        path.write_bytes(content)
    assert verify_cache(root).is_whole
    assert newer <= 1


@pytest.mark.parametrize("stride", STRIDES)
def test_ls_lists_what_is_left_whatever_is_damaged(tmp_path: Path, stride: int) -> None:
    root = tmp_path / "cache"
    make_cache(root)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for bad in damaged(content, 2 * stride):
            path.write_bytes(bad)
            try:
                contents = read_contents(root)
            except NewerFormatError:
                continue
            assert len(contents.references) == 1 and len(contents.pair_sets) == 1
        path.write_bytes(content)


@pytest.mark.parametrize(
    "places", [pytest.param(1, id="some"), pytest.param(6, marks=pytest.mark.slow, id="all")]
)
def test_repair_and_precompute_give_the_same_rows(model_folder: str, tmp_path: Path, places: int) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", chat_rows(6))
    root, spare = tmp_path / "cache", tmp_path / "spare"
    dpo_cache.precompute(model_folder, data, root)
    shutil.copytree(root, spare)
    expected = [plain(pair) for pair in Cache(root).pairs("pairs")]
    for path in sorted(path for path in spare.rglob("*") if path.is_file()):
        content, name = path.read_bytes(), path.relative_to(spare).as_posix()
        for place in range(places):
            shutil.rmtree(root)
            shutil.copytree(spare, root)
            position = len(content) * (2 * place + 1) // (2 * places)
            (root / name).write_bytes(flip(content, position))
            report = verify_cache(root)
            assert name in {problem.file for problem in report.problems}
            repaired = repair_cache(root, report)
            dpo_cache.precompute(model_folder, data, root)
            assert verify_cache(root).is_whole
            assert [plain(pair) for pair in Cache(root).pairs("pairs")] == expected
            assert [
                (root / str(moved.to)).read_bytes() for moved in repaired.moved if moved.file == name
            ] == [flip(content, position)]
