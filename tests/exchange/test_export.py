import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

import dpo_cache
from dpo_cache.errors import NotInCacheError, OptionError, StorageError
from dpo_cache.exchange import export_pairs, import_pairs
from dpo_cache.files import atomic
from tests.conftest import chat_rows, make_tokenizer, write_rows
from tests.exchange.conftest import TEXT_ROWS, pairs_of

OUTS = {"parquet": "out.parquet", "jsonl": "out.jsonl", "datasets": "out"}
COLUMNS = [
    "prompt", "chosen", "rejected", "row", "prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps",
]  # fmt: skip


def export(source: Path, name: str, out: Path, **options: Any):
    return export_pairs(source / "cache", name, out, log=lambda text: None, **options)


def read(out: Path) -> list[dict[str, Any]]:
    if out.is_dir():
        return datasets.load_from_disk(str(out)).to_list()
    return (
        pq.read_table(out).to_pylist()
        if out.suffix == ".parquet"
        else [json.loads(line) for line in out.read_text().splitlines()]
    )


@pytest.mark.parametrize("kind", OUTS)
@pytest.mark.parametrize("name", ["chat", "text", "cut", "right", "ranked"])
def test_every_format_holds_what_the_pair_set_holds(
    source: Path, tmp_path: Path, kind: str, name: str
) -> None:
    report = export(source, name, tmp_path / OUTS[kind], token_logps=True)
    pairs, rows = pairs_of(source / "cache", name), read(tmp_path / OUTS[kind])
    assert report.format == kind and report.has_text and report.num_pairs == len(pairs) == len(rows)
    for scored, row in zip(pairs, rows, strict=True):
        assert row["row"] == scored.pair.row
        assert row["prompt_ids"] == scored.pair.chosen.prompt_ids.tolist()
        assert row.get("rejected_prompt_ids", row["prompt_ids"]) == scored.pair.rejected.prompt_ids.tolist()
        assert row["chosen_ids"] == scored.pair.chosen.completion_ids.tolist()
        assert row["rejected_ids"] == scored.pair.rejected.completion_ids.tolist()
        assert (row["ref_chosen_logps"], row["ref_rejected_logps"]) == (
            scored.ref_chosen.logps,
            scored.ref_rejected.logps,
        )
        assert row["ref_chosen_token_logps"] == scored.ref_chosen.token_logps.tolist()
        assert row["ref_rejected_token_logps"] == scored.ref_rejected.token_logps.tolist()


def test_the_text_is_that_of_the_source(source: Path, tmp_path: Path) -> None:
    export(source, "text", tmp_path / "text.jsonl")
    found = [
        (row["row"], row["prompt"], row["chosen"], row["rejected"]) for row in read(tmp_path / "text.jsonl")
    ]
    assert found == [(number, *row.values()) for number, row in enumerate(TEXT_ROWS) if number != 3]
    export(source, "chat", tmp_path / "chat.parquet")
    rows = read(tmp_path / "chat.parquet")
    assert list(rows[0]) == COLUMNS
    assert [{name: row[name] for name in COLUMNS[:3]} for row in rows] == chat_rows()


def test_each_pair_of_a_ranked_row_has_its_own_answers(source: Path, tmp_path: Path) -> None:
    export(source, "ranked", tmp_path / "ranked.jsonl")
    found = [
        (row["row"], row["prompt"], row["chosen"], row["rejected"]) for row in read(tmp_path / "ranked.jsonl")
    ]
    assert found == [(0, "2+2?", " 4.", " Four?"), (0, "2+2?", " 4.", " 5."), (1, "3?", " 3", " x")]


