"""A run scores a sample of its completions again by the model's own forward, and keeps nothing if they differ."""

import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dpo_cache
from dpo_cache.cli.app import main
from dpo_cache.errors import ModelError, OptionError
from dpo_cache.lm import own_forward, runner
from dpo_cache.precomputing import units
from dpo_cache.precomputing.audit import Audit, AuditTotals
from dpo_cache.store import open_cache
from dpo_cache.store.folders.local import LocalFolder
from dpo_cache.store.upkeep import compact, run_record
from dpo_cache.types import Completion, Score
from tests.conftest import chat_rows, make_llama, make_tokenizer, naive_token_logps, write_rows

IsHit = Callable[[Completion], bool]
EVERY = "1"  # all completions are audited


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def many_rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "many.jsonl", chat_rows(60))


def plant(monkeypatch: pytest.MonkeyPatch, is_hit: IsHit, gap: float = 0.5) -> None:
    """Let the engine give wrong log-probs for some completions."""
    real = runner.score_completions

    def score(model: Any, completions: Any, *rest: Any) -> Iterator[Any]:
        for step in real(model, completions, *rest):
            for place, scored in step.scores:
                if is_hit(completions[place]):
                    scored.token_logps[-1] -= gap
            yield step

    monkeypatch.setattr(runner, "score_completions", score)


def has_text(text: str) -> IsHit:
    (token,) = make_tokenizer()(text, add_special_tokens=False)["input_ids"]
    return lambda completion: token in completion.sequence_ids


def publish_each_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "FLUSH_S", 0.0)


def files(place: Path) -> dict[str, bytes]:
    """Every file, dot-files too, except format.json: an empty cache is no trace of a run."""
    return {
        path.relative_to(place).as_posix(): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file() and path.name != "format.json"
    }


def check_values(cache: Path, name: str = "many") -> None:
    """The pair set holds the model's own log-probs."""
    model = make_llama()
    for entry in open_cache(cache).pairs(name):
        for completion, score in (
            (entry.pair.chosen, entry.ref_chosen),
            (entry.pair.rejected, entry.ref_rejected),
        ):
            assert np.abs(score.token_logps - naive_token_logps(model, completion).numpy()).max() < 3e-5


# -- honest runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["forest", "rows"])
def test_an_honest_run_reports_what_it_audited(
    model_folder: str, many_rows: str, cache: Path, attention: str
) -> None:
    report = dpo_cache.precompute(model_folder, many_rows, cache, attention=attention)
    assert 8 <= report.audited <= 14 and report.audited_tokens > report.audited
    assert report.audit_largest_gap is not None and report.audit_mean_gap is not None
    assert 0 < report.audit_mean_gap < report.audit_largest_gap < 1e-4 and report.audit_s > 0
    assert open_cache(cache).pairs("many").manifest["audit"] == {
        "completions": report.audited,
        "tokens": report.audited_tokens,
        "largest_gap": report.audit_largest_gap,
        "mean_gap": report.audit_mean_gap,
    }
    check_values(cache)


def test_an_audit_changes_no_value_and_leaves_no_other_file(
    model_folder: str, many_rows: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"budget_tokens": "64", "log": lambda text: None}
    for audit in ("auto", EVERY, "off"):
        dpo_cache.precompute(model_folder, many_rows, tmp_path / audit, audit=audit, **options)
    found = {audit: files(tmp_path / audit) for audit in ("auto", EVERY, "off")}
    parts = {
        audit: {name: content for name, content in entries.items() if name.endswith(".parquet")}
        for audit, entries in found.items()
    }
    assert parts["auto"] == parts[EVERY] == parts["off"]
    assert found["auto"].keys() == found[EVERY].keys() == found["off"].keys()


def test_a_number_audits_one_in_so_many_and_off_none(
    model_folder: str, many_rows: str, tmp_path: Path
) -> None:
    every = dpo_cache.precompute(model_folder, many_rows, tmp_path / "every", audit=1)
    assert every.audited == every.scored_now > 90
    none = dpo_cache.precompute(model_folder, many_rows, tmp_path / "none", audit="off")
    assert (none.audited, none.audit_largest_gap, none.audit_s) == (0, None, 0.0)
    assert "audit" not in open_cache(tmp_path / "none").pairs("many").manifest
    third = dpo_cache.precompute(model_folder, many_rows, tmp_path / "third", audit=3)
    assert every.scored_now / 5 < third.audited < every.scored_now / 2


