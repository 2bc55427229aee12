import errno
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.errors import OptionError
from dpo_cache.options.upkeep import parse_share
from dpo_cache.store import Cache
from dpo_cache.store.folders.folder import open_folder
from dpo_cache.store.folders.local import LocalFolder
from dpo_cache.store.upkeep import subset as subset_module
from dpo_cache.store.upkeep.subset import POSITIONS, Subset, choose_subset, position, record_subset
from dpo_cache.store.upkeep.verify import verify_cache
from tests.store.caches import add_scores, contents, make_cache
from tests.store.conftest import flip_file
from tests.store.refusing_disk import refuse

NAMES = [f"references/{number}" for number in range(300)]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    cache = make_cache(tmp_path / "cache")
    for number in range(10, 30, 2):
        add_scores(cache, cache.references()[0], [number, number + 1])
    return tmp_path / "cache"


def read_now(root: Path, monkeypatch: pytest.MonkeyPatch, percent: str = "10%") -> list[str]:
    """The shards and parts that the next run reads."""
    names: list[str] = []
    real = LocalFolder.read
    with monkeypatch.context() as patch:
        patch.setattr(LocalFolder, "read", lambda self, name: names.append(name) or real(self, name))
        assert dpo_cache.verify(root, subset=percent).is_whole
    return sorted(name for name in names if name.endswith(".parquet"))


@pytest.mark.parametrize("share", [0.1, 0.25, 1 / 3, 1.0, 0.07])
def test_successive_runs_read_every_file_before_they_read_one_again(tmp_path: Path, share: float) -> None:
    folder, seen = open_folder(tmp_path), list[str]()
    for _ in range(int(1 / share)):
        subset = choose_subset(folder, share)
        seen += [name for name in NAMES if name in subset]
        record_subset(folder, subset)
    assert len(seen) == len({*seen})
    if share in (0.1, 0.25, 1.0):
        assert {*seen} == {*NAMES}


def test_runs_of_any_shares_continue_where_the_last_one_ended(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    starts = []
    for share in (0.5, 0.3, 0.3):
        subset = choose_subset(folder, share)
        record_subset(folder, subset)
        starts.append(subset.start)
    assert [(later - starts[0]) % POSITIONS for later in starts] == [0, 500_000, 800_000]
    assert all((name in subset) == ((position(name) - subset.start) % POSITIONS < 300_000) for name in NAMES)


def test_positions_are_spread_over_all_names() -> None:
    counts = [sum(name in Subset(start * 100_000, 100_000) for name in NAMES) for start in range(10)]
    assert sum(counts) == len(NAMES) and min(counts) > 15


@pytest.mark.parametrize("content", [b"", b"{}", b'{"next": 3}', b"\xff"])
def test_a_record_that_is_none_is_passed_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".verified.json").write_bytes(content)
    assert choose_subset(open_folder(tmp_path), 0.1) == choose_subset(open_folder(tmp_path / "other"), 0.1)


def test_where_nothing_can_be_recorded_the_day_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    refuse(monkeypatch, errno.EROFS, lambda path: path.name.startswith("."), ("rename",))
    folder, starts = open_folder(tmp_path), []
    for day in range(20_000, 20_010):
        monkeypatch.setattr(subset_module.time, "time", lambda day=day: day * 86_400.0)
        subset = choose_subset(folder, 0.1)
        assert subset == choose_subset(folder, 0.1)
        record_subset(folder, subset)
        starts.append(subset.start)
    assert sorted(starts) == [number * 100_000 for number in range(10)]
    assert "so the day decides which files are next: cannot write" in caplog.text


def test_verify_reads_other_files_each_time_and_all_in_ten_runs(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [read_now(root, monkeypatch) for _ in range(10)]
    everything = sorted(name for name in Cache(root).folder.files() if name.endswith(".parquet"))
    assert sorted(name for names in runs for name in names) == everything and len(everything) == 13
    assert read_now(root, monkeypatch) == runs[0]


def test_verify_without_it_reads_all_and_records_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(root)
    report = verify_cache(root)
    assert report.subset is None and report.files_read == report.files and contents(root) == before


def test_damage_is_found_by_the_run_that_reads_the_file(root: Path) -> None:
    shard = min(root.rglob("scores/*.parquet"))
    flip_file(shard, 60)
    reports = [verify_cache(root, subset=0.2) for _ in range(5)]
    assert sorted(len(report.problems) for report in reports) == [0, 0, 0, 0, 1]
    assert all(report.files_read < report.files for report in reports)


def test_a_part_of_another_size_and_a_missing_one_are_found_by_every_run(root: Path) -> None:
    (part,) = root.rglob("train/*.parquet")
    part.write_bytes(part.read_bytes()[:-1])
    kinds = [{problem.kind for problem in verify_cache(root, subset=0.01).problems} for _ in range(3)]
    part.unlink()
    kinds += [{problem.kind for problem in verify_cache(root, subset=0.01).problems} for _ in range(3)]
    assert kinds == [{"damaged"}] * 3 + [{"missing"}] * 3


@pytest.mark.parametrize(
    ("text", "share"),
    [("10%", 0.1), ("2.5 %", 0.025), ("100%", 1.0), (".5%", 0.005), ("0%", None), ("101%", None), ("10", None),
     ("0.1", None), ("-5%", None), ("ten%", None), ("", None), ("1e1%", None), ("nan%", None)],
)  # fmt: skip
def test_a_share_is_a_percentage(text: str, share: float | None) -> None:
    assert parse_share(text) == (None if share is None else pytest.approx(share))


def test_another_text_is_an_error_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match="`subset` 10: expected a percentage above 0% and up to 100%, such as 10%."
    ):
        dpo_cache.verify(tmp_path / "none", subset="10")