def test_what_rows_hand_to_the_template_goes_with_them(model_folder: str, tmp_path: Path) -> None:
    template = tmp_path / "tools.jinja"
    template.write_text(
        "{{ tools }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{{ "
        "message['tool_calls'] }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    given = {"chat_template": str(template)}
    rows = chat_rows(3)
    rows[1]["tools"] = [{"type": "function", "function": {"name": "look"}}]
    calls = [{"type": "function", "function": {"name": "look", "arguments": {"at": "x"}}}]
    rows[1]["prompt"].append({"role": "assistant", "content": "I look.", "tool_calls": calls})
    rows[1]["prompt"].append({"role": "user", "content": "And?"})
    dpo_cache.precompute(
        model_folder, write_rows(tmp_path / "tools.jsonl", rows), tmp_path / "cache", **given
    )
    for out in (tmp_path / "out.jsonl", tmp_path / "out.parquet"):
        report = export_pairs(tmp_path / "cache", "tools", out, log=lambda text: None)
        assert report.columns[:4] == ["prompt", "chosen", "rejected", "tools"]
        found = read(out)
        assert found[0]["tools"] is None and json.loads(found[1]["tools"]) == rows[1]["tools"]
        assert found[1]["prompt"][1]["tool_calls"] == calls
        assert import_pairs(
            tmp_path / out.suffix,
            out,
            reference="x",
            model=model_folder,
            format="conversation",
            log=lambda text: None,
            **given,
        )
        assert (
            pairs_of(tmp_path / out.suffix, "out").manifest["pairs_digest"]
            == pairs_of(tmp_path / "cache", "tools").manifest["pairs_digest"]
        )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "chat.jsonl").unlink(), "chat.jsonl: no such file or folder"),
        (
            lambda folder: write_rows(folder / "chat.jsonl", chat_rows(seed=1)),
            "no longer makes the pairs of this set",
        ),
        (
            lambda folder: write_rows(
                folder / "chat.jsonl", [*chat_rows(11), {**chat_rows()[0], "chosen": []}]
            ),
            "1 row cannot be used",
        ),
        (
            lambda folder: write_rows(folder / "chat.jsonl", [{"a": 1}]),
            "needs the columns prompt, chosen, rejected",
        ),
        (lambda folder: _change_tokenizer(folder / "model"), "is not the one that made the token ids"),
        (lambda folder: shutil.rmtree(folder / "model"), "no tokenizer can be loaded"),
    ],
)
def test_text_that_is_not_at_hand_is_left_out_and_said(
    model_folder: str, tmp_path: Path, change: Any, reason: str
) -> None:
    shutil.copytree(model_folder, tmp_path / "model")
    dpo_cache.precompute(
        tmp_path / "model", write_rows(tmp_path / "chat.jsonl", chat_rows()), tmp_path / "cache"
    )
    change(tmp_path)
    remarks: list[str] = []
    report = export_pairs(tmp_path / "cache", "chat", tmp_path / "out.parquet", log=remarks.append)
    assert not report.has_text and report.columns == COLUMNS[3:] and report.num_pairs == 12
    assert remarks[0].startswith("left out: prompt, chosen and rejected as text: ") and reason in remarks[0]


def _change_tokenizer(folder: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["red"])
    tokenizer.save_pretrained(folder)


def test_a_source_that_moved_is_found_where_the_user_says(model_folder: str, tmp_path: Path) -> None:
    dpo_cache.precompute(model_folder, write_rows(tmp_path / "chat.jsonl", chat_rows()), tmp_path / "cache")
    (tmp_path / "chat.jsonl").rename(tmp_path / "moved.jsonl")
    report = export_pairs(
        tmp_path / "cache",
        "chat",
        tmp_path / "out",
        dataset=str(tmp_path / "moved.jsonl"),
        tokenizer=model_folder,
    )
    assert report.has_text


def test_renamed_columns_are_found_again(model_folder: str, tmp_path: Path) -> None:
    rows = [
        {"query": row["prompt"], **{name: row[name] for name in ("chosen", "rejected")}}
        for row in chat_rows()
    ]
    dpo_cache.precompute(
        model_folder,
        write_rows(tmp_path / "chat.jsonl", rows),
        tmp_path / "cache",
        map=("prompt=query",),
        limit=5,
    )
    assert export_pairs(tmp_path / "cache", "chat", tmp_path / "out.jsonl").has_text
    assert [row["prompt"] for row in read(tmp_path / "out.jsonl")] == [row["query"] for row in rows[:5]]


def test_what_is_left_out_is_said(source: Path, tmp_path: Path) -> None:
    assert export(source, "chat", tmp_path / "a.jsonl").left_out == [
        "the log-prob of each token (`token_logps` adds it)",
        "the reference, tokenizer and truncation of the values (they stay in the cache)",
        "the types of the columns (JSON has only numbers; no value is changed)",
    ]
    report = export(source, "chat", tmp_path / "a.parquet", token_logps=True, text=False)
    assert report.left_out == [
        "the reference, tokenizer and truncation of the values (they stay in the cache)"
    ]
    assert not report.has_text and report.columns[0] == "row"


