import json
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cache.data import dataset_name, first_row, read_dataset
from dpo_cache.errors import DataError, OptionError
from dpo_cache.store.cache import check_name
from tests.data.conftest import assistant, user, write_lines

ROWS = [
    {"prompt": f"Question {number}?", "chosen": " Yes,\nsure.", "rejected": ' "No"'} for number in range(4)
]


def write_csv(path: Path) -> None:
    lines = ["prompt,chosen,rejected", *(f'{row["prompt"]},"{row["chosen"]}"," ""No"""' for row in ROWS)]
    path.write_text("\n".join(lines) + "\n")


WRITERS = {
    ".jsonl": lambda path: write_lines(path, ROWS),
    ".json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    ".csv": write_csv,
    ".parquet": lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path),
}


def error_of(location: object, *splits: str) -> str:
    with pytest.raises(DataError) as caught:
        read_dataset(str(location), splits)
    return str(caught.value)


@pytest.mark.parametrize("suffix", WRITERS)
def test_each_kind_of_file_gives_its_rows_in_order(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pairs{suffix}"
    WRITERS[suffix](path)
    found = read_dataset(str(path))
    assert list(found) == ["train"]
    assert found["train"].to_list() == ROWS


def test_messages_are_read_as_messages(tmp_path: Path) -> None:
    row = {
        "prompt": [user("Well?"), assistant("Hm."), user("So?")],
        "chosen": [assistant("Yes.")],
        "rejected": [assistant("No.")],
    }
    (read,) = read_dataset(write_lines(tmp_path / "pairs.jsonl", [row]))["train"]
    assert read == row


def test_a_folder_gives_train_unless_another_split_is_asked_for(tmp_path: Path) -> None:
    write_lines(tmp_path / "data/train.jsonl", ROWS)
    write_lines(tmp_path / "data/test.jsonl", ROWS[:1])
    assert {name: len(rows) for name, rows in read_dataset(str(tmp_path / "data")).items()} == {"train": 4}
    assert {name: len(rows) for name, rows in read_dataset(str(tmp_path / "data"), ["test"]).items()} == {
        "test": 1
    }
    assert list(read_dataset(str(tmp_path / "data"), ["test", "train"])) == ["test", "train"]


def test_a_folder_with_one_split_gives_that(tmp_path: Path) -> None:
    write_lines(tmp_path / "data/test.jsonl", ROWS)
    assert list(read_dataset(str(tmp_path / "data"))) == ["test"]


def test_several_splits_without_train_must_be_chosen_from(tmp_path: Path) -> None:
    write_lines(tmp_path / "data/validation.jsonl", ROWS)
    write_lines(tmp_path / "data/test.jsonl", ROWS)
    assert (
        error_of(tmp_path / "data")
        == f"{tmp_path}/data: has the splits validation, test.\nName one or more with `split`."
    )


def test_an_unknown_split_shows_those_there_are(tmp_path: Path) -> None:
    write_lines(tmp_path / "data/train.jsonl", ROWS)
    write_lines(tmp_path / "data/test.jsonl", ROWS)
    assert (
        error_of(tmp_path / "data", "train", "dev", "eval")
        == f"{tmp_path}/data: no split dev, eval.\nIt has: train, test."
    )


@pytest.mark.parametrize(("limit", "expected"), [(1, 1), (3, 3), (4, 4), (100, 4), (None, 4)])
def test_a_limit_keeps_the_first_rows(tmp_path: Path, limit: int | None, expected: int) -> None:
    rows = read_dataset(write_lines(tmp_path / "pairs.jsonl", ROWS), limit=limit)["train"]
    assert rows.to_list() == ROWS[:expected]


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    assert len(read_dataset(write_lines(path, ROWS))["train"]) == 4
    assert read_dataset(write_lines(path, ROWS[2:]))["train"].to_list() == ROWS[2:]


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs", "a/b/pairs"])
def test_a_missing_file_is_reported(tmp_path: Path, name: str) -> None:
    assert error_of(tmp_path / name) == f"{tmp_path}/{name}: no such file or folder."


@pytest.mark.parametrize("location", ["pairs.jsonl", "./pairs", "a/b/pairs", "~/no-such-folder/pairs"])
def test_a_relative_path_that_is_missing_is_not_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, location: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert error_of(location) == f"{location}: no such file or folder."


def test_a_hub_id_that_cannot_be_reached_is_reported() -> None:
    message = error_of("nobody/nothing-here")
    assert message.startswith("nobody/nothing-here: cannot be opened (")
    assert message.endswith("\nGive a local file or folder, or the id of a data set on the Hub.")


@pytest.mark.parametrize("suffix", WRITERS)
def test_an_empty_file_is_reported(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"pairs{suffix}"
    path.touch()
    assert error_of(path) == f"{path}: the file is empty."


def test_a_name_that_looks_like_a_pattern_is_read_as_a_name(tmp_path: Path) -> None:
    write_lines(tmp_path / "pairs5.jsonl", ROWS[:1])
    path = write_lines(tmp_path / "pairs[0-9].jsonl", ROWS)
    assert read_dataset(path)["train"].to_list() == ROWS
    folder = tmp_path / "new [1]"
    write_lines(folder / "pairs.jsonl", ROWS)
    assert error_of(folder).startswith(
        f"{folder}: a folder's name with *, ? or [ would be taken for a pattern."
    )


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "pairs.jsonl", ROWS)
    (tmp_path / "more.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    assert error_of(tmp_path).startswith(f"{tmp_path}: holds files of several kinds (.csv, .jsonl)")


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:1])}).save_to_disk(
        tmp_path / "two"
    )
    assert read_dataset(str(tmp_path / "one"))["train"].to_list() == ROWS
    assert read_dataset(str(tmp_path / "two"), ["test"])["test"].to_list() == ROWS[:1]


