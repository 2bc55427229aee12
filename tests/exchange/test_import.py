import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import dpo_cache
from dpo_cache.errors import CacheError, CorruptShardError, DataError, ModelError, OptionError
from dpo_cache.exchange import export_pairs, import_pairs
from dpo_cache.store import completion_key
from dpo_cache.store.format.documents import seal_document
from dpo_cache.store.upkeep.contents import read_contents
from dpo_cache.store.upkeep.verify import verify_cache
from tests.conftest import chat_rows, make_llama, write_rows
from tests.exchange.conftest import content, pairs_of

IDS = {
    "prompt_ids": [1, 2],
    "chosen_ids": [3, 4],
    "rejected_ids": [5],
    "ref_chosen_logps": -2.5,
    "ref_rejected_logps": -1.0,
}


def bring_in(cache: Path, data: object, remarks: list[str] | None = None, **options: Any):
    return import_pairs(
        cache,
        str(data),
        log=([] if remarks is None else remarks).append,
        **{"reference": "elsewhere", **options},
    )


def id_rows(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**IDS, "prompt_ids": [1, 2, place], **change} for place, change in enumerate(changes)]


@pytest.mark.parametrize("kind", ["out.parquet", "out.jsonl", "out"])
@pytest.mark.parametrize("name", ["chat", "text", "cut", "right", "ranked"])
@pytest.mark.parametrize("token_logps", [True, False])
def test_what_is_exported_comes_back(
    source: Path, tmp_path: Path, kind: str, name: str, token_logps: bool
) -> None:
    export_pairs(source / "cache", name, tmp_path / kind, token_logps=token_logps, log=lambda text: None)
    report = bring_in(tmp_path / "cache", tmp_path / kind, name=name)
    before, after = pairs_of(source / "cache", name), pairs_of(tmp_path / "cache", name)
    assert content(after) == content(before, token_logps=token_logps)
    assert after.manifest["pairs_digest"] == before.manifest["pairs_digest"]
    assert (after.has_token_logps, after.is_imported, before.is_imported) == (token_logps, True, False)
    assert (report.format, report.pairs_kept, report.has_token_logps) == ("ids", len(before), token_logps)
    total = sum(scored.ref_chosen.logps + scored.ref_rejected.logps for scored in before)
    assert report.mean_logps == pytest.approx(total / (2 * len(before)))


@pytest.mark.parametrize(
    ("name", "options"),
    [("chat", {}), ("cut", {"max_length": 30}), ("right", {"max_length": 30, "truncation": "keep-end"})],
)
def test_text_is_tokenized_as_precompute_does(
    source: Path, tmp_path: Path, model_folder: str, name: str, options: dict[str, Any]
) -> None:
    export_pairs(source / "cache", name, tmp_path / "out.jsonl", log=lambda text: None)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    rows = [{key: value for key, value in row.items() if not key.endswith("_ids")} for row in rows]
    remarks: list[str] = []
    report = bring_in(
        tmp_path / "cache",
        write_rows(tmp_path / "text.jsonl", rows),
        remarks,
        name=name,
        tokenizer=model_folder,
        **options,
    )
    assert report.format == "conversation"
    before, after = pairs_of(source / "cache", name), pairs_of(tmp_path / "cache", name)
    assert [entry[1:] for entry in content(after)] == [
        entry[1:] for entry in content(before, token_logps=False)
    ]
    assert after.manifest["tokenization"] == before.manifest["tokenization"]
    assert any(
        "cut to `max_length` 30; their imported values are right only if" in text for text in remarks
    ) == bool(options)


def test_other_names_are_mapped(tmp_path: Path, model_folder: str) -> None:
    rows = [
        {**row, "reference_chosen_logps": -3.0 - place, "reference_rejected_logps": -4}
        for place, row in enumerate(chat_rows(3))
    ]
    data = write_rows(tmp_path / "old.jsonl", rows)
    with pytest.raises(
        DataError,
        match="has no column ref_chosen_logps or ref_rejected_logps, but reference_chosen_logps, "
        "reference_rejected_logps",
    ):
        bring_in(tmp_path / "cache", data, tokenizer=model_folder)
    names = ("ref_chosen_logps=reference_chosen_logps", "ref_rejected_logps=reference_rejected_logps")
    bring_in(tmp_path / "cache", data, tokenizer=model_folder, map=names)
    assert [(scored.ref_chosen.logps, scored.ref_rejected.logps) for scored in pairs_of(tmp_path / "cache", "old")] == [
        (-3.0, -4.0), (-4.0, -4.0), (-5.0, -4.0),
    ]  # fmt: skip


