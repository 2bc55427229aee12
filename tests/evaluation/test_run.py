"""A policy compared with its cached reference: the numbers of a naive loop and of training, and every refusal."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

import dpo_cache
from dpo_cache.errors import ModelError, NotInCacheError, OptionError, StorageError
from dpo_cache.evaluation import EvalReport, scoring
from dpo_cache.exchange import export_pairs, import_pairs
from dpo_cache.lm.check_rows import short_rows
from dpo_cache.lm.progress import ScoringProgress
from dpo_cache.store import open_cache
from dpo_cache.types import Score, ScoredPair
from tests.conftest import chat_rows, make_llama, make_tokenizer, naive_token_logps, write_rows

LIKE_TRAINING = {"beta": 0.2, "label_smoothing": 0.1}


def evaluate(cache: str, model: object, pairs: str | None = "heldout", **options: object) -> EvalReport:
    return dpo_cache.evaluate(cache, pairs, str(model), **{"log": lambda _: None, **options})


def save(folder: Path, model: torch.nn.Module) -> Path:
    model.save_pretrained(folder)  # type: ignore[operator]
    make_tokenizer().save_pretrained(folder)
    return folder


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- the numbers
# -----------------------------------------------------------------------------------------------


def test_numbers_are_those_of_a_naive_loop(
    cache: str, trained: dpo_cache.TrainReport, tmp_path: Path
) -> None:
    report = evaluate(cache, trained.model, output=tmp_path / "pairs.jsonl", **LIKE_TRAINING)
    model = AutoModelForCausalLM.from_pretrained(trained.model, dtype=torch.float32).eval()
    losses, margins, policy_margins, log_ratios, tokens = [], [], [], 0.0, 0
    for scored, line in zip(open_cache(cache).pairs("heldout"), lines(tmp_path / "pairs.jsonl"), strict=True):
        pair = scored.pair
        chosen, rejected = (
            float(naive_token_logps(model, side).sum()) for side in (pair.chosen, pair.rejected)
        )
        rewards = 0.2 * (chosen - scored.ref_chosen.logps), 0.2 * (rejected - scored.ref_rejected.logps)
        margin = torch.tensor(rewards[0] - rewards[1], dtype=torch.float64)
        losses.append(float(-0.9 * margin.sigmoid().log() - 0.1 * (-margin).sigmoid().log()))
        margins.append(float(margin))
        policy_margins.append(chosen / pair.chosen.num_tokens - rejected / pair.rejected.num_tokens)
        log_ratios, tokens = log_ratios + chosen - scored.ref_chosen.logps, tokens + pair.chosen.num_tokens
        assert line["row"] == pair.row and line["prompt_tokens"] == len(pair.chosen.prompt_ids)
        assert (line["chosen_tokens"], line["rejected_tokens"]) == (
            pair.chosen.num_tokens,
            pair.rejected.num_tokens,
        )
        assert (line["policy_chosen_logps"], line["policy_rejected_logps"]) == (
            pytest.approx(chosen, rel=1e-5),
            pytest.approx(rejected, rel=1e-5),
        )
        assert (line["ref_chosen_logps"], line["ref_rejected_logps"]) == (
            scored.ref_chosen.logps,
            scored.ref_rejected.logps,
        )
        assert (line["chosen_reward"], line["rejected_reward"]) == (
            pytest.approx(rewards[0], abs=1e-4),
            pytest.approx(rewards[1], abs=1e-4),
        )
        assert line["margin"] == line["chosen_reward"] - line["rejected_reward"]
    assert report.num_pairs == report.pairs_in_set == len(margins) == 40
    assert report.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert report.margin.mean == pytest.approx(
        np.mean(margins), abs=1e-5
    ) and report.margin.median == pytest.approx(np.median(margins), abs=1e-4)
    assert report.accuracy.right == sum(margin > 0 for margin in margins)
    assert report.comparisons["policy logps per token"].right == sum(margin > 0 for margin in policy_margins)
    assert report.logratio_per_token["chosen"] == pytest.approx(log_ratios / tokens, abs=1e-5)
    assert report.calibration.brier == pytest.approx(
        np.mean([(1 - 1 / (1 + np.exp(-margin))) ** 2 for margin in margins]), abs=1e-5
    )
    for groups in (report.by_longer_answer, report.by_answer_tokens, report.by_prompt_tokens):
        assert sum(entry.accuracy.right for entry in groups) == report.accuracy.right
        assert sum(entry.margin * entry.accuracy.count for entry in groups) == pytest.approx(
            sum(margins), abs=1e-3
        )


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    "options",
    [
        LIKE_TRAINING,
        {"loss": "ipo"},
        {"loss": ("apo_zero:0.5", "sft_norm:2")},
        {"loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
        {"loss": "aot"},
    ],
    ids=["sigmoid", "ipo", "a sum", "simpo", "aot"],
)
def test_metrics_are_those_that_training_ends_with(cache: str, tmp_path: Path, options: dict) -> None:
    run = dpo_cache.train(
        cache,
        tmp_path / "run",
        pairs="pairs",
        eval_pairs="heldout",
        batch_size=64,
        lr=3e-3,
        epochs=2.0,
        warmup_ratio=0,
        log=lambda _: None,
        **options,
    )
    report = evaluate(cache, run.model, **options)
    expected = {
        name.removeprefix("eval/"): value for name, value in (run.eval_after or {}).items() if name != "step"
    }
    # it has learned something
    assert run.eval_before and abs(expected["loss"] - run.eval_before["eval/loss"]) > 1e-3
    assert report.metrics.keys() == expected.keys()
    assert report.metrics == {
        name: pytest.approx(value, rel=1e-5, abs=1e-5) for name, value in expected.items()
    }
    assert (report.accuracy.share, report.margin.mean) == (
        report.metrics["rewards/accuracies"],
        pytest.approx(report.metrics["rewards/margins"]),
    )


def test_rows_windows_and_chunks_change_nothing(
    cache: str, trained: dpo_cache.TrainReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate(cache, trained.model, output=tmp_path / "whole.jsonl")
    rows = evaluate(
        cache, trained.model, output=tmp_path / "rows.jsonl", attention="rows", budget_tokens="100"
    )
    monkeypatch.setattr(scoring, "WINDOW_PAIRS", 7)
    seen: list[ScoringProgress] = []
    windows = evaluate(cache, trained.model, output=tmp_path / "windows.jsonl", on_progress=seen.append)
    assert (whole.attention, rows.attention) == ("forest", "rows")
    for name in ("rows", "windows"):
        for one, other in zip(
            lines(tmp_path / "whole.jsonl"), lines(tmp_path / f"{name}.jsonl"), strict=True
        ):
            assert one == {key: pytest.approx(value, rel=1e-5, abs=1e-4) for key, value in other.items()}
    # prefixes that pairs of two windows share are run twice
    assert whole.model_tokens < windows.model_tokens < rows.model_tokens
    assert whole.data_tokens == windows.data_tokens == rows.data_tokens > whole.model_tokens
    done = [progress.num_tokens for progress in seen]
    assert done == sorted(done) and done[-1] == seen[-1].total_tokens == windows.model_tokens
    assert all(
        progress.total_pairs == 40 and progress.num_tokens <= progress.total_tokens for progress in seen
    )


def test_each_distinct_completion_is_scored_once(cache: str, trained: dpo_cache.TrainReport) -> None:
    report = evaluate(cache, trained.model)
    distinct = {
        (*side.prompt_ids, -1, *side.completion_ids)
        for one in open_cache(cache).pairs("heldout")
        for side in (one.pair.chosen, one.pair.rejected)
    }
    assert report.num_completions == len(distinct) < 2 * report.num_pairs


def test_a_limit_takes_the_first_pairs(cache: str, trained: dpo_cache.TrainReport, tmp_path: Path) -> None:
    evaluate(cache, trained.model, output=tmp_path / "all.jsonl")
    report = evaluate(cache, trained.model, output=tmp_path / "few.jsonl", limit=5)
    assert (report.num_pairs, report.pairs_in_set, report.accuracy.count) == (5, 40, 5)
    for one, other in zip(lines(tmp_path / "all.jsonl")[:5], lines(tmp_path / "few.jsonl"), strict=True):
        assert one == {key: pytest.approx(value, rel=1e-5, abs=1e-4) for key, value in other.items()}
    assert evaluate(cache, trained.model, limit=10_000).num_pairs == 40


# -- the reference
# ---------------------------------------------------------------------------------------------


def test_a_remark_names_the_reference_itself_and_its_gap(cache: str, model_folder: str) -> None:
    remarks: list[str] = []
    report = evaluate(cache, model_folder, log=remarks.append)
    assert report.gap.is_reference and report.gap.differing == () and report.gap.num_beyond == 0
    assert 0 <= report.gap.largest < 1e-4 and report.gap.num_completions == 80
    assert report.metrics["loss"] == pytest.approx(np.log(2), abs=1e-5) and abs(report.margin.mean) < 1e-5
    assert report.metrics["rewards/accuracies"] is None and report.accuracy.share is None
    assert (report.accuracy.ties, report.calibration.expected_error) == (40, None)
    assert all(entry.accuracy.share is None for entry in report.by_answer_tokens)
    assert report.comparisons["reference logps"].share is not None and "accuracy -, loss 0.6931" in repr(
        report
    )
    assert remarks == [
        f"the model is the reference (largest gap {report.gap.largest:.2g} nats over 80 answers): its "
        "rewards are zero up to rounding, "
        "so it has no accuracy, and its margins mean nothing."
    ]


@pytest.mark.parametrize(("dtype", "has_accuracy"), [("bfloat16", False), ("float32", True)])
def test_margins_by_rounded_weights_give_no_accuracy(
    cache: str, model_folder: str, tmp_path: Path, dtype: str, has_accuracy: bool
) -> None:
    """The weights of the reference, rounded to bfloat16, are no trained policy, in float32 either."""
    model = AutoModelForCausalLM.from_pretrained(model_folder).to(torch.bfloat16).to(getattr(torch, dtype))
    report = evaluate(cache, save(tmp_path / "rounded", model), dtype="float32")
    assert report.dtype == "float32" and not report.gap.is_reference
    assert (report.accuracy.share is not None) == has_accuracy and 1e-5 < report.margin.deviation < 0.02
    assert report.comparisons["reference logps"].ties == 0


def test_a_trained_model_is_another_and_its_rewards_are_against_the_cache(
    cache: str, trained: dpo_cache.TrainReport
) -> None:
    remarks: list[str] = []
    report = evaluate(cache, trained.model, log=remarks.append)
    assert not report.gap.is_reference and [line.split(":")[0] for line in report.gap.differing] == [
        "weights"
    ]
    assert report.gap.largest > 1 and report.gap.num_beyond > 0 and report.margin.deviation > 0.01
    assert [remark.partition(" is the model of a run")[0] for remark in remarks[:-1]] == [str(trained.model)]
    assert remarks[-1].startswith("the model is another than the reference (largest gap ")


def test_a_stale_cache_gives_a_remark(cache: str, model_folder: str, data_file: str, tmp_path: Path) -> None:
    dpo_cache.precompute(model_folder, data_file, tmp_path / "cache")
    opened = open_cache(tmp_path / "cache")
    pairs = opened.pairs("pairs")
    writer = opened.write_pairs("pairs", "train")
    writer.add(
        [
            ScoredPair(one.pair, Score(one.ref_chosen.token_logps - np.float32(0.01)), one.ref_rejected)
            for one in pairs
        ]
    )
    writer.finish(
        {key: value for key, value in pairs.manifest.items() if key not in ("parts", "num_pairs", "format")}
    )
    remarks: list[str] = []
    report = evaluate(str(tmp_path / "cache"), model_folder, None, log=remarks.append)
    assert report.gap.is_reference and report.gap.num_beyond == 12
    assert (
        remarks[-1].startswith("the model is the reference, but its log-probs are not the cached ones")
        and "12 of them beyond rounding" in remarks[-1]
    )


def test_an_imported_reference_is_known_by_its_values(
    cache: str, model_folder: str, trained: dpo_cache.TrainReport, tmp_path: Path
) -> None:
    export_pairs(cache, "heldout", tmp_path / "out.parquet", log=lambda _: None)
    import_pairs(
        tmp_path / "cache",
        tmp_path / "out.parquet",
        reference="peer",
        name="p",
        model=model_folder,
        dtype="float32",
        log=lambda _: None,
    )
    remarks: list[str] = []
    same = evaluate(str(tmp_path / "cache"), model_folder, None, log=remarks.append)
    assert not same.gap.is_reference and same.gap.num_beyond == 0
    assert remarks[-1].startswith("the model repeats the log-probs of the imported reference 'peer'")
    other = evaluate(str(tmp_path / "cache"), trained.model, None, log=remarks.append)
    assert remarks[-1].startswith("the model is not what the imported reference 'peer' was made with")
    assert other.metrics == pytest.approx(evaluate(cache, trained.model).metrics, rel=1e-5, abs=1e-5)


def test_pairs_of_another_reference_than_the_named_one_are_refused(
    cache: str, model_folder: str, data_file: str, tmp_path: Path
) -> None:
    pairs = open_cache(cache).pairs("heldout")
    assert (
        evaluate(cache, model_folder, reference=pairs.reference_id[:10], limit=2).reference
        == pairs.reference_id
    )
    dpo_cache.precompute(model_folder, data_file, tmp_path / "cache")
    other = dpo_cache.precompute(
        model_folder, data_file, tmp_path / "cache", dtype="bfloat16", name="half"
    ).reference
    with pytest.raises(
        NotInCacheError,
        match=r"scored by reference \w+, not by \w+; they differ in\n  dtype: float32 and bfloat16\nLeave `reference`",
    ):
        evaluate(str(tmp_path / "cache"), model_folder, "pairs", reference=other)


# -- what is refused
# -------------------------------------------------------------------------------------------


def test_one_of_several_pair_sets_must_be_named(cache: str, model_folder: str, tmp_path: Path) -> None:
    with pytest.raises(
        NotInCacheError,
        match="several pair sets to evaluate on.\nName one with `pairs`: heldout/train, pairs/train",
    ):
        evaluate(cache, model_folder, None)
    open_cache(tmp_path / "empty", create=True).publish_format()
    with pytest.raises(NotInCacheError, match="no pair set to evaluate on.\nRun `dpo-cache precompute"):
        evaluate(str(tmp_path / "empty"), model_folder, None)


def test_a_model_of_other_tokens_is_refused_with_the_row(cache: str, tmp_path: Path) -> None:
    small = save(tmp_path / "small", make_llama(vocab_size=100))
    with pytest.raises(
        ModelError,
        match=f"row 0 of the data holds token id 26., but {small} has 100 embeddings: it reads other tokens",
    ):
        evaluate(cache, small)
    short = save(tmp_path / "short", make_llama(max_position_embeddings=32))
    with pytest.raises(
        ModelError,
        match=rf"row \d+ of the data has a sequence of \d+ tokens, but {short} was made for 32 at most",
    ):
        evaluate(cache, short)


def test_another_tokenizer_of_as_many_tokens_gives_a_remark(
    cache: str, model_folder: str, tmp_path: Path
) -> None:
    folder = save(tmp_path / "other", make_llama())
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    remarks: list[str] = []
    evaluate(cache, folder, limit=2, log=remarks.append)
    assert remarks[0].startswith(f"the tokenizer of {folder} is not the one that made the pairs' ids")
    make_llama().save_pretrained(tmp_path / "bare")
    evaluate(cache, tmp_path / "bare", limit=2, log=remarks.append)
    assert remarks[-2].startswith(f"{tmp_path}/bare has no tokenizer to compare")


def test_log_probs_that_are_not_finite_name_their_rows(model_folder: str, tmp_path: Path) -> None:
    checked = {
        int(token)
        for completion in short_rows(make_llama().config.vocab_size, 1024)
        for token in completion.sequence_ids
    }
    letter = next(
        letter for letter in "~^|{}@#$%&*" if make_tokenizer()(letter)["input_ids"][0] not in checked
    )
    rows = chat_rows(12)
    rows[4]["rejected"] = rows[7]["rejected"] = [{"role": "assistant", "content": f"red {letter} blue"}]
    dpo_cache.precompute(model_folder, write_rows(tmp_path / "pairs.jsonl", rows), tmp_path / "cache")
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[make_tokenizer()(letter)["input_ids"][0]] = torch.nan
    broken = save(tmp_path / "broken", model)
    for attention in ("forest", "rows"):
        with pytest.raises(
            ModelError,
            match=rf"{broken} gives a log-prob that is NaN or infinite for rows? (4, 7|4|7)\.\nIts weights may be damaged",
        ):
            evaluate(
                str(tmp_path / "cache"), broken, None, attention=attention, output=tmp_path / "out.jsonl"
            )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "cache", "pairs.jsonl"]


def test_the_folder_of_a_run_is_distinguished_from_its_model(
    cache: str, trained: dpo_cache.TrainReport, tmp_path: Path
) -> None:
    with pytest.raises(
        ModelError,
        match=f"{trained.output}: the folder of a training run, not of a model.\nGive {trained.model}.",
    ):
        evaluate(cache, trained.output)
    dpo_cache.train(
        cache, tmp_path / "run", pairs="pairs", batch_size=4, should_stop=lambda: True, log=lambda _: None
    )
    with pytest.raises(ModelError, match="It has no model yet: finish it with `dpo-cache train --resume`."):
        evaluate(cache, tmp_path / "run")


def test_an_adapter_without_a_usable_config_is_refused(cache: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "adapter", make_llama())
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=f"^{folder}"):
        evaluate(cache, folder)


WRONG_OPTIONS = {
    "no pairs": ({"limit": 0}, "`limit` 0: expected a positive number of pairs."),
    "no loss": ({"loss": "dpo"}, "`loss` dpo: expected one of"),
    "idle": (
        {"loss": "ipo", "label_smoothing": 0.1},
        "`label_smoothing` 0.1 has no meaning under `loss` ipo.",
    ),
    "idle gamma": ({"simpo_gamma": 1.0}, "`simpo_gamma` 1.0 has no meaning under `loss` sigmoid."),
    "beta": ({"beta": 0.0}, "`beta` 0.0: expected a number above 0."),
    "nan": ({"beta": float("nan")}, "`beta` nan: expected a finite number."),
    "exo": ({"loss": "exo_pair"}, "needs a `label_smoothing` above 0"),
    "ending": ({"output": "pairs.csv"}, "`output` pairs.csv: no format has this ending."),
    "overwrite": ({"overwrite": True}, "`overwrite` is used only with `output`."),
    "dtype": ({"dtype": "float8"}, "`dtype` float8: expected one of"),
    "budget": ({"budget_tokens": "many"}, "`budget_tokens` many: expected auto or a positive number."),
}


@pytest.mark.parametrize("case", WRONG_OPTIONS)
def test_options_that_make_no_sense_are_refused(cache: str, model_folder: str, case: str) -> None:
    options, message = WRONG_OPTIONS[case]
    with pytest.raises(OptionError, match=message):
        evaluate(cache, model_folder, **options)


# -- one line a pair
# -------------------------------------------------------------------------------------------


def test_parquet_and_json_lines_hold_the_same(
    cache: str, trained: dpo_cache.TrainReport, tmp_path: Path
) -> None:
    evaluate(cache, trained.model, output=tmp_path / "pairs.jsonl", limit=9)
    evaluate(cache, trained.model, output=tmp_path / "pairs.parquet", limit=9)
    table = pq.read_table(tmp_path / "pairs.parquet")
    assert table.schema.names == list(lines(tmp_path / "pairs.jsonl")[0]) and table.num_rows == 9
    assert {str(kind) for kind in table.schema.types} == {"int64", "double"}
    for one, other in zip(table.to_pylist(), lines(tmp_path / "pairs.jsonl"), strict=True):
        assert one == {key: pytest.approx(value, rel=1e-5, abs=1e-4) for key, value in other.items()}


def test_an_existing_file_is_kept_without_overwrite(cache: str, model_folder: str, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    out.write_text("mine")
    with pytest.raises(OptionError, match="is there already"):
        evaluate(cache, model_folder, output=out)
    assert out.read_text() == "mine"
    evaluate(cache, model_folder, output=out, overwrite=True, limit=3)
    assert len(lines(out)) == 3


def test_a_path_that_cannot_be_written_fails_before_the_model_is_loaded(cache: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        evaluate(cache, tmp_path / "no model", output=tmp_path / "file" / "pairs.jsonl")