def test_words_that_pandas_takes_for_nothing_are_answers(tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("prompt,chosen,rejected\na,None,NA\n")
    assert read_dataset(str(tmp_path / "pairs.csv"))["train"].to_list() == [
        {"prompt": "a", "chosen": "None", "rejected": "NA"}
    ]


def test_columns_are_given_other_names(tmp_path: Path) -> None:
    rows = [{"q": "a", "prompt": "old", "chosen": "b", "rejected": "c"}]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    for streaming in (False, True):
        found = read_dataset(path, rename={"prompt": "q"}, streaming=streaming)["train"]
        assert list(found) == [{"prompt": "a", "chosen": "b", "rejected": "c"}]
        with pytest.raises(
            DataError, match=r"`map`: .* has no column absent.\nIt has: q, prompt, chosen, rejected"
        ):
            read_dataset(path, rename={"prompt": "absent"}, streaming=streaming)


def test_a_stream_may_be_cut(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", ROWS)
    assert list(read_dataset(path, limit=1, streaming=True)["train"]) == ROWS[:1]


def test_an_empty_folder_is_reported(tmp_path: Path) -> None:
    assert error_of(tmp_path).startswith(f"{tmp_path}: cannot be opened (")


@pytest.mark.parametrize(
    ("name", "content"),
    [("pairs.csv", "prompt,chosen,rejected\n"), ("pairs.jsonl", "\n"), ("pairs.json", "[]")],
)
def test_a_file_without_rows_is_reported(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert error_of(tmp_path / name) == f"{tmp_path}/{name}: split train has no rows."


HINT = "One JSON object a line, or a list of objects, is expected in JSON."


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"prompt": "a", "chosen": \n', ", line 2: not readable (not JSON (expecting value))"),
        ('[{"prompt": "a"', ", line 1: not readable (not JSON (expecting ',' delimiter))"),
        ('[\n{"prompt": "a"},\n', ", line 3: not readable (the file ends in the middle of its rows)"),
        ('[{"prompt": "a"}\n{"prompt": "b"}]', ", line 2: not readable (the list of rows is broken: a comma"),
        (
            '[\n{"prompt": "a"}]\n\nx',
            ", line 4: not readable (there is text after the end of the list of rows)",
        ),
        ('[{"prompt": "a"}]\nx', ": split train: not readable (line 1: it is a list, expected an object)"),
        ("prompt: a", ": split train: not readable (line 1: it is not JSON (expecting value))"),
    ],
    ids=["object", "list", "cut list", "comma", "rest", "two lines", "yaml"],
)
def test_json_without_a_row_or_an_end_is_reported(tmp_path: Path, content: str, problem: str) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(content)
    message = error_of(path)
    assert message.startswith(f"{path}{problem}")
    assert message.endswith(HINT)


def test_a_parquet_file_that_is_none_is_reported(tmp_path: Path) -> None:
    (tmp_path / "pairs.parquet").write_text("not Parquet")
    assert error_of(tmp_path / "pairs.parquet").startswith(f"{tmp_path}/pairs.parquet: ")


def test_text_that_is_not_utf_8_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_bytes('{"prompt": "é", "chosen": "b", "rejected": "c"}\n'.encode("latin-1"))
    with pytest.raises(DataError):
        first_row(read_dataset(str(path))["train"], "pairs.jsonl")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("pairs.txt", ".txt"), ("pairs", ""), ("pairs.parquet.gz", ".gz"), ("pairs.gz", ".gz")],
)
def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(
    tmp_path: Path, name: str, kind: str
) -> None:
    (tmp_path / name).write_text("text")
    problem = f"files of kind {kind} are not read" if kind else "its name has no ending"
    assert (
        error_of(tmp_path / name) == f"{tmp_path}/{name}: {problem}.\n"
        "Accepted: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow; text also with .gz, .bz2, .xz, .zst."
    )


@pytest.mark.parametrize(
    ("location", "name"),
    [
        ("org/ultra-feedback", "ultra-feedback"),
        ("data/pairs.jsonl", "pairs"),
        ("data/pairs.v1.2.parquet", "pairs.v1.2"),
        ("org/pairs.v1.2", "pairs.v1.2"),
        ("./data/", "data"),
        ("~no-such-user/pairs.jsonl", "pairs"),
        ("my pairs (new).csv", "my-pairs--new-"),
        (".hidden.json", "hidden"),
        ("déjà.jsonl", "d-j-"),
        ("日本-de.jsonl", "de"),
        ("2024-01.jsonl", "2024-01"),
        ("org/..", Path.cwd().name),
        ("x" * 200, "x" * 128),
    ],
)
def test_a_data_set_is_named_after_its_last_part(location: str, name: str) -> None:
    assert dataset_name(location) == name


@pytest.mark.parametrize(
    "location", ["日本.jsonl", "中国.jsonl", "org/данные", "日本1.csv", "🎉.json", "/", "--.csv"]
)
def test_a_data_set_without_letters_for_a_name_needs_one(location: str) -> None:
    with pytest.raises(OptionError) as caught:
        dataset_name(location)
    assert str(caught.value) == (
        f"{location}: its name has no letters that the name of a pair set can have (a-z, A-Z).\n"
        "Give the pair set a `name`."
    )


@given(st.text(max_size=20) | st.text("./-_aé ", max_size=140))
@settings(deadline=None)
def test_every_name_can_name_a_pair_set_or_is_refused(location: str) -> None:
    with suppress(OptionError):
        assert check_name(dataset_name(location))
