"""What TRL 1.16 refuses, repeats or gets wrong with `precompute_ref_log_probs`, and what `CachedDPOTrainer` does.

Each row of the table in docs/coming-from-trl.md has a test here of the same name, which runs both.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset, load_dataset
from peft import PromptTuningConfig

import dpo_cache
from dpo_cache.errors import OptionError
from tests.conftest import chat_rows

trl = pytest.importorskip("trl", reason="TRL is not installed")

from dpo_cache.integrations.trl import CachedDPOTrainer
from tests.integrations.test_trl import cache, cached, config, losses, rows  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and Trainer's own

PAGE = Path(__file__).parents[2] / "docs" / "coming-from-trl.md"
PRECOMPUTED = {"precompute_ref_log_probs": True, "max_steps": 2}
ROWS: dict[str, Callable[..., None]] = {}


def row(test: Callable[..., None]) -> Callable[..., None]:
    """Decorator: the test of the row with its name."""
    ROWS[test.__name__.removeprefix("test_").replace("_", " ")] = test
    return test


def trl_precomputes(folder: Path, model: Any, **given: Any) -> Any:
    changes = {**PRECOMPUTED, **given.pop("changes", {})}
    return trl.DPOTrainer(model, args=config(folder / "trl", **changes), **given)


def stream(first: int = 0, last: int = 12) -> IterableDataset:
    return rows(first, last).to_iterable_dataset()


@pytest.fixture
def stored_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Dataset]:
    """Reads twelve rows from a file, as scripts do, so that `datasets` knows them again."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in chat_rows(24)[:12]))
    return lambda: load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "read"))


@pytest.fixture
def num_passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many batches TRL ran through the reference."""
    count = [0]
    compute = trl.DPOTrainer.compute_ref_log_probs

    def counted(*given: Any, **more: Any) -> Any:
        count[0] += 1
        return compute(*given, **more)

    monkeypatch.setattr(trl.DPOTrainer, "compute_ref_log_probs", counted)
    yield count


def test_the_page_shows_these_rows() -> None:
    table = PAGE.read_text().split("<!-- limits: begin -->")[1].split("<!-- limits: end -->")[0]
    _, *shown = re.findall(r"^\| (.+?) \|", table, re.M)
    plain = [re.sub(r"[-_]", " ", re.sub(r"[`,]", "", name)).lower() for name in shown]
    assert plain == list(ROWS)


# -- refused by TRL, allowed here -------------------------------------------------------------------------


@row
def test_a_stream_to_train_on(model_folder: str, cache: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not supported with IterableDataset"):
        trl_precomputes(tmp_path, model_folder, train_dataset=stream())
    trainer = cached(tmp_path, model_folder, cache, train_dataset=stream())
    assert torch.isfinite(losses(trainer)).all() and trainer.ref_model is None


@row
def test_a_stream_to_evaluate_on(model_folder: str, cache: str, tmp_path: Path) -> None:
    given = {"train_dataset": rows(), "eval_dataset": stream(12, 18)}
    with pytest.raises(ValueError, match="not supported with IterableDataset"):
        trl_precomputes(tmp_path, model_folder, **given)
    with pytest.raises(ValueError, match="not supported with IterableDataset"):
        trl_precomputes(tmp_path, model_folder, train_dataset=rows()).evaluate(stream(12, 18))
    trainer = cached(tmp_path, model_folder, cache, **given)
    found = [trainer.evaluate(given)["eval_loss"] for given in (None, stream(12, 18), rows(12, 18))]
    assert found == pytest.approx([found[0]] * 3, abs=1e-6)


@row
def test_a_new_data_set_in_evaluate_after_full_training(
    model_folder: str, cache: str, tmp_path: Path
) -> None:
    trainer = trl_precomputes(tmp_path, model_folder, train_dataset=rows())
    trainer.train()
    with pytest.raises(ValueError, match="only available"):
        trainer.evaluate(rows(12, 18))
    trainer = cached(tmp_path, model_folder, cache, train_dataset=rows(), changes=PRECOMPUTED)
    trainer.train()
    live = trl.DPOTrainer(model_folder, args=config(tmp_path / "live", max_steps=2), train_dataset=rows())
    live.train()
    expected = live.evaluate(rows(12, 18))["eval_loss"]
    assert trainer.evaluate(rows(12, 18))["eval_loss"] == pytest.approx(expected, abs=1e-5)


# -- computed again by TRL, looked up here ----------------------------------------------------------------


@row
def test_another_output_dir_or_learning_rate(
    model_folder: str, cache: str, stored_rows: Callable[[], Dataset], num_passes: list[int], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        trl_precomputes(tmp_path / name, model_folder, train_dataset=stored_rows())
    assert num_passes[0] == 2 * 6
    for name in ("one", "two"):
        cached(tmp_path / name, model_folder, cache, train_dataset=stored_rows())
    assert num_passes[0] == 2 * 6


@row
def test_another_order_subset_or_mixture_of_the_rows(
    model_folder: str, cache: str, stored_rows: Callable[[], Dataset], num_passes: list[int], tmp_path: Path
) -> None:
    data = stored_rows()
    versions = [data, data.shuffle(seed=1), data.select(range(6))]
    for one in versions:
        trl_precomputes(tmp_path, model_folder, train_dataset=one)
    assert num_passes[0] == 6 + 6 + 3
    for one in versions:
        cached(tmp_path, model_folder, cache, train_dataset=one)
    assert num_passes[0] == 6 + 6 + 3


@row
def test_fsdp(model_folder: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without several processes: the trainers are told that FSDP is on, and stop where it would begin."""
    from trl.trainer import dpo_trainer

    loaded: list[str] = []
    load, prepare = dpo_trainer.create_model_from_path, trl.DPOTrainer.create_accelerator_and_postprocess

    def count(*given: Any, **more: Any) -> Any:
        loaded.append(given[0])
        return load(*given, **more)

    def with_fsdp(trainer: Any) -> None:
        prepare(trainer)
        trainer.is_fsdp_enabled = True

    class Begun(Exception):
        pass

    def begin(*_: Any) -> None:
        raise Begun

    monkeypatch.setattr(dpo_trainer, "create_model_from_path", count)
    monkeypatch.setattr(dpo_trainer, "prepare_fsdp", begin)
    monkeypatch.setattr(trl.DPOTrainer, "create_accelerator_and_postprocess", with_fsdp)
    with pytest.raises(Begun):  # for its reference
        trl_precomputes(tmp_path, model_folder, train_dataset=rows())
    assert len(loaded) == 2
    trainer = cached(tmp_path, model_folder, cache, train_dataset=rows())
    assert len(loaded) == 3 and trainer.ref_model is None


