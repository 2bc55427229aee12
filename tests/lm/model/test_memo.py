"""A memo saves time, and whatever is in its file decides nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_cache.lm.model import memo
from dpo_cache.lm.model.memo import read_memo, write_memo

STAMP = ["/a/file", 1, 2, 3, 4]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    write_memo("name", STAMP, {"lines": {"a": 1}})
    (found,) = (tmp_path / "dpo-cache" / "digests").iterdir()
    return found


def test_content_is_read_under_its_name_and_stamp(file: Path) -> None:
    assert read_memo("name", STAMP) == {"lines": {"a": 1}}
    assert read_memo("other", STAMP) == {} == read_memo("name", [*STAMP[:-1], 5])
    assert json.loads(file.read_text())["version"] == memo.VERSION


@pytest.mark.parametrize(
    "text",
    [
        b"", b"\xff", b"null", b"[]", b"1", b'"text"', b"{}", b'{"stamp": null}', b'{"lines": null}', b"[" * 10**5,
        b'{"stamp": ["/a/file", 1, 2, 3, 4], "lines": null}', b'{"version": 2, "sha256": null, "content": []}',
    ],
    ids=lambda text: str(text[:40]),
)  # fmt: skip
def test_any_other_content_counts_as_none(file: Path, text: bytes) -> None:
    file.write_bytes(text)
    assert read_memo("name", STAMP) == {}


@pytest.mark.parametrize("field", ["version", "stamp", "content", "sha256"])
@pytest.mark.parametrize("value", [None, [], {}, "x", 3])
def test_a_field_that_was_changed_or_is_missing_counts_as_none(file: Path, field: str, value: object) -> None:
    document = json.loads(file.read_text())
    for changed in ({**document, field: value}, {name: document[name] for name in document if name != field}):
        file.write_text(json.dumps(changed))
        assert read_memo("name", STAMP) == {}


def test_a_sealed_memo_of_another_version_counts_as_none(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memo, "VERSION", 3)
    assert read_memo("name", STAMP) == {}


def test_a_home_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_memo("name", STAMP, {"a": 1})
    assert read_memo("name", STAMP) == {}


def test_a_user_without_a_home_has_no_memo() -> None:
    code = """
import os, pwd
from pathlib import Path
os.environ.pop("HOME", None), os.environ.pop("XDG_CACHE_HOME", None)
def nobody(*_):
    raise KeyError("uid not found")
pwd.getpwuid = nobody
try:
    Path.home()
except RuntimeError:
    pass
else:
    raise SystemExit("this user has a home")
from dpo_cache.lm.model.memo import read_memo, write_memo
write_memo("name", [1], {"a": 1})
assert read_memo("name", [1]) == {}
"""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stderr
