import errno
import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

import dpo_cache
from dpo_cache import data
from dpo_cache.data import Survey
from dpo_cache.errors import CacheError, CorruptShardError, DataError, ModelError, OptionError, StorageError
from dpo_cache.lm import runner
from dpo_cache.lm.progress import ScoringProgress
from dpo_cache.store import Cache, completion_key, open_cache
from dpo_cache.store.folders.disk import Disk
from tests.conftest import chat_rows, make_llama, make_tokenizer, naive_token_logps, write_rows


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def scored(cache: str, pair_set: str = "pairs") -> list[tuple]:
    """Everything a pair set holds, comparable."""
    return [
        (
            entry.pair.row,
            entry.pair.chosen.sequence_ids.tolist(),
            entry.pair.rejected.sequence_ids.tolist(),
            entry.ref_chosen.token_logps.tolist(),
            entry.ref_rejected.token_logps.tolist(),
        )
        for entry in dpo_cache.open_cache(cache).pairs(pair_set)
    ]


def two_data_files(folder: Path, num_rows: int) -> tuple[str, str]:
    """Files a.jsonl and b.jsonl with other rows each."""
    first, second = (
        write_rows(folder / f"{name}.jsonl", chat_rows(num_rows, seed)) for seed, name in enumerate("ab")
    )
    return first, second