# -- wrong in TRL, right here -----------------------------------------------------------------------------


def reference_logps(trainer: Any) -> torch.Tensor:
    columns = [trainer.train_dataset[name] for name in ("ref_chosen_logps", "ref_rejected_logps")]
    return torch.tensor([list(map(float, column)) for column in columns])


@row
def test_another_ld_alpha_without_max_length(
    model_folder: str, cache: str, stored_rows: Callable[[], Dataset], tmp_path: Path
) -> None:
    found = []
    for alpha in (None, 0.3):
        changes = {**PRECOMPUTED, "max_length": None, "ld_alpha": alpha}
        given = {"train_dataset": stored_rows(), "changes": changes}
        found.append(
            (
                reference_logps(trl_precomputes(tmp_path, model_folder, **given)),
                reference_logps(cached(tmp_path, model_folder, cache, **given)),
            )
        )
    (theirs, ours), (theirs_weighted, ours_weighted) = found
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-4)
    assert torch.equal(theirs, theirs_weighted)  # those of the first run
    assert (ours_weighted - ours).abs().max() > 10


@row
def test_another_max_length_under_keep_end(
    model_folder: str, stored_rows: Callable[[], Dataset], tmp_path: Path
) -> None:
    found = []
    for length in (40, 20):
        changes = {**PRECOMPUTED, "max_length": length, "truncation_mode": "keep_end"}
        given = {"train_dataset": stored_rows(), "changes": changes}
        own = str(tmp_path / "cache")
        trainer = cached(tmp_path, model_folder, own, score_missing=True, **given)
        found.append(
            (reference_logps(trl_precomputes(tmp_path, model_folder, **given)), reference_logps(trainer))
        )
    (theirs, ours), (theirs_shorter, ours_shorter) = found
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-4)
    assert torch.equal(theirs, theirs_shorter)  # those of the first run
    assert (ours_shorter - ours).abs().max() > 10


@row
def test_a_policy_that_is_not_the_reference(model_folder: str, cache: str, tmp_path: Path) -> None:
    """TRL computes with the policy it has; a cache of another model stops the run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    given = {"train_dataset": rows(), "processing_class": AutoTokenizer.from_pretrained(model_folder)}
    trl_precomputes(tmp_path, other, **given).train()
    with pytest.raises(dpo_cache.StepZeroError, match="the policy is not the reference"):
        cached(tmp_path, other, cache, **given).train()


# -- the same in both -------------------------------------------------------------------------------------


@row
def test_prompt_tuning(model_folder: str, cache: str, tmp_path: Path) -> None:
    """The policy differs from the reference from the start, and the reference is the model without it."""
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    given = {"train_dataset": rows(), "peft_config": prompt, "changes": PRECOMPUTED}
    expected = losses(trl_precomputes(tmp_path, model_folder, **given))
    found = losses(cached(tmp_path, model_folder, cache, **given))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@row
def test_sync_ref_model(model_folder: str, cache: str, tmp_path: Path) -> None:
    given = {"train_dataset": rows(), "changes": {"sync_ref_model": True}}
    with pytest.raises(ValueError, match="assumes a fixed reference model"):
        trl_precomputes(tmp_path, model_folder, **given)
    with pytest.raises(OptionError, match="`sync_ref_model` changes the reference during training"):
        cached(tmp_path, model_folder, cache, **given)


@row
def test_images(model_folder: str, cache: str, tmp_path: Path) -> None:
    data = rows(0, 2).add_column("images", [[], []])
    with pytest.raises(ValueError, match="vision"):
        trl_precomputes(tmp_path, model_folder, train_dataset=data)
    with pytest.raises(OptionError, match="The rows have images"):
        cached(tmp_path, model_folder, cache, train_dataset=data)


# -- allowed by TRL, refused here -------------------------------------------------------------------------


@row
def test_a_ref_model(model_folder: str, cache: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(model_folder)
    trainer = trl_precomputes(tmp_path, model_folder, ref_model=reference, train_dataset=rows())
    assert trainer.ref_model is not None  # in memory while the policy trains
    with pytest.raises(OptionError, match="from `cache`, not from a model"):
        CachedDPOTrainer(
            model_folder, args=config(tmp_path), cache=cache, ref_model=reference, train_dataset=rows()
        )


@row
def test_a_stream_with_score_missing(model_folder: str, cache: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`score_missing` and a stream"):
        cached(tmp_path, model_folder, cache, train_dataset=stream(), score_missing=True)