WRONG_VALUES = {
    "missing": ({"ref_chosen_logps": None}, "`ref_chosen_logps` is missing"),
    "a list": (
        {"ref_chosen_logps": [-1.0, -1.5]},
        "`ref_chosen_logps` is a list, expected a sum (values per token go into `ref_chosen_token_logps`)",
    ),
    "infinite": ({"ref_chosen_logps": -math.inf}, "`ref_chosen_logps` is NaN or infinite"),
    "NaN": ({"ref_rejected_logps": math.nan}, "`ref_rejected_logps` is NaN or infinite"),
    "below all bounds": (
        {"ref_chosen_logps": -1e308},
        "`ref_chosen_logps` is below -1,000,000 nats a token, which no model gives",
    ),
    "positive": ({"ref_chosen_logps": 2.5}, "`ref_chosen_logps` is above 0, but log-probs are at most 0"),
    "no ids": ({"chosen_ids": None}, "`chosen_ids` is not a list of token ids"),
    "negative id": ({"prompt_ids": [1, -2]}, "`prompt_ids` is not a list of token ids"),
    "huge id": ({"rejected_ids": [2**32]}, "`rejected_ids` is not a list of token ids"),
    "hole in ids": ({"chosen_ids": [1, None]}, "`chosen_ids` is not a list of token ids"),
}


@pytest.mark.parametrize("name", WRONG_VALUES)
def test_every_problem_names_its_row(tmp_path: Path, name: str) -> None:
    change, reason = WRONG_VALUES[name]
    data = tmp_path / "wrong.jsonl"
    rows = id_rows({}, change, {}, change)
    write_rows(data, rows)
    with pytest.raises(DataError) as raised:
        bring_in(tmp_path / "cache", data)
    assert str(raised.value) == (
        f"{data}: split train: 2 rows cannot be imported (format ids):\n"
        f"  {reason}: 2 rows, line 2, 4\nCorrect or remove them and run again; nothing was written."
    )
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("-1", "is text, expected a number"),
        (math.inf, "is NaN or infinite"),
        (-math.inf, "is NaN or infinite"),
        (math.nan, "is NaN or infinite"),
        (None, "is missing"),
    ],
    ids=repr,
)
def test_values_of_tokens_are_numbers(tmp_path: Path, ending: str, value: object, reason: str) -> None:
    logps = {"ref_chosen_token_logps": [-2.0, -0.5], "ref_rejected_token_logps": [-1.0]}
    if ending == "parquet" and isinstance(value, str):  # whose columns have one type
        wrong = {**logps, "ref_chosen_token_logps": [value, value]}
        rows = id_rows(wrong, wrong)
        lines = "0, 1"
    else:
        rows = id_rows(logps, {**logps, "ref_chosen_token_logps": [value, -1.0]})
        lines = "line 2" if ending == "jsonl" else "1"
    path = tmp_path / f"x.{ending}"
    write_rows(path, rows) if ending == "jsonl" else pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=rf"`ref_chosen_token_logps` {reason}: \d rows?, .*{lines}\n"):
        bring_in(tmp_path / "cache", path)


def test_values_that_are_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`ref_rejected_logps` is text, expected a number: 2 rows, line 1, 2"):
        bring_in(
            tmp_path / "cache",
            write_rows(tmp_path / "x.jsonl", id_rows(*[{"ref_rejected_logps": "minus one"}] * 2)),
        )


def test_ids_of_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`chosen_ids` is not a list of token ids: 1 row, line 1"):
        bring_in(tmp_path / "cache", write_rows(tmp_path / "x.jsonl", id_rows({"chosen_ids": [0.5]})))
    with pytest.raises(DataError, match="`prompt_ids` is not a list of token ids: 1 row, line 1"):
        bring_in(tmp_path / "cache", write_rows(tmp_path / "y.jsonl", id_rows({"prompt_ids": "1 2"})))


