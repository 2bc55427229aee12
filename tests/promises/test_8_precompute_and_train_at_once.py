"""Promise 8: a training run reads the pair set it started with, whatever is published or collected
meanwhile.
"""

import json
import os
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.errors import StorageError
from dpo_cache.store import open_cache
from dpo_cache.store.folders.local import LocalFolder
from tests.conftest import chat_rows, write_rows
from tests.promises.life import publish_pairs
from tests.store.conftest import make_pairs, plain

pytestmark = [
    pytest.mark.usefixtures("small_parts"),
    pytest.mark.skipif(os.name == "nt", reason="an open file cannot be removed there"),
]


def remove_all(root: Path) -> None:
    """Everything in the cache, as the harshest collection would."""
    folder = LocalFolder(root)
    for name in folder.files():
        folder.remove(name)


def test_8_a_pair_set_that_is_held_reads_the_same_when_it_is_replaced_and_removed(tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache", create=True)
    publish_pairs(cache, "pairs", make_pairs(9))
    held = cache.pairs("pairs")
    held.keep_open()
    rows = iter(held)
    started = [plain(next(rows)) for _ in range(3)]
    publish_pairs(cache, "pairs", make_pairs(4, first_row=50))
    remove_all(tmp_path / "cache")
    assert started + [plain(pair) for pair in rows] == [plain(pair) for pair in make_pairs(9)]
    assert [plain(pair) for pair in held] == [plain(pair) for pair in make_pairs(9)]  # the next epoch, too


def test_8_one_that_is_not_held_says_that_it_is_gone(tmp_path: Path) -> None:
    """The held set of the test above is read from what it holds and not from the cache."""
    cache = open_cache(tmp_path / "cache", create=True)
    publish_pairs(cache, "pairs", make_pairs(9))
    pairs = cache.pairs("pairs")
    remove_all(tmp_path / "cache")
    with pytest.raises(StorageError, match="cannot read .*: No such file or directory"):
        list(pairs)


@pytest.mark.skipif(os.name == "nt", reason="no such limit there")
def test_8_more_parts_than_files_may_be_open_are_held_by_a_command(tmp_path: Path) -> None:
    """The library says what to do; the command line raises the limit as far as the system lets it."""
    import resource

    from dpo_cache.cli.process import raise_file_limit

    cache = open_cache(tmp_path / "cache", create=True)
    publish_pairs(cache, "pairs", make_pairs(120))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    num_open = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_open + 20, hard))
    try:
        with pytest.raises(
            StorageError, match="Too many open files.\nToo many files are open: raise the limit"
        ):
            cache.pairs("pairs").keep_open()
        raise_file_limit()
        held = cache.pairs("pairs")
        held.keep_open()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    remove_all(tmp_path / "cache")
    assert [plain(pair) for pair in held] == [plain(pair) for pair in make_pairs(120)]


def test_8_training_goes_on_as_if_nothing_had_been_replaced_or_collected(
    model_folder: str, tmp_path: Path
) -> None:
    """At its first step all of the cache is taken away, and a pair set of the same name and other data is put
    there.
    """
    data = [
        write_rows(tmp_path / f"{name}.jsonl", chat_rows(30, seed))
        for seed, name in enumerate(("first", "second", "held-out"))
    ]
    cache = tmp_path / "cache"

    def prepare() -> None:
        dpo_cache.precompute(model_folder, data[0], cache, name="pairs")
        dpo_cache.precompute(model_folder, data[2], cache, name="held-out")

    def disturb(metrics: dict) -> None:
        if metrics["step"] == 1 and "loss" in metrics:
            remove_all(cache)
            dpo_cache.precompute(model_folder, data[1], cache, name="pairs")

    def train(output: Path, on_metrics: object = None) -> list[dict]:
        prepare()
        options = {"pairs": "pairs", "eval_pairs": "held-out", "batch_size": 4, "epochs": 2.0, "lr": 1e-3}
        assert dpo_cache.train(cache, output, on_metrics=on_metrics, **options).finished  # type: ignore[arg-type]
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return [
            {name: value for name, value in line.items() if name not in ("pairs_per_s", "peak_bytes")}
            for line in lines
        ]

    alone = train(tmp_path / "alone")
    assert train(tmp_path / "disturbed", disturb) == alone
    assert len(open_cache(cache).pairs("pairs")) == 30 and open_cache(cache).pair_sets() == ["pairs/train"]