def refuse_models(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(runner, "load_model", refuse)


def test_every_stored_value_is_the_models_own_log_prob(model_folder: str, data_file: str, cache: str) -> None:
    report = dpo_cache.precompute(model_folder, data_file, cache)
    model = make_llama()
    pairs = list(dpo_cache.open_cache(cache).pairs("pairs"))
    assert len(pairs) == report.pairs_kept == report.rows_read == 12
    for entry in pairs:
        for completion, score in (
            (entry.pair.chosen, entry.ref_chosen),
            (entry.pair.rejected, entry.ref_rejected),
        ):
            expected = naive_token_logps(model, completion)
            assert np.abs(score.token_logps - expected.numpy()).max() < 3e-5
            assert abs(score.logps - float(expected.sum())) < 1e-6 * abs(float(expected.sum())) + 1e-4


def test_rows_and_forest_store_the_same(model_folder: str, data_file: str, tmp_path: Path) -> None:
    for attention in ("forest", "rows"):
        assert (
            dpo_cache.precompute(
                model_folder, data_file, str(tmp_path / attention), attention=attention
            ).attention
            == attention
        )
    for one, other in zip(scored(str(tmp_path / "forest")), scored(str(tmp_path / "rows")), strict=True):
        assert one[:3] == other[:3]
        assert np.allclose(one[3], other[3], atol=3e-5) and np.allclose(one[4], other[4], atol=3e-5)


def test_a_second_run_loads_no_model_and_writes_nothing(
    model_folder: str, data_file: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = dpo_cache.precompute(model_folder, data_file, cache)
    refuse_models(monkeypatch)
    files = {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*")}
    second = dpo_cache.precompute(model_folder, data_file, cache)
    assert (second.scored_now, second.already_cached, second.attention, second.bytes_written) == (
        0,
        first.distinct_completions,
        None,
        0,
    )
    assert {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*")} == files


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dry_run_surveys_and_leaves_no_trace(
    model_folder: str, data_file: str, cache: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dpo_cache.precompute(model_folder, data_file, cache + "-real")
    refuse_models(monkeypatch)
    surveys: list[Survey] = []
    report = dpo_cache.precompute(
        model_folder, data_file, cache, dry_run=True, streaming=streaming, on_survey=surveys.append
    )
    assert not Path(cache).exists()
    assert [survey.pairs_kept for survey in surveys] == [real.pairs_kept]
    assert (report.pair_sets, report.reference, report.distinct_completions) == (
        real.pair_sets,
        real.reference,
        real.distinct_completions,
    )
    assert (report.already_cached, report.scored_now, report.missing_tokens) == (0, 0, real.model_tokens)


def test_other_order_pairing_split_and_name_score_nothing_again(
    model_folder: str, tmp_path: Path, cache: str
) -> None:
    rows = chat_rows()
    dpo_cache.precompute(model_folder, write_rows(tmp_path / "pairs.jsonl", rows), cache)
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in reversed(rows)][3:]
    report = dpo_cache.precompute(
        model_folder, write_rows(tmp_path / "other.jsonl", swapped), cache, name="again"
    )
    assert report.scored_now == 0 and report.attention is None and report.pairs_kept == len(swapped)
    new = [*rows, {**rows[0], "chosen": [{"role": "assistant", "content": "new"}]}]
    assert dpo_cache.precompute(model_folder, write_rows(tmp_path / "more.jsonl", new), cache).scored_now == 1


def test_completions_that_occur_twice_are_scored_once(model_folder: str, data_file: str, cache: str) -> None:
    report = dpo_cache.precompute(model_folder, data_file, cache)
    assert report.completions == 24
    assert report.scored_now == report.distinct_completions == 20
    assert report.model_tokens < report.data_tokens


def test_another_dtype_or_other_weights_are_another_reference(
    model_folder: str, data_file: str, cache: str, tmp_path: Path
) -> None:
    other = tmp_path / "other-model"
    make_llama(seed=1).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    reports = [
        dpo_cache.precompute(model_folder, data_file, cache, name="one"),
        dpo_cache.precompute(str(other), data_file, cache, name="two"),
        dpo_cache.precompute(model_folder, data_file, cache, name="three", dtype="bfloat16", limit=2),
    ]
    assert len({report.reference for report in reports}) == 3
    assert all(report.scored_now > 0 for report in reports)


def test_the_same_weights_under_another_name_and_sharding_are_one_reference(
    model_folder: str, data_file: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dpo_cache.precompute(model_folder, data_file, cache)
    refuse_models(monkeypatch)
    renamed = tmp_path / "renamed"
    make_llama().save_pretrained(renamed, max_shard_size="20KB")
    make_tokenizer().save_pretrained(renamed)
    assert len(list(renamed.glob("*.safetensors"))) > 1
    assert dpo_cache.precompute(str(renamed), data_file, cache, name="renamed").scored_now == 0


def test_a_pair_set_of_another_make_is_replaced_and_that_is_reported(
    model_folder: str, data_file: str, cache: str
) -> None:
    remarks: list[str] = []
    dpo_cache.precompute(model_folder, data_file, cache)
    dpo_cache.precompute(model_folder, data_file, cache, limit=5, log=remarks.append)
    assert len(dpo_cache.open_cache(cache).pairs("pairs")) == 5
    (remark,) = (remark for remark in remarks if "is replaced" in remark)
    assert remark.startswith("pair set pairs/train is replaced: it held 12 pairs of reference ")
    assert remark.endswith("; before and now differ in source.rows_read: 12 and 5.")


def test_the_settings_that_made_another_pair_set_are_named_in_the_remark(
    model_folder: str, tmp_path: Path, cache: str
) -> None:
    data_file = write_rows(tmp_path / "pairs.jsonl", chat_rows(3))

    def remark_on(**options: Any) -> str:
        remarks: list[str] = []
        dpo_cache.precompute(model_folder, data_file, cache, log=remarks.append, **options)
        (remark,) = (remark for remark in remarks if "is replaced" in remark)
        return remark.partition("; ")[2]

    dpo_cache.precompute(model_folder, data_file, cache)
    swapped = ("chosen=rejected", "rejected=chosen")
    assert remark_on(map=swapped) == (
        "before and now differ in source.map: [] and ['chosen=rejected', 'rejected=chosen']."
    )
    assert (
        remark_on(map=swapped, max_length=40)
        == "before and now differ in tokenization.max_length: 1024 and 40."
    )
    write_rows(tmp_path / "pairs.jsonl", chat_rows(3, seed=5))
    assert remark_on(map=swapped, max_length=40) == "its source has other rows now."


@pytest.mark.parametrize("streaming", [False, True])
def test_another_pair_set_of_that_name_is_refused_before_the_model_is_loaded(
    model_folder: str, tmp_path: Path, cache: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = two_data_files(tmp_path, num_rows=6)
    dpo_cache.precompute(model_folder, mine, cache, name="demo")
    before = dpo_cache.open_cache(cache).pairs("demo").manifest
    with monkeypatch.context() as patch:
        refuse_models(patch)
        for dataset, options, lines in (
            (other, {}, f"  source: {mine} and {other}\n"),
            (mine, {"dtype": "bfloat16"}, "  dtype: float32 and bfloat16\n"),
            (
                other,
                {"dtype": "bfloat16", "dry_run": True},
                f"  source: {mine} and {other}\n  dtype: float32 and bfloat16\n",
            ),
        ):
            with pytest.raises(CacheError) as caught:
                dpo_cache.precompute(
                    model_folder, dataset, cache, name="demo", streaming=streaming, **options
                )
            assert str(caught.value) == (
                f"{cache}: there is another pair set demo/train, of 6 pairs; it and the new one differ in\n"
                f"{lines}Give the new one another `name`, or replace the other one with `overwrite`."
            )
    opened = dpo_cache.open_cache(cache)
    assert opened.pairs("demo").manifest == before and opened.pair_sets() == ["demo/train"]
    report = dpo_cache.precompute(
        model_folder, other, cache, name="demo", streaming=streaming, overwrite=True
    )
    assert any("pair set demo/train is replaced: it held 6 pairs" in remark for remark in report.remarks)
    assert opened.pairs("demo").manifest["source"]["dataset"] == other


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_damaged_manifest_is_found_before_the_model_is_loaded(
    model_folder: str, data_file: str, cache: str, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_models(monkeypatch)
    manifest = Path(cache, "pairs/pairs/train/manifest.json")
    Cache(cache, create=True).publish_format()
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    with pytest.raises(CorruptShardError, match="manifest.json: its content does not match its own digest"):
        dpo_cache.precompute(model_folder, data_file, cache, overwrite=overwrite)


@pytest.mark.parametrize("streaming", [False, True])
def test_the_same_source_with_other_rows_or_settings_needs_no_overwrite(
    model_folder: str, tmp_path: Path, cache: str, streaming: bool
) -> None:
    path = tmp_path / "pairs.jsonl"
    for rows, options in (
        (chat_rows(4), {}),
        (chat_rows(6), {}),
        (chat_rows(6), {"max_length": 40}),
        (chat_rows(3, seed=1), {}),
    ):
        write_rows(path, rows)
        dpo_cache.precompute(model_folder, path, cache, streaming=streaming, audit="off", **options)
        assert len(dpo_cache.open_cache(cache).pairs("pairs")) == len(rows)
    (tmp_path / "link.jsonl").symlink_to(path)  # another name of the same file
    write_rows(path, chat_rows(5))
    dpo_cache.precompute(model_folder, tmp_path / "link.jsonl", cache, name="pairs", streaming=streaming)
    assert len(dpo_cache.open_cache(cache).pairs("pairs")) == 5


def test_rows_in_memory_are_another_source_than_a_file(model_folder: str, data_file: str, cache: str) -> None:
    for rows in (chat_rows(4), Dataset.from_list(chat_rows(5))):
        dpo_cache.precompute(model_folder, rows, cache, name="pairs")
    with pytest.raises(CacheError, match=f"\n  source: Dataset in memory and {data_file}\n"):
        dpo_cache.precompute(model_folder, data_file, cache)


def test_settings_that_give_the_same_pairs_are_written(
    model_folder: str, data_file: str, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dpo_cache.precompute(model_folder, data_file, cache)
    refuse_models(monkeypatch)
    before = scored(cache)
    parts = sorted(Path(cache).rglob("*.parquet"))
    audit = dpo_cache.open_cache(cache).pairs("pairs").manifest["audit"]
    template = tmp_path / "template.jinja"
    template.write_text("{# the same ids #}" + make_tokenizer().chat_template)
    copied = shutil.copy(data_file, tmp_path / "copy.jsonl")
    for dataset, options, member, expected in (
        (data_file, {"max_length": 200}, "max_length", 200),
        (data_file, {"truncation": "keep-end"}, "truncation", "keep-end"),
        (data_file, {"chat_template": str(template)}, "chat_template", template.read_text()),
        (copied, {}, "dataset", str(copied)),
    ):
        report = dpo_cache.precompute(model_folder, dataset, cache, name="pairs", **options)
        manifest = dpo_cache.open_cache(cache).pairs("pairs").manifest
        assert {**manifest["source"], **manifest["tokenization"]}[member] == expected
        assert manifest["audit"] == audit and report.bytes_written > 0
        (remark,) = (
            text for text in report.remarks if "has the same pairs, with other settings now: " in text
        )
        assert f"{member}: " in remark
        assert scored(cache) == before and sorted(Path(cache).rglob("*.parquet")) == parts
        assert dpo_cache.precompute(model_folder, dataset, cache, name="pairs", **options).bytes_written == 0
        assert dpo_cache.verify(cache).is_whole


def test_a_pair_set_that_another_run_publishes_meanwhile_is_not_replaced(
    model_folder: str, tmp_path: Path, cache: str
) -> None:
    mine, other = two_data_files(tmp_path, num_rows=6)

    def publish_other(_: ScoringProgress) -> None:
        if not dpo_cache.open_cache(cache, create=True).pair_sets():
            dpo_cache.precompute(model_folder, other, cache, name="demo")

    with pytest.raises(CacheError, match=f"\n  source: {other} and {mine}\n"):
        dpo_cache.precompute(model_folder, mine, cache, name="demo", on_progress=publish_other)
    assert dpo_cache.precompute(model_folder, mine, cache, name="mine").scored_now == 0


def test_dropped_rows_are_counted_by_reason(model_folder: str, tmp_path: Path, cache: str) -> None:
    rows = chat_rows(6)
    rows[1]["rejected"] = rows[1]["chosen"]
    rows[3]["prompt"][0]["content"] = "long " * 40
    report = dpo_cache.precompute(
        model_folder, write_rows(tmp_path / "pairs.jsonl", rows), cache, max_length=128
    )
    assert dict(report.dropped) == {
        "chosen equals rejected": 1,
        "prompt leaves no room for an answer within max_length": 1,
    }
    assert report.pairs_kept == 4
    assert dpo_cache.open_cache(cache).pairs("pairs").manifest["source"]["rows_dropped"] == dict(
        report.dropped
    )


def test_the_global_random_state_is_not_changed(model_folder: str, data_file: str, cache: str) -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    dpo_cache.precompute(model_folder, data_file, cache)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before


@pytest.mark.parametrize("streaming", [False, True])
def test_windows_change_nothing(model_folder: str, data_file: str, tmp_path: Path, streaming: bool) -> None:
    whole = dpo_cache.precompute(model_folder, data_file, str(tmp_path / "whole"))
    windowed = dpo_cache.precompute(
        model_folder, data_file, str(tmp_path / "windowed"), window=5, streaming=streaming
    )
    assert (windowed.scored_now, windowed.distinct_completions) == (
        whole.scored_now,
        whole.distinct_completions,
    )
    for one, other in zip(scored(str(tmp_path / "whole")), scored(str(tmp_path / "windowed")), strict=True):
        assert one[:3] == other[:3] and np.allclose(one[3], other[3], atol=3e-5)


def test_ctrl_c_keeps_what_is_scored(model_folder: str, data_file: str, cache: str) -> None:
    def interrupt(progress: ScoringProgress) -> None:
        if progress.num_completions >= 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dpo_cache.precompute(model_folder, data_file, cache, budget_tokens="16", on_progress=interrupt)
    opened = Cache(cache)
    kept = len(opened.scores(opened.references()[0]))
    assert kept >= 5 and opened.pair_sets() == []
    assert dpo_cache.precompute(model_folder, data_file, cache).already_cached == kept


def test_the_survey_counts_repeated_pairs_and_shared_tokens(
    model_folder: str, tmp_path: Path, cache: str
) -> None:
    rows = chat_rows(4)
    swapped = {**rows[1], "chosen": rows[1]["rejected"], "rejected": rows[1]["chosen"]}
    equal = {**rows[0], "rejected": rows[0]["chosen"]}
    path = write_rows(tmp_path / "pairs.jsonl", [*rows, rows[0], swapped, equal])
    surveys: list[dict] = []
    report = dpo_cache.precompute(
        model_folder, path, cache, window=3, on_survey=lambda survey: surveys.append(survey.as_dict())
    )
    (survey,) = surveys
    assert report.surveys == surveys
    assert (survey["rows_read"], survey["pairs_kept"], survey["data_format"]) == (7, 6, "conversation")
    assert survey["duplicates"] == {"count": 1, "rows": [4]}
    assert survey["contradictory"] == {"count": 1, "rows": [5]}
    assert survey["dropped"] == {"chosen equals rejected": {"count": 1, "rows": [6]}}
    assert survey["forest_tokens"] < survey["data_tokens"]
    assert json.loads(json.dumps(survey)) == survey


def test_the_survey_comes_before_any_model_is_loaded(
    model_folder: str, data_file: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_models(monkeypatch)
    surveys: list[data.Survey] = []
    with pytest.raises(AssertionError, match="a model was loaded"):
        dpo_cache.precompute(model_folder, data_file, cache, on_survey=surveys.append)
    assert surveys[0].pairs_kept == 12


def test_ranked_answers_are_scored_once_each(model_folder: str, tmp_path: Path, cache: str) -> None:
    rows = [{"prompt": "which?", "responses": [" a", " bb", " ccc", " dddd"], "scores": [1, 4, 3, 3]}]
    path = write_rows(tmp_path / "ranked.jsonl", rows)
    report = dpo_cache.precompute(model_folder, path, cache)
    assert (report.rows_read, report.pairs_kept, report.scored_now) == (1, 5, 4)
    best = dpo_cache.precompute(model_folder, path, cache, ranked_pairs="best", name="best")
    assert (best.pairs_kept, best.scored_now) == (3, 0)


def test_answers_all_ranked_alike_are_dropped_and_counted(
    model_folder: str, tmp_path: Path, cache: str
) -> None:
    rows = [{"prompt": "which?", "responses": [" a", " b"], "ranks": ranks} for ranks in ([1, 1], [2, 1])]
    report = dpo_cache.precompute(model_folder, write_rows(tmp_path / "ranked.jsonl", rows), cache)
    assert (report.pairs_kept, report.dropped) == (1, {"answers all ranked alike": 1})


def test_one_of_two_verdicts_is_chosen_and_ties_are_counted(
    model_folder: str, tmp_path: Path, cache: str
) -> None:
    rows = [
        {
            "prompt": "which?",
            "response_0": " a",
            "response_1": " b",
            "better_response_id": 0,
            "safer_response_id": safer,
        }
        for safer in (1, "tie")
    ]
    path, remarks = write_rows(tmp_path / "compared.jsonl", rows), list[str]()
    with pytest.raises(DataError, match="may prefer different answers: choose one with `map`"):
        dpo_cache.precompute(model_folder, path, cache, dry_run=True)
    report = dpo_cache.precompute(
        model_folder, path, cache, map=("preference=safer_response_id",), dry_run=True, log=remarks.append
    )
    (survey,) = report.surveys
    assert (survey["data_format"], survey["pairs_kept"]) == ("compared", 1)
    assert survey["dropped"]["answers all ranked alike"]["rows"] == [1]
    assert any(
        "the better of `response_0` and `response_1` is chosen, by `preference`" in text for text in remarks
    )


def test_columns_may_be_renamed_and_the_format_named(model_folder: str, tmp_path: Path, cache: str) -> None:
    rows = [{"q": "which?", "good": " a", "bad": " b"}]
    path = write_rows(tmp_path / "named.jsonl", rows)
    mapped = ("question=q", "chosen=good", "rejected=bad")
    report = dpo_cache.precompute(model_folder, path, cache, map=mapped, format="question")
    assert report.surveys[0]["data_format"] == "question" and report.pairs_kept == 1
    with pytest.raises(OptionError, match="expected NAME=COLUMN"):
        dpo_cache.precompute(model_folder, path, cache, map=("question",))
    with pytest.raises(
        OptionError, match="`map` question=r: question is q already.\nGive each name one column"
    ):
        dpo_cache.precompute(model_folder, path, cache, map=("question=q", "question=r"))


def test_tools_and_template_options_reach_the_ids(model_folder: str, tmp_path: Path, cache: str) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ tools[0].name if tools else '' }}{% if quiet %}<|system|>{% endif %}{% for m in messages %}{{ "
        "m.content }}{% endfor %}"
    )
    plain = {"prompt": [{"role": "user", "content": "u"}], "chosen": "a", "rejected": "b"}
    prompts = []
    for number, extra in enumerate(
        ({}, {"tools": '[{"name": "look"}]'}, {"chat_template_kwargs": {"quiet": True}})
    ):
        path = write_rows(tmp_path / f"rows{number}.jsonl", [{**plain, **extra}])
        dpo_cache.precompute(model_folder, path, cache, chat_template=str(template))
        (scored_pair,) = dpo_cache.open_cache(cache).pairs(f"rows{number}")
        prompts.append(make_tokenizer().decode(scored_pair.pair.chosen.prompt_ids))
    assert prompts == ["u", "looku", "<|system|>u"]


@pytest.mark.parametrize("budget", ["16", "auto"])
def test_a_poisoned_weight_names_the_row_that_meets_it(tmp_path: Path, cache: str, budget: str) -> None:
    model, rows = make_llama(), chat_rows(10)
    rows[5]["chosen"] = [{"role": "assistant", "content": "~ it is"}]
    (token,) = make_tokenizer()("~", add_special_tokens=False)["input_ids"]
    model.model.embed_tokens.weight.data[token] = float("nan")
    model.save_pretrained(tmp_path / "poisoned")
    make_tokenizer().save_pretrained(tmp_path / "poisoned")
    with pytest.raises(
        ModelError,
        match=r"poisoned gives a log-prob that is NaN or infinite for row "
        r"(5|4, or for a row that was computed in the same chunk)\.\n",
    ):
        dpo_cache.precompute(
            tmp_path / "poisoned", write_rows(tmp_path / "pairs.jsonl", rows), cache, budget_tokens=budget
        )


@pytest.mark.parametrize("attention", ["forest", "rows"])
def test_progress_ends_at_the_whole_over_several_windows(
    model_folder: str, data_file: str, cache: str, attention: str
) -> None:
    seen: list[ScoringProgress] = []
    dpo_cache.precompute(
        model_folder,
        data_file,
        cache,
        window=4,
        attention=attention,
        budget_tokens="64",
        on_progress=seen.append,
    )
    assert all(
        0 <= progress.num_tokens <= progress.total_tokens and progress.seconds_left >= 0 for progress in seen
    )
    assert seen[-1].num_tokens == seen[-1].total_tokens


@pytest.mark.parametrize("bad", ['{"prompt": \n', '{"prompt": "é'], ids=["broken", "torn"])
@pytest.mark.parametrize("place", [0, 3])
def test_a_stream_that_breaks_is_reported(
    model_folder: str, tmp_path: Path, cache: str, bad: str, place: int
) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", chat_rows(6))
    lines = Path(path).read_text().splitlines(keepends=True)
    Path(path).write_text("".join(lines[:place]) + bad + "\n" + "".join(lines[place:]))
    problem = rf"it is an incomplete JSON object .*: 1 row, line {place + 1}\n"
    with pytest.raises(DataError, match=rf"pairs.jsonl.* cannot be used (?s:.*){problem}"):
        dpo_cache.precompute(model_folder, path, cache, streaming=True, window=2)


def test_columns_and_options_without_use_are_said(model_folder: str, tmp_path: Path, cache: str) -> None:
    remarks: list[str] = []
    path = write_rows(
        tmp_path / "pairs.jsonl", [{"system": "Be brief.", "prompt": "a", "chosen": "b", "rejected": "c"}]
    )
    dpo_cache.precompute(model_folder, path, cache, ranked_pairs="best", log=remarks.append)
    assert any("the column system is not used by the format text" in remark for remark in remarks)
    assert any("`ranked_pairs` best has no effect on the format text" in remark for remark in remarks)


def test_a_log_prob_that_is_no_number_names_its_row_and_stores_nothing_of_its_batch(
    model_folder: str, data_file: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = runner.score_completions, []

    def score_badly(model, completions, attention, budget):  # type: ignore[no-untyped-def]
        for number, progress in enumerate(real(model, completions, attention, budget)):
            if number == 3:
                index, score = progress.scores[0]
                score.token_logps[-1] = np.nan
                broken.append((completions[index], len(progress.scores)))
            yield progress

    monkeypatch.setattr(runner, "score_completions", score_badly)
    with pytest.raises(
        ModelError, match=r"\nIts weights may be damaged\. .* The scores of this chunk are discarded\.$"
    ) as caught:
        dpo_cache.precompute(model_folder, data_file, cache, budget_tokens="40", audit="off")
    monkeypatch.setattr(runner, "score_completions", real)
    report = dpo_cache.precompute(model_folder, data_file, cache)
    completion, num_lost = broken[0]
    rows = [
        entry.pair.row
        for entry in dpo_cache.open_cache(cache).pairs("pairs")
        for side in (entry.pair.chosen, entry.pair.rejected)
        if np.array_equal(side.sequence_ids, completion.sequence_ids)
    ]
    assert str(caught.value).startswith(
        f"{model_folder} gives a log-prob that is NaN or infinite for row{'s' if len(rows) > 1 else ''} "
        f"{', '.join(map(str, rows[:3]))}, or for a row that was computed in the same chunk.\n"
    )
    assert report.already_cached > 0 and report.scored_now >= num_lost


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(
    data_file: str, tmp_path: Path, cache: str
) -> None:
    folder = tmp_path / "small-vocabulary"
    make_llama(vocab_size=100).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match="has 100 embeddings"):
        dpo_cache.precompute(str(folder), data_file, cache)
    assert not list(Path(cache).rglob("*.parquet"))


@pytest.mark.parametrize("is_used", [False, True])
def test_a_token_that_only_the_tokenizer_has_is_refused_where_a_row_has_it(
    is_used: bool, tmp_path: Path, cache: str
) -> None:
    folder, tokenizer = tmp_path / "added", make_tokenizer()
    num_ids = len(tokenizer)
    make_llama(vocab_size=num_ids).save_pretrained(folder)
    tokenizer.add_tokens(["<|added|>"])
    tokenizer.save_pretrained(folder)
    rows = chat_rows(4)
    if is_used:
        rows[2]["rejected"][0]["content"] = "a <|added|> b"
    data = write_rows(tmp_path / "rows.jsonl", rows)
    if not is_used:
        assert dpo_cache.precompute(str(folder), data, cache, dry_run=True).pairs_kept == 4
        return
    with pytest.raises(ModelError) as caught:
        dpo_cache.precompute(str(folder), data, cache, dry_run=True)
    assert str(caught.value) == (
        f"row 2: the tokenizer makes token id {num_ids}, but {folder} has {num_ids} embeddings.\n"
        "Use the model's own tokenizer, or, if the token was added to it, a model that has it."
    )


def test_sequences_beyond_the_models_positions_are_refused(
    model_folder: str, tmp_path: Path, cache: str
) -> None:
    rows = chat_rows(2)
    rows[0]["chosen"][0]["content"] = "very " * 80
    with pytest.raises(ModelError, match="made for 256 at most.\nCut sequences to a max_length of 256"):
        dpo_cache.precompute(model_folder, write_rows(tmp_path / "pairs.jsonl", rows), cache)


def test_a_checkpoint_without_its_head_is_refused(
    model_folder: str, data_file: str, tmp_path: Path, cache: str
) -> None:
    folder = tmp_path / "headless"
    model = make_llama()
    state = {name: value for name, value in model.state_dict().items() if "lm_head" not in name}
    model.save_pretrained(folder, state_dict=state)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(
        ModelError, match=r"1 weights are not in the checkpoint or have another shape, first lm_head.weight"
    ):
        dpo_cache.precompute(str(folder), data_file, cache)


def test_a_full_disk_is_found_before_scoring(
    model_folder: str, data_file: str, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cache.store.folders.folder.LocalFolder.free_bytes", lambda self: 100)
    with pytest.raises(StorageError, match="about .* kB are needed, 100 B are free"):
        dpo_cache.precompute(model_folder, data_file, cache)
    assert not Path(cache).exists()


@pytest.mark.parametrize("closed", ["pairs/demo", "references", "scores"])
def test_a_folder_of_others_is_found_before_the_model_is_loaded(
    model_folder: str, tmp_path: Path, cache: str, closed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = two_data_files(tmp_path, num_rows=2)
    dpo_cache.precompute(model_folder, other, cache, name="demo")
    refuse_models(monkeypatch)
    make_folder = Disk.make_folder

    def refuse(disk: Disk, path: Path) -> None:
        if closed in str(path.parent):
            raise PermissionError(errno.EACCES, "Permission denied")
        make_folder(disk, path)

    monkeypatch.setattr(Disk, "make_folder", refuse)
    with pytest.raises(StorageError, match=f"^cannot write {cache}/.*{closed}.*: Permission denied"):
        dpo_cache.precompute(model_folder, mine, cache, name="demo", overwrite=True)
    assert dpo_cache.precompute(model_folder, other, cache, name="demo").scored_now == 0  # writes nothing


def test_wrong_rows_leave_nothing_behind(model_folder: str, tmp_path: Path, cache: str) -> None:
    rows = chat_rows(4)
    rows[0]["chosen"][0]["content"] = " "
    with pytest.raises(DataError, match="1 row cannot be used"):
        dpo_cache.precompute(model_folder, write_rows(tmp_path / "pairs.jsonl", rows), cache)
    assert not Path(cache).exists()


def test_a_data_set_of_which_nothing_is_left_is_an_error(
    model_folder: str, data_file: str, cache: str
) -> None:
    with pytest.raises(
        DataError,
        match=r"no row of pairs/train makes a pair: longer than max_length \(12; row 0, 1, 2, …\)",
    ):
        dpo_cache.precompute(model_folder, data_file, cache, max_length=4, truncation="drop")


@pytest.mark.parametrize(
    "options",
    [{"limit": 0}, {"max_length": 1}, {"budget_tokens": "many"}, {"truncation": "middle"}, {"dtype": "int8"}],
)
def test_options_without_sense_are_refused(
    options: dict, model_folder: str, data_file: str, cache: str
) -> None:
    with pytest.raises(OptionError):
        dpo_cache.precompute(model_folder, data_file, cache, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "`num_workers` 0: expected a positive number of workers."),
        ({"unit_tokens": "some"}, "`unit_tokens` some: expected auto or a positive number."),
        ({"min_workers": 2}, "`min_workers` is used only with `ray`.\nGive `ray`, or leave it out;"),
        ({"num_workers": 2, "gpus_per_worker": 1.0}, "`gpus_per_worker` is used only with `ray`."),
        (
            {"ray": "auto", "num_workers": 2, "max_workers": 3},
            "`num_workers` and `max_workers`: give a fixed number of workers, or bounds.",
        ),
        (
            {"ray": "auto", "min_workers": 4, "max_workers": 3},
            "`min_workers` 4: expected at most `max_workers`, 3.",
        ),
        (
            {"ray": "auto", "gpus_per_worker": 1.0, "device": "cpu"},
            "`device` cpu and `gpus_per_worker` 1: workers with a GPU compute on it.",
        ),
        (
            {"ray": "auto", "gpus_per_worker": 0.0, "device": "cuda"},
            "`device` cuda and `gpus_per_worker` 0: workers without a GPU compute on the CPU.",
        ),
        ({"ray": "auto", "streaming": True}, "`streaming` with `ray`: the units of a run must be known"),
        (
            {"device_map": "auto", "stream_weights": "on"},
            "`device_map` auto and `stream_weights` on: two ways to run a reference that is larger",
        ),
    ],
)
def test_options_of_workers_that_do_not_fit_together_are_refused(
    options: dict, message: str, model_folder: str, data_file: str, cache: str
) -> None:
    with pytest.raises(OptionError) as caught:
        dpo_cache.precompute(model_folder, data_file, cache, **options)
    assert str(caught.value).startswith(message) and not Path(cache).exists()


def test_rays_workers_take_no_stream_of_rows(model_folder: str, data_file: str, cache: str) -> None:
    rows = Dataset.from_list(chat_rows()).to_iterable_dataset()
    with pytest.raises(OptionError, match="`ray` with a stream of rows: the units of a run must be known"):
        dpo_cache.precompute(model_folder, rows, cache, name="rows", ray="auto", device="cpu")


@pytest.mark.parametrize("streaming", [False, True])
def test_units_change_nothing(model_folder: str, tmp_path: Path, streaming: bool) -> None:
    rows = write_rows(tmp_path / "pairs.jsonl", chat_rows(60))
    whole = dpo_cache.precompute(model_folder, rows, tmp_path / "whole")
    cut = dpo_cache.precompute(
        model_folder, rows, tmp_path / "cut", unit_tokens="150", streaming=streaming, window=25
    )
    assert cut.scored_now == whole.scored_now == cut.distinct_completions and cut.scored_elsewhere == 0
    for one, other in zip(scored(str(tmp_path / "cut")), scored(str(tmp_path / "whole")), strict=True):
        assert one[:3] == other[:3]
        assert np.allclose(one[3], other[3], atol=3e-5) and np.allclose(one[4], other[4], atol=3e-5)
    assert len([*(tmp_path / "cut").glob("references/*/scores/*")]) > 10, "each unit is published"


def test_what_another_run_publishes_meanwhile_is_not_scored_again(
    model_folder: str, tmp_path: Path, cache: str
) -> None:
    rows = write_rows(tmp_path / "pairs.jsonl", chat_rows(60))
    other: list[Any] = []

    def publish_the_rest(progress: Any) -> None:
        if not other:
            other.append(dpo_cache.precompute(model_folder, rows, cache, name="other"))

    report = dpo_cache.precompute(model_folder, rows, cache, unit_tokens="150", on_progress=publish_the_rest)
    assert 0 < report.scored_now < report.distinct_completions / 4
    assert report.scored_now + report.scored_elsewhere == report.distinct_completions
    assert other[0].scored_now == report.distinct_completions, "the first unit was not published yet"
    assert [one[1:3] for one in scored(cache)] == [one[1:3] for one in scored(cache, "other")]


def test_keys_in_the_pair_set_are_those_of_its_completions(
    model_folder: str, data_file: str, cache: str
) -> None:
    import pyarrow.parquet as pq

    dpo_cache.precompute(model_folder, data_file, cache)
    (part,) = Path(cache, "pairs/pairs/train").glob("*.parquet")
    table = pq.read_table(part)
    for entry, key in zip(
        dpo_cache.open_cache(cache).pairs("pairs"), table.column("chosen_key").to_pylist(), strict=True
    ):
        assert key == completion_key(entry.pair.chosen)
    assert json.loads(Path(cache, "format.json").read_text()) == {"format": "dpo-cache", "version": 1}


@pytest.mark.parametrize("spoil", ["cut", "flipped", "pipe"])
def test_a_part_that_is_not_what_was_written_is_written_again(
    model_folder: str, data_file: str, tmp_path: Path, spoil: str
) -> None:
    dpo_cache.precompute(model_folder, data_file, tmp_path / "cache")
    (part,) = (tmp_path / "cache/pairs").rglob("*.parquet")
    whole = part.read_bytes()
    part.unlink()
    if spoil == "pipe":
        os.mkfifo(part)
    else:
        part.write_bytes(
            whole[:-9] if spoil == "cut" else bytes([*whole[:300], whole[300] ^ 1, *whole[301:]])
        )
    report = dpo_cache.precompute(model_folder, data_file, tmp_path / "cache")
    assert part.read_bytes() == whole and report.scored_now == 0 and report.bytes_written > len(whole)


@pytest.mark.parametrize("streaming", [False, True])
def test_what_rows_lose_is_reported_before_anything_is_scored(
    model_folder: str, tmp_path: Path, cache: str, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    remarks: list[str] = []

    def refuse(*_: object, **__: object) -> None:
        assert any("its images are left out, because only text is scored: " in remark for remark in remarks)
        raise ModelError("no model here")

    monkeypatch.setattr(runner, "load_model", refuse)
    data_file = write_rows(tmp_path / "a.jsonl", [{**row, "images": ["a.png"]} for row in chat_rows(3)])
    with pytest.raises(ModelError, match="no model here"):
        dpo_cache.precompute(model_folder, data_file, cache, streaming=streaming, log=remarks.append)


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_that_cannot_be_used_are_dropped_on_demand(
    model_folder: str, tmp_path: Path, cache: str, streaming: bool
) -> None:
    rows = chat_rows(6)
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [json.dumps(row) for row in rows]
    wrong = ["no JSON", *lines[:2], json.dumps({**rows[0], "chosen": 5}), *lines[2:]]
    (tmp_path / "pairs.jsonl").write_text("\n".join(wrong))
    remarks: list[str] = []
    report = dpo_cache.precompute(
        model_folder,
        f"{tmp_path}/p*.jsonl",
        cache,
        name="mixed",
        on_error="drop",
        streaming=streaming,
        log=remarks.append,
    )
    assert (report.rows_read, report.pairs_kept, sum(report.dropped.values())) == (8, 6, 2)
    assert any("it is not JSON (expecting value): 1 row, line 1" in remark for remark in remarks)
    manifest = open_cache(cache).pairs("mixed").manifest
    assert manifest["source"]["on_error"] == "drop" and manifest["source"]["rows_dropped"] == report.dropped
    assert manifest["source"]["dataset"] == f"{tmp_path}/p*.jsonl"
    again = dpo_cache.precompute(model_folder, tmp_path / "good.jsonl", cache)
    assert (again.scored_now, again.pairs_kept) == (0, 6)
    dpo_cache.export_pairs(cache, "mixed", tmp_path / "out.jsonl")
    exported = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["chosen"] for row in exported] == [row["chosen"] for row in rows]
    (tmp_path / "none.jsonl").write_text("\n".join([wrong[3]] * 2))
    with pytest.raises(DataError, match="no row of none/train makes a pair: .*expected messages"):
        dpo_cache.precompute(
            model_folder, tmp_path / "none.jsonl", cache, on_error="drop", streaming=streaming
        )