TOKENS = {"ref_chosen_token_logps": [-1.0, -1.5], "ref_rejected_token_logps": [-1.0]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"ref_chosen_token_logps": [-2.5]},
            "`ref_chosen_token_logps` does not have one value for each token of the answer",
        ),
        ({"ref_chosen_token_logps": None}, "`ref_chosen_token_logps` is missing, expected a list of numbers"),
        (
            {"ref_rejected_token_logps": [0.5]},
            "`ref_rejected_token_logps` is above 0, but log-probs are at most 0",
        ),
        ({"ref_chosen_logps": -3.0}, "`ref_chosen_logps` is not the sum of `ref_chosen_token_logps`"),
    ],
)
def test_values_per_token_fit_the_tokens_and_the_sum(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    data = tmp_path / "tokens.jsonl"
    report = bring_in(tmp_path / "good", write_rows(data, id_rows(TOKENS, TOKENS)))
    assert report.has_token_logps and [
        scored.ref_chosen.logps for scored in pairs_of(tmp_path / "good", "tokens")
    ] == [-2.5, -2.5]
    with pytest.raises(DataError, match="1 row, line 2") as raised:
        bring_in(tmp_path / "cache", write_rows(data, id_rows(TOKENS, {**TOKENS, **change})))
    assert reason in str(raised.value)


def test_values_per_token_need_no_sums(tmp_path: Path) -> None:
    rows = [
        {name: value for name, value in row.items() if name not in ("ref_chosen_logps", "ref_rejected_logps")}
        for row in id_rows(TOKENS)
    ]
    bring_in(tmp_path / "cache", write_rows(tmp_path / "tokens.jsonl", rows))
    assert next(iter(pairs_of(tmp_path / "cache", "tokens"))).ref_chosen.logps == -2.5


def test_a_sum_of_one_answer_and_a_list_of_the_other_are_refused(tmp_path: Path) -> None:
    row = {**IDS, **TOKENS}
    del row["ref_chosen_logps"], row["ref_rejected_token_logps"]
    with pytest.raises(
        DataError, match="has no column ref_chosen_logps, but ref_rejected_logps, ref_chosen_token_logps"
    ):
        bring_in(tmp_path / "cache", write_rows(tmp_path / "mixed.jsonl", [row]))


def test_likely_mistakes_are_reported_with_figures(tmp_path: Path) -> None:
    long = {
        "chosen_ids": list(range(100)),
        "rejected_ids": list(range(50)),
        "ref_chosen_logps": -1.5,
        "ref_rejected_logps": -2.0,
    }
    remarks: list[str] = []
    bring_in(
        tmp_path / "cache",
        write_rows(tmp_path / "means.jsonl", id_rows(long, long, long)),
        remarks,
        model=None,
    )
    assert remarks[0] == (
        "these look like averages per token, not sums: of the 6 answers of 20 tokens or more the median "
        "log-prob is -1.75 nats at a median "
        "length of 75 tokens, which would be -0.028 a token.\n"
        "If so, multiply each by its answer's number of tokens and import again."
    )
    sums = {**long, "ref_chosen_logps": -150, "ref_rejected_logps": -100.0}
    remarks.clear()
    bring_in(tmp_path / "sums", write_rows(tmp_path / "sums.jsonl", id_rows(sums, sums)), remarks)
    assert remarks == [
        "no `model`: training cannot start from the reference by default, and needs `model` itself."
    ]


def test_one_answer_with_two_values_is_reported(tmp_path: Path) -> None:
    rows = id_rows({}, {}, {"ref_chosen_logps": -7.0}, {"ref_chosen_logps": -2.6})
    remarks: list[str] = []
    bring_in(
        tmp_path / "cache",
        write_rows(tmp_path / "twice.jsonl", [{**row, "prompt_ids": [1, 2]} for row in rows]),
        remarks,
    )
    assert len([text for text in remarks if "repeated answers have values that differ" in text]) == 1
    remark = next(text for text in remarks if "repeated answers" in text)
    assert "-7.0000" in remark and "rows" in remark


def test_rows_that_make_no_pair_are_dropped_and_counted(tmp_path: Path) -> None:
    same = {"chosen_ids": [9], "rejected_ids": [9], "ref_chosen_logps": None}
    report = bring_in(tmp_path / "cache", write_rows(tmp_path / "some.jsonl", id_rows({}, same, {})))
    assert report.dropped == {"chosen equals rejected": 1} and report.pairs_kept == 2
    with pytest.raises(DataError, match=r"makes a pair: chosen equals rejected \(1; row 0\)"):
        bring_in(
            tmp_path / "other",
            write_rows(tmp_path / "none.jsonl", id_rows({"chosen_ids": [5], "ref_chosen_logps": -1.0})),
        )


def test_ids_are_cut_only_when_asked(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "long.jsonl", id_rows({"chosen_ids": list(range(2000))}))
    report = bring_in(tmp_path / "whole", data)
    assert (
        report.rows_truncated == 0
        and pairs_of(tmp_path / "whole", "long").manifest["tokenization"]["max_length"] == 2003
    )
    remarks: list[str] = []
    assert bring_in(tmp_path / "cut", data, remarks, max_length=10).rows_truncated == 1
    assert next(iter(pairs_of(tmp_path / "cut", "long"))).pair.chosen.num_tokens == 7
    assert remarks[0].endswith(
        "1 row (0) is cut to `max_length` 10; their imported values are right only if they were computed "
        "on the same cut."
    )


def test_the_reference_is_named_by_its_values(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", id_rows({}, {}))
    first = bring_in(tmp_path / "cache", data, dtype="bfloat16")
    # golden: an imported reference keeps its id
    assert first.reference == "b66f96f4b06c6e3e4bdc34dc1a2da653aef7f0fcf1b4a6ae4ccc36470043b955"
    again = bring_in(tmp_path / "cache", data, dtype="bfloat16")
    assert again.reference == first.reference and again.bytes_written == 0
    cache = dpo_cache.open_cache(tmp_path / "cache")
    document = cache.read_reference(first.reference)
    assert document["identity"]["imported"] == "elsewhere" and document["identity"]["dtype"] == "bfloat16"
    assert document["provenance"]["imported_from"] == data and document["provenance"]["model"] is None
    others = [
        bring_in(tmp_path / "cache", data, overwrite=True),  # another dtype
        bring_in(tmp_path / "cache", data, dtype="bfloat16", reference="another", overwrite=True),
        bring_in(
            tmp_path / "cache",
            write_rows(tmp_path / "b.jsonl", id_rows({}, {"ref_chosen_logps": -2.6})),
            dtype="bfloat16",
        ),
    ]
    assert len({first.reference, *(report.reference for report in others)}) == 4
    assert not len(cache.scores(first.reference))


def test_replacing_is_reported(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", id_rows({}, {}))
    bring_in(tmp_path / "cache", data)
    remarks: list[str] = []
    bring_in(tmp_path / "cache", write_rows(tmp_path / "a.jsonl", id_rows({})), remarks)
    assert any(
        text.startswith("pair set a/train is replaced: it held 2 pairs of reference ") for text in remarks
    )


def test_another_pair_set_of_that_name_is_replaced_only_with_overwrite(tmp_path: Path) -> None:
    mine = write_rows(tmp_path / "mine.jsonl", id_rows({}, {}))
    other = write_rows(tmp_path / "other.jsonl", id_rows({}, {"ref_chosen_logps": -2.6}, {}))
    bring_in(tmp_path / "cache", mine, name="demo", dtype="float32")
    before = pairs_of(tmp_path / "cache", "demo").manifest
    for path, options, lines in (
        (other, {"dtype": "float32"}, f"  source: {mine} and {other}\n"),
        (mine, {"dtype": "float32", "reference": "another"}, "  imported: elsewhere and another\n"),
        (mine, {"dtype": "bfloat16"}, "  dtype: float32 and bfloat16\n"),
        (other, {}, f"  source: {mine} and {other}\n  dtype: float32 and none\n"),
    ):
        with pytest.raises(CacheError) as caught:
            bring_in(tmp_path / "cache", path, name="demo", **options)
        assert str(caught.value) == (
            f"{tmp_path}/cache: there is another pair set demo/train, of 2 pairs; it and the new one differ in\n"
            f"{lines}Give the new one another `name`, or replace the other one with `overwrite`."
        )
        assert pairs_of(tmp_path / "cache", "demo").manifest == before
        assert len(dpo_cache.open_cache(tmp_path / "cache").references()) == 1
    report = bring_in(tmp_path / "cache", other, name="demo", overwrite=True)
    assert len(pairs_of(tmp_path / "cache", "demo")) == 3
    assert any("pair set demo/train is replaced: it held 2 pairs" in remark for remark in report.remarks)


def test_corrected_and_added_values_per_token_are_imported(tmp_path: Path) -> None:
    """The sums stay the same: other values per token are another reference all the same."""
    data = tmp_path / "tokens.jsonl"
    swapped = {**TOKENS, "ref_chosen_token_logps": [-1.5, -1.0]}
    references = []
    for rows in (id_rows({}, {}), id_rows(TOKENS, TOKENS), id_rows(TOKENS, swapped), id_rows(TOKENS, TOKENS)):
        report = bring_in(tmp_path / "cache", write_rows(data, rows))
        references.append(report.reference)
        stored = [scored.ref_chosen.token_logps.tolist() for scored in pairs_of(tmp_path / "cache", "tokens")]
        assert stored == [row.get("ref_chosen_token_logps", []) for row in rows]
        assert pairs_of(tmp_path / "cache", "tokens").has_token_logps == ("ref_chosen_token_logps" in rows[0])
        assert report.bytes_written > 0
        assert verify_cache(tmp_path / "cache").is_whole
    assert len(set(references)) == 3 and references[1] == references[3]
    assert bring_in(tmp_path / "cache", data).bytes_written == 0


def test_the_smallest_change_of_a_value_per_token_is_another_reference(tmp_path: Path) -> None:
    data = tmp_path / "tokens.jsonl"
    first = bring_in(tmp_path / "cache", write_rows(data, id_rows(TOKENS)))
    # golden: an imported reference with values per token keeps its id
    assert first.reference == "814fd2264257b513048c0f449a30f89f73587fa64b188d829da8cfee08a4d701"
    (scored,) = pairs_of(tmp_path / "cache", "tokens")  # the digest as docs/format.md describes it
    keys = completion_key(scored.pair.chosen) + completion_key(scored.pair.rejected)
    content = b"dpo-cache imported values/2" + struct.pack("<q", 0) + keys
    content += struct.pack("<dd", -2.5, -1.0) + struct.pack("<fff", -1.0, -1.5, -1.0)
    identity = dpo_cache.open_cache(tmp_path / "cache").read_reference(first.reference)["identity"]
    assert identity["values"] == hashlib.sha256(content).hexdigest()
    near = {**TOKENS, "ref_rejected_token_logps": [float(np.nextafter(np.float32(-1), np.float32(0)))]}
    assert bring_in(tmp_path / "cache", write_rows(data, id_rows(near))).reference != first.reference


def test_other_settings_of_the_same_pairs_are_written(tmp_path: Path, model_folder: str) -> None:
    data = write_rows(tmp_path / "a.jsonl", id_rows(TOKENS, TOKENS))
    first = bring_in(tmp_path / "cache", data, name="demo")
    place = tmp_path / "cache/pairs/demo/train"
    parts = {path.name for path in place.glob("*.parquet")}
    moved = write_rows(tmp_path / "moved.jsonl", id_rows(TOKENS, TOKENS))
    remarks: list[str] = []
    report = bring_in(
        tmp_path / "cache",
        moved,
        remarks,
        name="demo",
        max_length=50,
        truncation="drop",
        tokenizer=model_folder,
    )
    assert report.reference == first.reference and {path.name for path in place.glob("*.parquet")} == parts
    manifest = pairs_of(tmp_path / "cache", "demo").manifest
    tokenization = manifest["tokenization"]
    assert (tokenization["max_length"], tokenization["truncation"]) == (50, "drop")
    assert (tokenization["tokenizer"], manifest["source"]["dataset"]) == (model_folder, moved)
    assert any(
        remark.startswith("pair set demo/train has the same pairs, with other settings now: ")
        and "tokenization.max_length: 5 and 50" in remark
        for remark in remarks
    )
    assert report.bytes_written > 0 and verify_cache(tmp_path / "cache").is_whole


def test_a_model_that_is_named_later_is_where_training_starts(tmp_path: Path, model_folder: str) -> None:
    data = write_rows(tmp_path / "a.jsonl", id_rows({}))
    cache = dpo_cache.open_cache(tmp_path / "cache", create=True)
    remarks: list[str] = []
    reference = bring_in(tmp_path / "cache", data).reference
    assert bring_in(tmp_path / "cache", data, remarks, model=model_folder).reference == reference
    assert cache.read_reference(reference)["provenance"]["model"] == model_folder
    assert any(
        remark
        == f"reference {reference[:12]} has another origin now: model: none and {_short(model_folder)}; "
        f"tokenizer: none and {_short(model_folder)}."
        for remark in remarks
    )
    bring_in(tmp_path / "cache", data)  # one that is not named is not forgotten
    assert cache.read_reference(reference)["provenance"]["model"] == model_folder


def _short(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:39]}…"


def test_a_name_without_letters_is_needed(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "日本.jsonl", id_rows({}))
    with pytest.raises(OptionError, match="Give the pair set a `name`"):
        bring_in(tmp_path / "cache", data)
    assert bring_in(tmp_path / "cache", data, name="japan").pair_sets == ["japan/train"]


def test_splits_share_one_reference(tmp_path: Path) -> None:
    folder = tmp_path / "both"
    folder.mkdir()
    write_rows(folder / "train.jsonl", id_rows({}, {}))
    write_rows(folder / "test.jsonl", id_rows({"ref_chosen_logps": -9.0}))
    report = bring_in(tmp_path / "cache", folder, split=("train", "test"))
    assert report.pair_sets == ["both/train", "both/test"]
    references = {pairs_of(tmp_path / "cache", name).reference_id for name in report.pair_sets}
    assert references == {report.reference} and report.pairs_kept == 3


def test_wrong_options_are_refused(tmp_path: Path, model_folder: str, data_file: str) -> None:
    data = write_rows(tmp_path / "ids.jsonl", id_rows({}))
    text = write_rows(
        tmp_path / "text.jsonl",
        [{**row, "ref_chosen_logps": -1.0, "ref_rejected_logps": -1.0} for row in chat_rows(2)],
    )
    ranked = write_rows(
        tmp_path / "ranked.jsonl",
        [
            {
                "prompt": "x",
                "responses": ["a", "b"],
                "scores": [1, 2],
                "ref_chosen_logps": -1.0,
                "ref_rejected_logps": -1.0,
            }
        ],
    )
    several = write_rows(
        tmp_path / "several.jsonl",
        [
            {
                "prompt": "x",
                "chosen": "a",
                "rejected": rejected,
                "ref_chosen_logps": -1.0,
                "ref_rejected_logps": -1.0,
            }
            for rejected in (["b"], ["b", "c"])
        ],
    )
    for error, match, path, options in (
        (OptionError, "`tokenizer` \\(or `model`\\) is needed", text, {}),
        (
            DataError,
            "`format` ids needs the columns prompt_ids",
            text,
            {"format": "ids", "tokenizer": model_folder},
        ),
        (DataError, "ranked answers cannot be imported", ranked, {"tokenizer": model_folder}),
        (DataError, "row 1 has more than two answers", several, {"tokenizer": model_folder}),
        (
            DataError,
            "`format` text needs the columns prompt, chosen",
            data,
            {"format": "text", "tokenizer": model_folder},
        ),
        (OptionError, "`max_prompt_length` is used only by", data, {"max_prompt_length": 3}),
        (OptionError, "`reference` is needed", data, {"reference": ""}),
        (
            DataError,
            "has no column ref_chosen_logps or ref_rejected_logps, but prompt",
            data_file,
            {"tokenizer": model_folder},
        ),
    ):
        with pytest.raises(error, match=match):
            bring_in(tmp_path / "cache", path, **options)
    assert not (tmp_path / "cache").exists()


def test_ids_beyond_the_models_vocabulary_are_refused(tmp_path: Path, model_folder: str) -> None:
    data = write_rows(tmp_path / "ids.jsonl", id_rows({}, {"chosen_ids": [3, 264]}))
    with pytest.raises(DataError, match="token id 264 is beyond the 264 of the model: 1 row, line 2"):
        bring_in(tmp_path / "cache", data, model=model_folder)


# -- reading -------------------------------------------------------------------------------------------


def test_empty_lists_are_damage_unless_the_manifest_says_so(source: Path, tmp_path: Path) -> None:
    export_pairs(source / "cache", "chat", tmp_path / "chat.jsonl", log=lambda text: None)
    bring_in(tmp_path / "cache", tmp_path / "chat.jsonl")
    place = tmp_path / "cache/pairs/chat/train"
    manifest = pairs_of(tmp_path / "cache", "chat").manifest
    (place / "manifest.json").write_bytes(seal_document({**manifest, "token_logps": True}))
    with pytest.raises(CorruptShardError, match="its columns disagree with each other"):
        list(pairs_of(tmp_path / "cache", "chat"))


def test_lists_are_damage_where_the_manifest_promises_none(source: Path, tmp_path: Path) -> None:
    export_pairs(source / "cache", "chat", tmp_path / "chat.jsonl", token_logps=True, log=lambda text: None)
    bring_in(tmp_path / "cache", tmp_path / "chat.jsonl")
    place = tmp_path / "cache/pairs/chat/train"
    manifest = pairs_of(tmp_path / "cache", "chat").manifest
    (place / "manifest.json").write_bytes(seal_document({**manifest, "token_logps": False}))
    with pytest.raises(CorruptShardError, match="its columns disagree with each other"):
        list(pairs_of(tmp_path / "cache", "chat"))


def test_an_imported_cache_is_verified_and_listed(source: Path, tmp_path: Path) -> None:
    for name, token_logps in (("chat", False), ("text", True)):
        export_pairs(
            source / "cache", name, tmp_path / f"{name}.jsonl", token_logps=token_logps, log=lambda text: None
        )
        bring_in(tmp_path / "cache", tmp_path / f"{name}.jsonl", reference=f"peer-{name}")
    report = verify_cache(tmp_path / "cache")
    assert not report.problems and report.pairs == 17
    assert {entry.model for entry in read_contents(tmp_path / "cache").references} == {
        "peer-chat",
        "peer-text",
    }


# -- training ------------------------------------------------------------------------------------------


@pytest.fixture
def imported(source: Path, tmp_path: Path, model_folder: str) -> Path:
    export_pairs(source / "cache", "chat", tmp_path / "chat.jsonl", log=lambda text: None)
    bring_in(
        tmp_path / "cache", tmp_path / "chat.jsonl", reference="peer", model=model_folder, dtype="float32"
    )
    return tmp_path / "cache"


def trained(cache: Path, output: Path, **options: Any) -> tuple[dpo_cache.TrainReport, list[str]]:
    """Train one step; return the report and the remarks, without those on how little one step learns."""
    remarks: list[str] = []
    report = dpo_cache.train(
        cache, output, max_steps=1, batch_size=12, lr=1e-3, warmup_ratio=0.0, log=remarks.append, **options
    )
    return report, [
        text
        for text in remarks
        if " a policy learns little in fewer" not in text and "hardly moved" not in text
    ]


def test_training_on_imported_values_is_training_on_our_own(
    source: Path, imported: Path, tmp_path: Path, model_folder: str
) -> None:
    one, remarks = trained(imported, tmp_path / "one")
    other, _ = trained(source / "cache", tmp_path / "other", pairs="chat")
    differ = {"pairs_per_s", "peak_bytes"}
    assert {key: value for key, value in one.last.items() if key not in differ} == {
        key: value for key, value in other.last.items() if key not in differ
    }
    assert remarks == [
        f"the policy starts from {model_folder}, which the cache names; `model` chooses another.",
        f"step zero: largest gap {one.step_zero_gap:.2g} nats over 48 completions; "
        "within rounding: the policy starts as the model of the imported reference 'peer'.",
    ]


def test_a_policy_that_is_not_the_imported_reference_is_reported(
    imported: Path, tmp_path: Path, model_folder: str
) -> None:
    other = tmp_path / "other-model"
    make_llama(seed=7).save_pretrained(other)
    report, remarks = trained(imported, tmp_path / "run", model=str(other))
    assert report.finished and report.step_zero_gap > 1
    assert (
        "beyond rounding; the values of the imported reference 'peer' are not those of the policy.\n"
        "Likely cause: weights, template or truncation" in remarks[0]
    )


def test_without_a_checkpoint_training_asks_for_one(source: Path, tmp_path: Path, model_folder: str) -> None:
    export_pairs(source / "cache", "chat", tmp_path / "chat.jsonl", log=lambda text: None)
    bring_in(tmp_path / "cache", tmp_path / "chat.jsonl", reference="peer")
    with pytest.raises(
        ModelError,
        match="the reference 'peer' was imported without a checkpoint.\n"
        "Name the model that the policy starts from with `model`",
    ):
        trained(tmp_path / "cache", tmp_path / "run")
    report, remarks = trained(tmp_path / "cache", tmp_path / "run", model=model_folder)
    assert report.finished and "within rounding" in remarks[0]
