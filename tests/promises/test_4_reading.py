"""Promise 4, on reading: any flipped byte and any shortened file raises an error about damage, and never gives
other numbers.
"""

import random
from collections.abc import Iterable
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.errors import CorruptShardError, DpoCacheError, FormatError
from tests.promises.small_cache import files_of, make_small_cache, read_small_cache
from tests.rotation import today
from tests.store.conftest import flip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_cache(tmp_path_factory.mktemp("small") / "cache")


@pytest.fixture(scope="module")
def file_names(root: Path) -> list[str]:
    """format.json, the reference, two shards, the manifest and its two parts."""
    names = [str(path.relative_to(root)) for path in files_of(root)]
    assert len(names) == 7
    read_small_cache(root)
    return names


def unnoticed(
    root: Path, name: str, contents: Iterable[tuple[object, bytes]]
) -> list[tuple[str, object, str]]:
    """The changes of one file after which reading everything does not raise an error about that file."""
    path = root / name
    whole = path.read_bytes()
    expected = (CorruptShardError, FormatError) if name == "format.json" else (CorruptShardError,)
    found = []
    try:
        for change, content in contents:
            path.write_bytes(content)
            try:
                read_small_cache(root)
                found.append((name, change, "read"))
            except expected as error:
                # a FormatError names the cache
                if path.name not in str(error) and not isinstance(error, FormatError):
                    found.append((name, change, f"another place: {error}"))
            except DpoCacheError as error:
                found.append((name, change, f"{type(error).__name__}: {error}"))
    finally:
        path.write_bytes(whole)
    return found


def flips(content: bytes, positions: Iterable[int]) -> Iterable[tuple[object, bytes]]:
    generator = random.Random(len(content))
    for position in positions:
        mask = 1 << generator.randrange(8)
        yield (position, mask), flip(content, position, mask)


def truncations(content: bytes, lengths: Iterable[int]) -> Iterable[tuple[object, bytes]]:
    return ((length, content[:length]) for length in lengths)


def ends(size: int, step: int) -> list[int]:
    """The first and last 16 positions, and every so many between them, others each day."""
    return sorted(
        {*range(min(16, size)), *range(today() % step, size, step), *range(max(0, size - 16), size)}
    )


def test_flipped_bytes_are_found(root: Path, file_names: list[str]) -> None:
    contents = {name: (root / name).read_bytes() for name in file_names}
    assert [
        miss
        for name, content in contents.items()
        for miss in unnoticed(root, name, flips(content, ends(len(content), 127)))
    ] == []


def test_truncations_are_found(root: Path, file_names: list[str]) -> None:
    contents = {name: (root / name).read_bytes() for name in file_names}
    assert [
        miss
        for name, content in contents.items()
        for miss in unnoticed(root, name, truncations(content, ends(len(content), 257)[:-1]))
    ] == []


@pytest.mark.slow
def test_every_flipped_byte_is_found(root: Path, file_names: list[str]) -> None:
    contents = {name: (root / name).read_bytes() for name in file_names}
    assert [
        miss
        for name, content in contents.items()
        for miss in unnoticed(root, name, flips(content, range(len(content))))
    ] == []


@pytest.mark.slow
def test_every_truncation_is_found(root: Path, file_names: list[str]) -> None:
    contents = {name: (root / name).read_bytes() for name in file_names}
    assert [
        miss
        for name, content in contents.items()
        for miss in unnoticed(root, name, truncations(content, range(len(content))))
    ] == []


@pytest.mark.parametrize(
    "stride", [pytest.param(701, id="some"), pytest.param(29, marks=pytest.mark.slow, id="many")]
)
def test_train_raises_for_what_it_reads_and_takes_no_step(
    model_folder: str, data_file: str, tmp_path: Path, stride: int
) -> None:
    """The manifest, the parts, the reference's entry: all that a training run reads but the format file."""
    cache, run = tmp_path / "cache", tmp_path / "run"
    dpo_cache.precompute(model_folder, data_file, cache)
    files = [path for path in files_of(cache) if path.name != "format.json" and path.parent.name != "scores"]
    assert len(files) == 3
    for path in files:
        content = path.read_bytes()
        for _, changed in (
            *flips(content, range(0, len(content), stride)),
            *truncations(content, range(0, len(content), stride)),
        ):
            path.write_bytes(changed)
            with pytest.raises(CorruptShardError, match=path.name):
                dpo_cache.train(cache, run, max_steps=1)
        path.write_bytes(content)
    assert not (run / "model").exists()


def test_every_bit_of_the_format_file_counts(root: Path) -> None:
    """It has no digest of its own: any spelling but one is refused, white space included."""
    content = (root / "format.json").read_bytes()
    changed = (
        (place, flip(content, place[0], 1 << place[1]))
        for place in ((position, bit) for position in range(len(content)) for bit in range(8))
    )
    assert unnoticed(root, "format.json", changed) == []
    assert (
        unnoticed(
            root,
            "format.json",
            [
                ("space", content + b" "),
                ("spaces", content.replace(b"  ", b"\t")),
                ("one line", b'{"format":"dpo-cache","version":1}'),
            ],
        )
        == []
    )
