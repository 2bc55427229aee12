"""`precompute` with weights that are read layer by layer: the same scores, errors and promises."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpo_cache
from dpo_cache.cli.app import main
from dpo_cache.errors import ModelError, OptionError
from dpo_cache.lm import streaming
from dpo_cache.lm.layerwise import windows
from dpo_cache.lm.layerwise.windows import LayerMajor
from dpo_cache.precomputing import units
from dpo_cache.precomputing.rescore import rescore
from dpo_cache.store import open_cache
from tests.conftest import chat_rows, make_llama, make_tokenizer, write_rows
from tests.families.tiny import make_tiny

NUM_LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model with more layers than two, which fit into memory at once."""
    folder = tmp_path_factory.mktemp("deep")
    make_llama(num_hidden_layers=NUM_LAYERS).to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 300 tokens."""
    real = LayerMajor.__post_init__

    def limited(self: LayerMajor) -> None:
        self.window_tokens = 300
        real(self)

    monkeypatch.setattr(LayerMajor, "__post_init__", limited)


def logps(cache: Path) -> dict[bytes, np.ndarray]:
    found = {}
    for entry in open_cache(str(cache)).pairs("pairs"):
        for side, score in ((entry.pair.chosen, entry.ref_chosen), (entry.pair.rejected, entry.ref_rejected)):
            found[side.sequence_ids.tobytes()] = score.token_logps
    return found


def test_the_scores_are_those_of_a_resident_model(
    folder: str, data_file: str, tmp_path: Path, small_windows: None
) -> None:
    options: dict[str, Any] = {"budget_tokens": "64", "name": "pairs"}
    remarks: list[str] = []
    plain = dpo_cache.precompute(folder, data_file, tmp_path / "plain", **options)
    report = dpo_cache.precompute(
        folder, data_file, tmp_path / "streamed", stream_weights="on", log=remarks.append, **options
    )
    expected, found = logps(tmp_path / "plain"), logps(tmp_path / "streamed")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], values) for key, values in expected.items())
    assert report.reference == plain.reference and report.attention == "forest"
    assert report.model_tokens == plain.model_tokens and report.audited == plain.audited >= 8
    assert (plain.weights_from, report.weights_from) == (None, "disk")
    assert report.weight_readings >= 3 + 2 + -(-report.model_tokens // 256)  # windows of four chunks
    stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    assert report.weight_readings * 0.5 * stored < report.weight_bytes_read < report.weight_readings * stored
    assert len(remarks) == 1
    assert remarks[0].startswith("the weights are read layer by layer, about 6 times from disk, ")


def test_a_dry_run_says_how_often_the_weights_would_be_read(
    folder: str,
    data_file: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = [str(tmp_path / "cache"), "--model", folder, "--dataset", data_file, "--dry-run"]

    def run(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["dpo-cache", "precompute", *arguments, *options])
        with pytest.raises(SystemExit) as leaving:
            main()
        assert not leaving.value.code

    run("--stream-weights", "on")
    shown = capsys.readouterr()
    assert "weights would be read  6 times from disk, " in shown.out
    assert "the weights are read layer by layer, about 6 times from disk, " in shown.err
    run()
    shown = capsys.readouterr()
    assert "layer by layer" not in shown.err and "weights" not in shown.out
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("free_bytes", "place"), [(10**9, None), (10_000, "disk")])
def test_auto_streams_weights_that_are_larger_than_the_free_memory(
    folder: str,
    data_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    free_bytes: int,
    place: str | None,
) -> None:
    monkeypatch.setattr(streaming, "free_bytes", lambda _: free_bytes)
    remarks: list[str] = []
    report = dpo_cache.precompute(folder, data_file, tmp_path / "cache", log=remarks.append)
    assert report.weights_from == place
    assert [remark.split(", and ")[-1].split("; ")[0] for remark in remarks] == (
        [] if place is None else ["10.0 kB are free"]
    )
    # the self-check, the sample's scores and its own forward, one window
    assert report.weight_readings == (0 if place is None else 3 + 2 + 1)
    again = dpo_cache.precompute(folder, data_file, tmp_path / "cache", log=remarks.append)
    assert again.weights_from is None and again.attention is None, "there is nothing to score"


@pytest.mark.filterwarnings("ignore")  # of transformers
def test_a_model_that_cannot_be_taken_apart_is_refused_or_stays_on_the_device(
    data_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, reason = "dory", "its code changes the hidden states before a DoryDecoderLayer"
    torch.manual_seed(0)
    folder = tmp_path / family
    make_tiny(family).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    with pytest.raises(ModelError, match=reason):
        dpo_cache.precompute(str(folder), data_file, tmp_path / "cache", stream_weights="on")
    monkeypatch.setattr(streaming, "free_bytes", lambda _: 10_000)
    remarks: list[str] = []
    report = dpo_cache.precompute(str(folder), data_file, tmp_path / "cache", log=remarks.append)
    assert report.scored_now and report.weights_from is None
    assert any("the weights are kept on the device" in remark and reason in remark for remark in remarks)


def test_a_loaded_model_cannot_be_streamed(data_file: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"tokenizer": make_tokenizer(), "log": lambda _: None}
    with pytest.raises(OptionError, match="stream_weights on: the model is loaded already"):
        dpo_cache.precompute(make_llama(), data_file, tmp_path / "cache", stream_weights="on", **options)
    report = dpo_cache.precompute(
        make_llama(), data_file, tmp_path / "cache", stream_weights="off", **options
    )
    assert report.weights_from is None


def interrupt_after(num_windows: int) -> Callable[..., None]:
    real, done = windows._Window.finish, list[int]()

    def finish(self: Any) -> list[Any]:
        done.append(len(done))
        if len(done) > num_windows:
            raise KeyboardInterrupt
        return real(self)

    return finish


def test_a_killed_run_keeps_the_windows_that_had_ended(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_windows: None
) -> None:
    data_file, cache = write_rows(tmp_path / "many.jsonl", chat_rows(40)), tmp_path / "cache"
    options: dict[str, Any] = {"stream_weights": "on", "budget_tokens": "64", "audit": "off"}
    with monkeypatch.context() as patch:
        # the two of the self-check, and two of the data
        patch.setattr(windows._Window, "finish", interrupt_after(4))
        patch.setattr(units, "score_unit", _score_without_flush)
        patch.setattr("dpo_cache.precomputing.here.score_unit", _score_without_flush)
        with pytest.raises(KeyboardInterrupt):
            dpo_cache.precompute(folder, data_file, cache, **options)
    report = dpo_cache.precompute(folder, data_file, cache, **options)
    assert report.already_cached > 0
    assert report.already_cached + report.scored_now == report.distinct_completions


def _score_without_flush(unit: Any, runner: Any, publish: Any, on_step: Any) -> None:
    """As a kill would leave it: what is not published at the end of a window is lost."""
    waiting = []
    for step in runner.score(unit.completions, rows_of=unit.rows.__getitem__):
        waiting += [(unit.keys[index], score) for index, score in step.scores]
        if not step.is_followed and waiting:
            publish(waiting)
            waiting = []
        on_step(step, len(waiting))


def test_scores_are_published_at_the_end_of_each_window(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_windows: None
) -> None:
    monkeypatch.setattr(units, "FLUSH_S", 0.0)
    data_file = write_rows(tmp_path / "many.jsonl", chat_rows(40))
    published: list[int] = []
    real = units.score_unit

    def counted(unit: Any, runner: Any, publish: Any, on_step: Any) -> None:
        def count(scored: Any) -> None:
            published.append(len(scored))
            publish(scored)

        real(unit, runner, count, on_step)

    monkeypatch.setattr("dpo_cache.precomputing.here.score_unit", counted)
    report = dpo_cache.precompute(
        folder, data_file, tmp_path / "cache", stream_weights="on", budget_tokens="64", audit="off"
    )
    assert len(published) == -(-report.model_tokens // 256) and sum(published) == report.scored_now


def test_log_probs_that_are_no_numbers_name_their_rows(
    folder: str, data_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpo_cache.lm import runner

    real = runner.score_layer_major

    def poisoned(model: Any, completions: Any, *rest: Any) -> Any:
        for step in real(model, completions, *rest):
            if step.scores:
                step.scores[0][1].token_logps[0] = np.nan
            yield step

    monkeypatch.setattr(runner, "score_layer_major", poisoned)
    with pytest.raises(
        ModelError, match="gives a log-prob that is NaN or infinite for row .* the same chunk"
    ):
        dpo_cache.precompute(folder, data_file, tmp_path / "cache", stream_weights="on", audit="off")


def test_verify_streams_the_weights_of_a_model_that_does_not_fit(
    folder: str, data_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, remarks = tmp_path / "cache", list[str]()
    dpo_cache.precompute(folder, data_file, cache)
    monkeypatch.setattr(streaming, "free_bytes", lambda _: 10_000)
    (report,) = rescore(cache, folder, 6, log=remarks.append)
    assert report.agrees and report.completions == 6
    assert len(remarks) == 1 and remarks[0].endswith("; they are read layer by layer.")


def test_how_often_is_not_known_of_a_stream_of_rows(folder: str, data_file: str, tmp_path: Path) -> None:
    remarks: list[str] = []
    report = dpo_cache.precompute(
        folder, data_file, tmp_path / "cache", streaming=True, stream_weights="on", log=remarks.append
    )
    assert "the weights are read layer by layer, once for each window of chunks." in remarks
    assert report.weights_from == "disk" and report.weight_readings >= 6
