"""The live model compared with the cache: largest and mean gap, and models that are refused."""

from pathlib import Path

import numpy as np
import pytest

import dpo_cache
from dpo_cache.errors import ModelError, NotInCacheError
from dpo_cache.precomputing import rescore as rescoring
from dpo_cache.precomputing.rescore import rescore
from dpo_cache.store import Cache, completion_key, open_cache
from dpo_cache.types import Score, ScoredPair
from tests.conftest import make_llama, make_tokenizer


@pytest.fixture
def cache(model_folder: str, data_file: str, tmp_path: Path) -> str:
    dpo_cache.precompute(model_folder, data_file, tmp_path / "cache")
    return str(tmp_path / "cache")


def test_every_completion_comes_out_again(cache: str, model_folder: str) -> None:
    (report,) = rescore(cache, model_folder, 10_000)
    assert report.completions == 20  # distinct, all there are
    assert report.agrees and 0 <= report.mean_gap <= report.largest_gap <= 1e-4
    assert (report.largest_allowed, report.mean_allowed) == (1e-3, 1e-4)


def test_as_many_as_asked_for_are_drawn_others_by_another_seed(cache: str, model_folder: str) -> None:
    drawn = [rescore(cache, model_folder, 3, seed=seed)[0] for seed in (0, 0, 1)]
    assert [report.completions for report in drawn] == [3, 3, 3]
    assert drawn[0] == drawn[1] and drawn[0].tokens > 0


def test_a_score_that_is_off_is_found(cache: str, model_folder: str) -> None:
    opened = Cache(cache)
    pairs = opened.pairs("pairs")
    first, *rest = pairs
    shifted = ScoredPair(
        first.pair, Score(first.ref_chosen.token_logps + np.float32(0.25)), first.ref_rejected
    )
    writer = opened.write_pairs("pairs", "train")
    writer.add(
        [
            shifted,
            *(
                entry
                for entry in rest
                if completion_key(entry.pair.chosen) != completion_key(first.pair.chosen)
            ),
        ]
    )
    writer.finish(
        {key: value for key, value in pairs.manifest.items() if key not in ("parts", "num_pairs", "format")}
    )
    (report,) = rescore(cache, model_folder, 10_000)
    assert not report.agrees and report.largest_gap == pytest.approx(0.25, abs=1e-3)
    assert report.worst == completion_key(first.pair.chosen).hex()


def test_one_model_may_be_several_references(cache: str, model_folder: str, data_file: str) -> None:
    dpo_cache.precompute(model_folder, data_file, cache, dtype="bfloat16", name="half")
    reports = {report.largest_allowed: report for report in rescore(cache, model_folder, 5)}
    assert set(reports) == {1e-3, 0.5} and all(report.agrees for report in reports.values())


def test_another_model_is_refused_with_the_fields_that_differ(cache: str, tmp_path: Path) -> None:
    make_llama(seed=1, rms_norm_eps=1e-5).save_pretrained(tmp_path / "other")
    make_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError) as caught:
        rescore(cache, str(tmp_path / "other"), 5)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{tmp_path}/other is no reference of {cache}:"
    assert (
        any(line.startswith("    weights: ") for line in lines)
        and "    config.rms_norm_eps: none and 1e-05" in lines
    )


def test_a_cache_without_pair_sets_has_nothing_to_score(tmp_path: Path, model_folder: str) -> None:
    open_cache(tmp_path / "cache", create=True).publish_format()
    with pytest.raises(NotInCacheError, match="only pair sets hold the token ids"):
        rescore(tmp_path / "cache", model_folder, 5)


def test_noise_on_all_tokens_that_no_single_token_shows_is_found(
    data_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16, whose limit for a token is 0.5 nats."""
    make_llama(initializer_range=0.02).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    dpo_cache.precompute(tmp_path / "model", data_file, tmp_path / "cache", dtype="bfloat16", audit="off")
    (honest,) = rescore(tmp_path / "cache", tmp_path / "model", 10_000)
    assert honest.agrees and honest.together == "" and honest.tokens > 100
    noise, real = np.random.default_rng(0), rescoring._score

    def score(*given: object) -> list[Score]:
        found = real(*given)  # type: ignore[arg-type]
        return [Score(one.token_logps + noise.normal(0, 0.02, len(one.token_logps))) for one in found]

    monkeypatch.setattr(rescoring, "_score", score)
    (report,) = rescore(tmp_path / "cache", tmp_path / "model", 10_000)
    assert report.largest_gap < report.largest_allowed and report.mean_gap < report.mean_allowed
    assert not report.agrees and report.together.startswith("0.02 nats (root mean square), where rounding in")