@pytest.mark.parametrize("kind", OUTS)
def test_an_output_is_replaced_only_when_asked(source: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / OUTS[kind]
    export(source, "text", out)
    with pytest.raises(
        OptionError, match="is there already.\nChoose another output, or replace it with `overwrite`"
    ):
        export(source, "chat", out)
    assert len(read(out)) == 5
    export(source, "chat", out, overwrite=True)
    assert len(read(out)) == 12
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_folder_of_something_else_is_never_replaced(source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    for out, kind in ((tmp_path / "thesis", "datasets"), (tmp_path / "thesis", "parquet")):
        with pytest.raises(OptionError, match="it is not replaced"):
            export(source, "chat", out, format=kind, overwrite=True)
    assert (tmp_path / "thesis").is_dir()


@pytest.mark.parametrize("kind", OUTS)
def test_an_export_that_fails_leaves_nothing(
    source: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_rename", full)
    with pytest.raises(StorageError, match="No space left on device"):
        export(source, "chat", tmp_path / OUTS[kind])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "advice"), [(28, "Free some space."), (2, "Check the path"), (13, "Check the")]
)
def test_the_advice_fits_what_the_disk_refuses(
    source: Path, tmp_path: Path, number: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, "reason")

    monkeypatch.setattr(atomic, "_rename", refuse)
    with pytest.raises(StorageError) as caught:
        export(source, "chat", tmp_path / "out.jsonl")
    assert str(caught.value).startswith(f"cannot write {tmp_path / 'out.jsonl'}: reason.\n{advice}")


def test_wrong_options_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no format has this ending"):
        export(source, "chat", tmp_path / "out.csv")
    with pytest.raises(OptionError, match="leave out `text=False`"):
        export(source, "chat", tmp_path / "out.jsonl", text=False, dataset="x")
    with pytest.raises(NotInCacheError, match="no pair set 'nothing'"):
        export(source, "nothing", tmp_path / "out.jsonl")


def test_sums_without_lists_have_no_token_logps_to_export(
    source: Path, tmp_path: Path, model_folder: str
) -> None:
    export(source, "chat", tmp_path / "chat.jsonl")
    import_pairs(tmp_path / "cache", tmp_path / "chat.jsonl", reference="x", model=model_folder)
    with pytest.raises(NotInCacheError, match="was imported with sums only.\nLeave out `token_logps`"):
        export_pairs(tmp_path / "cache", "chat", tmp_path / "again.jsonl", token_logps=True)
    remarks: list[str] = []
    export_pairs(tmp_path / "cache", "chat", tmp_path / "again.jsonl", log=remarks.append)
    assert (
        remarks[0] == "left out: prompt, chosen and rejected as text: the pair set was imported as token ids."
    )
    assert not any("--token-logps" in text for text in remarks)


def test_pairs_are_written_as_they_are_read(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_cache.exchange import export as exporting

    monkeypatch.setattr(exporting, "BATCH_PAIRS", 5)
    export(source, "chat", tmp_path / "out.parquet")
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)] == [5, 5, 2]
    assert [row["row"] for row in read(tmp_path / "out.parquet")] == list(range(12))


def test_a_template_that_writes_the_day_writes_that_of_the_pair_set(
    model_folder: str, tmp_path: Path
) -> None:
    template, day = tmp_path / "dated.jinja", {"template_date": "2024-07-26"}
    template.write_text(
        "{{ strftime_now('%d %b %Y') }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
        "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    given = {"chat_template": str(template)}
    rows, cache, out = (
        write_rows(tmp_path / "dated.jsonl", chat_rows(2)),
        tmp_path / "cache",
        tmp_path / "out.jsonl",
    )
    dpo_cache.precompute(model_folder, rows, cache, audit="off", **given, **day)
    assert export_pairs(cache, "dated", out, log=lambda text: None).columns[:3] == [
        "prompt",
        "chosen",
        "rejected",
    ]
    remarks: list[str] = []
    wanted = {"reference": "x", "model": model_folder, "format": "conversation", "log": remarks.append}
    import_pairs(tmp_path / "same", out, **wanted, **given, **day)
    assert remarks[0].startswith(
        "the chat template writes the day: 2024-07-26. If the log-probs were made on"
    )
    again, other = tmp_path / "same", tmp_path / "other"
    import_pairs(again, out, **wanted, **given)  # with the day of the first import
    import_pairs(other, out, **wanted, **given)  # with today
    before = pairs_of(cache, "dated").manifest
    assert pairs_of(again, "out").manifest["pairs_digest"] == before["pairs_digest"]
    assert pairs_of(again, "out").manifest["tokenization"]["template_date"] == "2024-07-26"
    assert pairs_of(other, "out").manifest["pairs_digest"] != before["pairs_digest"]
