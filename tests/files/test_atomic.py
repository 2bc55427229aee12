"""What is written whole: it replaces what was there, or leaves it as it was, at whichever step it is stopped."""

import os
from pathlib import Path

import pytest

from dpo_cache.files import atomic
from dpo_cache.files.atomic import is_scratch, remedy_of, replaced, write_whole


class Killed(BaseException):
    pass


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a").write_text(text)


def content(path: Path) -> str:
    return (path / "inner" / "a").read_text() if path.is_dir() else path.read_text()


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path, is_shared: bool) -> None:
    for text in ("one", "zwei ä"):
        write_whole(tmp_path / "a.json", text, is_shared=is_shared)
        assert (tmp_path / "a.json").read_bytes() == text.encode()
    write_whole(tmp_path / "a.json", b"\xff", is_shared=is_shared)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a.json", b"\xff")]


@pytest.mark.parametrize("is_folder", [False, True], ids=["file", "folder"])
@pytest.mark.parametrize("step", ["block", "sync", "replace"])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_refusal_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_folder: bool, step: str, at: int
) -> None:
    path, steps = tmp_path / "target", []
    fill(path, "before") if is_folder else path.write_text("before")

    def refused(real):
        def call(*arguments):
            steps.append(step)
            if len(steps) == at:
                raise Killed
            return real(*arguments)

        return call

    monkeypatch.setattr(atomic, "sync", refused(atomic.sync) if step == "sync" else atomic.sync)
    monkeypatch.setattr(os, "replace", refused(os.replace) if step == "replace" else os.replace)
    try:
        with replaced(path) as scratch:
            fill(scratch, "after") if is_folder else scratch.write_text("after")
            if step == "block":
                raise Killed
        was_stopped = False
    except Killed:
        was_stopped = True
    was_last = step == "sync" and len(steps) == (4 if is_folder else 2)  # the folder above, after the rename
    assert content(path) == ("before" if was_stopped and not was_last else "after")
    assert was_stopped == (step == "block" or len(steps) >= at)
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "target"
    for name in (".target.tmp", ".target.old.tmp"):
        assert is_scratch(name)
        fill(tmp_path / name, "half")
    fill(path, "before")
    with replaced(path) as scratch:
        assert not scratch.exists()
        fill(scratch, "after")
    assert content(path) == "after"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]
    assert not is_scratch("target") and not is_scratch(".hidden") and not is_scratch("a.tmp")


def test_writers_of_a_shared_path_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "target"
    with replaced(path, is_shared=True) as one, replaced(path, is_shared=True) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one", "the last to finish"
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "a", "text")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        write_whole(tmp_path / "file" / "a", "text")


def test_only_a_full_disk_is_to_be_emptied() -> None:
    full = [OSError(28, "x"), OSError(122, "x"), RuntimeError("No space left on device (os error 28)")]
    assert {remedy_of(error)[:15] for error in full} == {"Free some space"}
    large = [OSError(27, "x"), RuntimeError("I/O error: File too large (os error 27)")]
    assert {remedy_of(error) for error in large} == {"Raise the limit on the size of a file (`ulimit -f`)."}
    others = [OSError(2, "x"), OSError(13, "x"), RuntimeError("Permission denied (os error 13)")]
    assert {remedy_of(error) for error in others} == {"Check the path and its permissions."}