@pytest.mark.parametrize("audit", ["0", "-1", "some", "1.5", ""])
def test_other_values_are_refused(model_folder: str, many_rows: str, cache: Path, audit: str) -> None:
    with pytest.raises(OptionError, match=r"`audit` .*: expected auto, off or a number N, to audit one"):
        dpo_cache.precompute(model_folder, many_rows, cache, audit=audit)


def test_with_nothing_to_score_nothing_is_audited(model_folder: str, many_rows: str, cache: Path) -> None:
    dpo_cache.precompute(model_folder, many_rows, cache)
    before = files(cache)
    report = dpo_cache.precompute(model_folder, many_rows, cache)
    assert (report.audited, report.scored_now) == (0, 0) and files(cache) == before
    again = dpo_cache.precompute(model_folder, many_rows, cache, name="again")
    assert again.audited == 0 and "audit" not in open_cache(cache).pairs("again").manifest


def test_a_resumed_run_audits_what_it_scores(
    model_folder: str, many_rows: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_each_step(monkeypatch)

    def interrupt(progress: Any) -> None:
        if progress.num_completions >= 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dpo_cache.precompute(model_folder, many_rows, cache, budget_tokens="64", on_progress=interrupt)
    kept = files(cache)
    assert kept and not any("/.run-" in name for name in kept), "an interrupted run leaves no record"
    report = dpo_cache.precompute(model_folder, many_rows, cache, audit=EVERY)
    assert report.already_cached >= 30 and report.audited == report.scored_now > 0
    check_values(cache)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_dry_run_audits_nothing(
    model_folder: str, many_rows: str, cache: Path, streaming: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_forward, "own_logps_at", None)
    report = dpo_cache.precompute(model_folder, many_rows, cache, dry_run=True, streaming=streaming)
    assert report.audited == 0 and not cache.exists()


def test_a_loaded_model_is_audited_and_is_as_before(many_rows: str, cache: Path) -> None:
    model = make_llama().train()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    report = dpo_cache.precompute(
        model, many_rows, cache, tokenizer=make_tokenizer(), name="many", log=lambda text: None
    )
    assert report.audited >= 8 and model.training and model.config._attn_implementation == "sdpa"
    after = {name: dict(module.__dict__) for name, module in model.named_modules()}
    assert {name: fields.keys() for name, fields in after.items()} == {
        name: fields.keys() for name, fields in before.items()
    }


# -- faults ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("attention", ["forest", "rows"])
def test_a_fault_past_a_position_is_found_before_anything_is_published(
    model_folder: str,
    tmp_path: Path,
    cache: Path,
    attention: str,
    streaming: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One long row among many short ones; not in the first window."""
    publish_each_step(monkeypatch)
    rows = chat_rows(60)
    rows[41]["chosen"] = [{"role": "assistant", "content": "large " * 20}]
    data = write_rows(tmp_path / "many.jsonl", rows)
    plant(monkeypatch, lambda completion: len(completion) > 130)
    written: list[set[str]] = []
    publish = run_record.RunRecord.add_shard
    monkeypatch.setattr(
        run_record.RunRecord, "add_shard", lambda self, name: (written.append({name}), publish(self, name))
    )
    with pytest.raises(
        ModelError, match=rf"^.*, run as {attention}, gives other log-probs for row 41 than its own "
    ):
        dpo_cache.precompute(
            model_folder, data, cache, attention=attention, window=30, streaming=streaming, budget_tokens="64"
        )
    assert files(cache) == {} if cache.exists() else True
    assert bool(written) == streaming, "of a stream, the second window is unknown before the first is scored"


def test_a_fault_in_a_family_of_rows_is_found(
    model_folder: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row in thirty has another script; a random sample of eight would miss it three times in four."""
    rows = chat_rows(240)
    for row in rows[7::30]:
        row["chosen"] = [{"role": "assistant", "content": "~ red"}]
    plant(monkeypatch, has_text("~"))
    with pytest.raises(ModelError, match="gives other log-probs for row") as caught:
        dpo_cache.precompute(model_folder, write_rows(tmp_path / "many.jsonl", rows), cache)
    named = caught.value.args[0].partition(" for row ")[2].partition(" than")[0].split(", ")
    assert named and all(int(row) % 30 == 7 for row in named)
    assert not cache.exists() or files(cache) == {}


@pytest.mark.parametrize("attention", ["forest", "rows"])
def test_the_error_gives_place_expected_found_and_what_to_do(
    model_folder: str, many_rows: str, cache: Path, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch, lambda completion: True)
    with pytest.raises(ModelError) as caught:
        dpo_cache.precompute(model_folder, many_rows, cache, attention=attention)
    advice = {
        "forest": "Run again with `attention` rows, and report the model.",
        "rows": "This model cannot be scored; report it, with its name and the row.",
    }
    message = str(caught.value)
    assert message.startswith(f"{model_folder}, run as {attention}, gives other log-probs for row ")
    assert ": by up to 0.5 nats a token, in 9 of 9 audited completions, where rounding in float32" in message
    assert message.endswith(f"\nNothing was published. {advice[attention]}")


def test_a_later_failure_withdraws_what_the_run_published_and_nothing_else(
    model_folder: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scores and pair sets of earlier runs, of another reference and of another writer stay."""
    publish_each_step(monkeypatch)
    rows = chat_rows(90)
    dpo_cache.precompute(model_folder, write_rows(tmp_path / "early.jsonl", rows[:20]), cache)
    dpo_cache.precompute(
        model_folder, tmp_path / "early.jsonl", cache, dtype="bfloat16", name="coarse", limit=2
    )
    before = files(cache)
    plant(monkeypatch, Late(60))
    seen: list[int] = []

    def note(progress: Any) -> None:
        seen.append(len(files(cache).keys() - before.keys()))

    data = write_rows(tmp_path / "all.jsonl", rows)
    with pytest.raises(
        ModelError, match=r"The \d+ score files and 0 pair sets that this run had published are"
    ):
        dpo_cache.precompute(model_folder, data, cache, audit=EVERY, budget_tokens="64", on_progress=note)
    assert max(seen) > 3, "scores had been published"
    assert files(cache) == before


class Late:
    """Hits every completion after the first `num` that it has seen."""

    def __init__(self, num: int):
        self.num, self.num_seen = num, 0

    def __call__(self, completion: Completion) -> bool:
        self.num_seen += 1
        return self.num_seen > self.num


def test_what_another_writer_publishes_meanwhile_stays(
    model_folder: str, many_rows: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_each_step(monkeypatch)
    plant(monkeypatch, Late(60))
    theirs: list[str] = []

    def other_writer(progress: Any) -> None:
        references = open_cache(cache).references() if (cache / "format.json").exists() else []
        if references and not theirs:
            scores = open_cache(cache).scores(references[0])
            scores.publish([(b"k" * 16, Score(np.zeros(2, np.float32)))], theirs.append)

    with pytest.raises(ModelError, match="are withdrawn"):
        dpo_cache.precompute(
            model_folder, many_rows, cache, audit=EVERY, budget_tokens="64", on_progress=other_writer
        )
    (reference,) = open_cache(cache).references()
    assert files(cache).keys() == {theirs[0], f"references/{reference}/reference.json"}
    assert open_cache(cache).scores(reference).contains([b"k" * 16]).all()


@pytest.mark.parametrize("is_older", [False, True])
def test_a_failure_after_another_process_compacted_the_cache(
    model_folder: str, many_rows: str, cache: Path, is_older: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is left; or, if an older version compacted, the error says what is left."""
    publish_each_step(monkeypatch)
    plant(monkeypatch, Late(60))
    left: list[int] = []
    if is_older:
        monkeypatch.setattr(compact, "shards_of_runs", lambda *_: set())

    def compact_once(progress: Any) -> None:
        if (cache / "format.json").exists() and progress.num_completions > 30 and not left:
            (done,) = dpo_cache.compact(cache)
            left.append(done.left)

    with pytest.raises(ModelError, match="are withdrawn") as caught:
        dpo_cache.precompute(
            model_folder, many_rows, cache, audit=EVERY, budget_tokens="64", on_progress=compact_once
        )
    advice = " of the score files were not found: an older version of `dpo-cache compact` or `gc` may have"
    assert (advice in str(caught.value)) is is_older
    assert (files(cache) == {}) is not is_older and bool(left[0]) is not is_older


def write_splits(tmp_path: Path) -> str:
    """A data set of two splits."""
    (tmp_path / "many").mkdir()
    write_rows(tmp_path / "many/test.jsonl", chat_rows(20, seed=3))
    write_rows(tmp_path / "many/train.jsonl", chat_rows(40, seed=4))
    return str(tmp_path / "many")


def test_a_failure_in_a_later_split_restores_the_pair_set_of_an_earlier_run(
    model_folder: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_each_step(monkeypatch)
    data, options = (
        write_splits(tmp_path),
        {"split": ("test", "train"), "audit": EVERY, "budget_tokens": "64"},
    )
    dpo_cache.precompute(model_folder, data, cache, split=("test",), limit=5)
    before = files(cache)
    published: list[set[str]] = []
    add = run_record.RunRecord.add_pair_set

    def note(self: Any, name: str, details: Any) -> None:
        add(self, name, details)
        published.append({name})

    monkeypatch.setattr(run_record.RunRecord, "add_pair_set", note)
    with monkeypatch.context() as patch:
        plant(patch, Late(60))
        with pytest.raises(ModelError, match=r"score files and 1 pair sets that this run had published are"):
            dpo_cache.precompute(model_folder, data, cache, **options, log=lambda text: None)
    assert published == [{"many/test"}]
    assert files(cache) == before and len(open_cache(cache).pairs("many/test")) == 5
    report = dpo_cache.precompute(model_folder, data, cache, **options, log=lambda text: None)
    assert len(open_cache(cache).pairs("many/test")) == 20 and report.audited == report.scored_now
    check_values(cache, "many/test"), check_values(cache, "many/train")


def test_nothing_is_left_of_a_failure_in_a_stream(
    model_folder: str, many_rows: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_each_step(monkeypatch)
    plant(monkeypatch, Late(50))
    with pytest.raises(ModelError, match="are withdrawn"):
        dpo_cache.precompute(
            model_folder, many_rows, cache, audit=EVERY, streaming=True, window=8, budget_tokens="64"
        )
    assert files(cache) == {}


def test_values_that_are_no_numbers_fail(
    model_folder: str, many_rows: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Audit._run_own

    def run_badly(self: Audit, entry: Any) -> Any:
        own = run(self, entry)
        return replace(own, logps_N=np.full_like(own.logps_N, np.nan))

    monkeypatch.setattr(Audit, "_run_own", run_badly)
    with pytest.raises(ModelError, match="gives other log-probs"):
        dpo_cache.precompute(model_folder, many_rows, cache)


# -- crashes and interruptions ---------------------------------------------------------------------------


def test_a_run_that_is_killed_while_it_withdraws_is_withdrawn_by_the_next(
    model_folder: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each number of removed files."""
    publish_each_step(monkeypatch)
    data, options = (
        write_splits(tmp_path),
        {"split": ("test", "train"), "audit": EVERY, "budget_tokens": "64"},
    )
    dpo_cache.precompute(model_folder, data, cache, split=("test",), limit=5)
    before = files(cache)
    remove, snapshots = LocalFolder.remove, []

    def snapshot(self: Any, name: str) -> None:
        if self.root == cache and "/.run-" not in name:
            snapshots.append(tmp_path / f"killed-{len(snapshots)}")
            shutil.copytree(cache, snapshots[-1])
        remove(self, name)

    with monkeypatch.context() as patch:
        plant(patch, Late(60))
        patch.setattr(LocalFolder, "remove", snapshot)
        with pytest.raises(ModelError, match="are withdrawn"):
            dpo_cache.precompute(model_folder, data, cache, **options, log=lambda text: None)
    assert files(cache) == before and len(snapshots) > 3
    for killed in snapshots:
        assert files(killed) != before
        remarks: list[str] = []
        reference = open_cache(killed).references()[0]
        remarks += run_record.end_killed_runs(open_cache(killed), reference)
        assert files(killed) == before
        assert len(remarks) == 1 and "failed its audit and was ended before" in remarks[0]
    dpo_cache.precompute(model_folder, data, snapshots[0], **options, log=lambda text: None)
    check_values(snapshots[0], "many/train")


def test_scores_of_a_run_that_was_killed_in_an_audit_depend_on_the_next_audit(
    model_folder: str, many_rows: str, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_each_step(monkeypatch)
    compare, killed, again = Audit._compare, tmp_path / "killed", tmp_path / "again"

    def snapshot(self: Any, chosen: Any) -> Any:
        if cache.exists() and len(files(cache)) > 6 and not killed.exists():
            shutil.copytree(cache, killed)
        return compare(self, chosen)

    with monkeypatch.context() as patch:
        patch.setattr(Audit, "_compare", snapshot)
        dpo_cache.precompute(model_folder, many_rows, cache, audit=EVERY, budget_tokens="64")
    assert not any("/.run-" in name for name in files(cache)), "a run that ends removes its record"
    assert any("/.run-" in name for name in files(killed))
    shutil.copytree(killed, again)
    with monkeypatch.context() as patch:
        plant(patch, lambda completion: True)
        with pytest.raises(ModelError, match=r"The \d+ score files and 0 pair sets .* are withdrawn"):
            dpo_cache.precompute(model_folder, many_rows, killed)
    assert files(killed) == {}
    report = dpo_cache.precompute(model_folder, many_rows, again)
    assert report.already_cached > 0 and report.audited > 0
    assert not any("/.run-" in name for name in files(again))
    check_values(again)


@pytest.mark.parametrize("number", [1, 3, 12, 20])
def test_ctrl_c_in_the_audit_keeps_only_scores_that_were_audited(
    model_folder: str, many_rows: str, cache: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_each_step(monkeypatch)
    run, keys = Audit._run_own, list[bytes]()

    def interrupt(self: Audit, entry: Any) -> Any:
        keys.append(entry[0])
        if len(keys) == number:
            raise KeyboardInterrupt
        return run(self, entry)

    monkeypatch.setattr(Audit, "_run_own", interrupt)
    with pytest.raises(KeyboardInterrupt):
        dpo_cache.precompute(model_folder, many_rows, cache, audit=EVERY, budget_tokens="64")
    assert not cache.exists() or not any("/.run-" in name for name in files(cache))
    if number > 9:  # past the first sample
        scores = open_cache(cache).scores(open_cache(cache).references()[0])
        assert len(scores) >= number - 9
        assert scores.contains([*set(keys)]).sum() == len(scores), "each was audited"
        assert scores.contains([keys[number - 1]]).all(), "it was scored: it is audited again, and published"
    else:
        assert not cache.exists() or files(cache) == {}


def test_ctrl_c_while_it_withdraws_is_made_up_for(
    model_folder: str, many_rows: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish_each_step(monkeypatch)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        plant(patch, Late(60))
        patch.setattr(run_record, "_withdraw", interrupt)
        with pytest.raises(KeyboardInterrupt):
            dpo_cache.precompute(model_folder, many_rows, cache, audit=EVERY, budget_tokens="64")
    assert any("/.run-" in name for name in files(cache))
    report = dpo_cache.precompute(model_folder, many_rows, cache, audit=EVERY)
    assert report.already_cached == 0 and report.audited == report.scored_now
    check_values(cache)


def test_rows_that_do_not_fit_are_left_out_and_that_is_logged(
    model_folder: str, many_rows: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_forward, "fits_into_memory", lambda *_: False)
    remarks: list[str] = []
    report = dpo_cache.precompute(model_folder, many_rows, cache, log=remarks.append)
    assert (report.audited, report.audit_largest_gap) == (0, None) and report.audit_too_long >= 8
    assert any("the audit leaves out a completion of row" in remark for remark in remarks)


def test_completions_with_many_logits_are_audited_at_some_tokens(
    model_folder: str, many_rows: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_forward, "most_places", lambda model: 5)
    report = dpo_cache.precompute(model_folder, many_rows, cache)
    assert report.audited >= 8 and report.audited_tokens <= 5 * report.audited


def test_the_command_line_shows_the_audit(
    model_folder: str,
    many_rows: str,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["precompute", str(cache), "--model", model_folder, "--dataset", many_rows]
    arguments += ["--audit", "20", "--verbose"]
    monkeypatch.setattr(sys, "argv", ["dpo-cache", *arguments])
    with pytest.raises(SystemExit) as leaving:
        main()
    assert not leaving.value.code
    assert re.search(
        r"\n +audited +1?\d \(largest gap \d\.\de-\d\d nats a token\)\n", capsys.readouterr().out
    )


def test_noise_on_all_tokens_is_found_by_all_of_them_together(
    tmp_path: Path, many_rows: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16; no token and no completion has a gap beyond rounding by itself."""
    make_llama(initializer_range=0.02).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"dtype": "bfloat16", "attention": "rows", "limit": 8}
    dpo_cache.precompute(tmp_path / "model", many_rows, tmp_path / "honest", **options)
    noise, real = np.random.default_rng(0), runner.score_completions

    def score(*arguments: Any) -> Iterator[Any]:
        for step in real(*arguments):
            for _, scored in step.scores:
                scored.token_logps[:] += noise.normal(0, 0.02, len(scored.token_logps))
            yield step

    monkeypatch.setattr(runner, "score_completions", score)
    with pytest.raises(
        ModelError, match=r"the tokens of all audited completions differ by 0.02 nats \(root mean"
    ):
        dpo_cache.precompute(tmp_path / "model", many_rows, cache, **options)
    assert not cache.exists() or files(cache) == {}


def test_what_was_audited_by_several_workers_adds_up() -> None:
    gaps, logps = np.array([0.1, -0.2, 0.4], np.float32), np.array([-1.0, -2.0, -3.0], np.float32)
    one, other, both = AuditTotals(), AuditTotals(), AuditTotals()
    for totals in (one, both):
        totals.add(gaps, logps)
    for totals in (other, both):
        totals.add(gaps[:1] * 5, logps[:1])
    together = one.plus(other)
    assert together.as_document() == pytest.approx(both.as_document())
    assert together.sums == both.sums
