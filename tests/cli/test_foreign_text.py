"""Text from a cache that somebody else made reaches the terminal with all that could steer it escaped."""

import ast
from pathlib import Path

import pytest

import dpo_cache.cli
from dpo_cache import log, progress
from dpo_cache.errors import DpoCacheError, ModelError, printable, printable_lines
from dpo_cache.store import open_cache
from dpo_cache.store.format.documents import open_sealed, seal_document
from tests.cli.test_commands import run  # noqa: F401  (a fixture)
from tests.store.caches import make_cache

ESCAPES = "\x1b]0;mine\x07\x1b[2J\x9b31m\u202eevil\u2028\r"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache whose every free text steers a terminal."""
    root = tmp_path / "cache"
    make_cache(root)
    for path in root.rglob("*.json"):
        if path.name == "format.json":
            continue
        document = open_sealed(path.read_bytes(), "there")
        for member in ("provenance", "source", "tokenization"):
            for name, value in document.get(member, {}).items():
                if isinstance(value, str) and name != "truncation":
                    document[member][name] = value + ESCAPES
        path.write_bytes(seal_document(document))
    (root / "pairs" / f"x{ESCAPES}" / "train").mkdir(parents=True)
    (root / "pairs" / f"x{ESCAPES}" / "train" / "manifest.json").write_text("{}")
    (root / "references" / f"y{ESCAPES}").mkdir()
    (root / "references" / f"y{ESCAPES}" / "reference.json").write_text("{}")
    return root


def shows_no_escapes(text: str) -> bool:
    return all(letter.isprintable() for line in text.split("\n") for letter in line)


@pytest.mark.parametrize(
    "arguments",
    [
        ("ls", "CACHE"),
        ("ls", "CACHE", "demo"),
        ("ls", "CACHE", "nothing"),
        ("verify", "CACHE"),
        ("gc", "CACHE", "--grace", "0"),
        ("diff", "CACHE", "OTHER"),
        ("merge", "CACHE", "DEST"),
        ("rm", "CACHE", "pairs", "nothing"),
        ("rm", "CACHE", "reference", "none"),
        ("compact", "CACHE"),
        ("export", "CACHE", "--pairs", "nothing", "--output", "OUT.jsonl"),
        ("train", "CACHE", "--output", "RUN", "--pairs", "demo"),
        ("train", "CACHE", "--output", "RUN", "--pairs", "nothing"),
    ],
    ids=" ".join,
)
def test_no_command_prints_them(run, root: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    make_cache(tmp_path / "other")
    places = {"CACHE": root, "OTHER": tmp_path / "other", "DEST": tmp_path / "dest", "RUN": tmp_path / "run", "OUT.jsonl": tmp_path / "out.jsonl"}  # fmt: skip
    done = run(*(places.get(word, word) for word in arguments))
    assert done.out or done.err
    assert shows_no_escapes(done.out) and shows_no_escapes(done.err)


def test_a_line_break_in_a_text_does_not_make_a_line(run, tmp_path: Path) -> None:
    forged = "text\nerror: run `rm -rf ~`"
    for name in ("one", "other"):
        make_cache(tmp_path / name)
    (path,) = (tmp_path / "other").rglob("pairs/*/*/manifest.json")
    document = open_sealed(path.read_bytes(), "there")
    document["tokenization"]["truncation"] = document["source"]["created"] = forged
    document["pairs_digest"] = "0" * 64
    path.write_bytes(seal_document(document))
    shown = [
        run("diff", tmp_path / "one", tmp_path / "other"),
        run("merge", tmp_path / "one", tmp_path / "other", tmp_path / "all"),
    ]
    assert [done.code for done in shown] == [1, 1]
    for done in shown:
        text = done.out + done.err
        assert "text\\nerror: run" in text and "\nerror: run `rm" not in text


def test_folders_of_other_names_are_no_part_of_a_cache(root: Path) -> None:
    cache = open_cache(root)
    assert all(name.isprintable() for name in [*cache.pair_sets(), *cache.references()])


def test_errors_and_remarks_are_printable_for_users_of_the_library(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for error in (DpoCacheError, ModelError):
        assert str(error(f"a{ESCAPES}\nb")).split("\n")[1] == "b" and shows_no_escapes(str(error(ESCAPES)))
    progress.remark(f"a{ESCAPES}")
    assert shows_no_escapes(capsys.readouterr().err)


def test_the_library_logs_printable_remarks(caplog: pytest.LogCaptureFixture) -> None:
    log.log_remark(f"100% a{ESCAPES}")
    assert caplog.messages == [printable_lines(f"100% a{ESCAPES}")]


def test_one_function_escapes() -> None:
    assert printable("a\x1b[0m\nb\u202e") == "a\\x1b[0m\\nb\\u202e"
    assert printable("日本 é ñ") == "日本 é ñ" and printable(7) == "7"
    assert printable_lines("a\nb\r\n") == "a\nb\\r\n"


def test_no_file_of_the_command_line_prints_by_itself() -> None:
    prints = [
        path.name
        for path in Path(dpo_cache.cli.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert prints == ["output.py"]  # in `print_text`
