"""TRL's trainer on a cache has the losses of TRL with a live reference, and loads none."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

import dpo_cache
from dpo_cache.cli.app import app
from dpo_cache.errors import DataError, FormatError, ModelError, NotInCacheError, OptionError, StepZeroError
from tests.conftest import chat_rows

trl = pytest.importorskip("trl", reason="TRL is not installed")

from dpo_cache.integrations.trl import CachedDPOTrainer

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and Trainer's own

STEPS = 5
LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED = {"exo_pair", "robust"}


@pytest.fixture(scope="module")
def cache(model_folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """All rows, scored by the model, as two pair sets."""
    folder = str(tmp_path_factory.mktemp("trl") / "cache")
    rows = Dataset.from_list(chat_rows(24))
    dpo_cache.precompute(model_folder, rows, folder, name="rows", max_length=1024)
    return folder


def rows(first: int = 0, last: int = 12) -> Dataset:
    return Dataset.from_list(chat_rows(24)[first:last])


def config(folder: Path, **changes: Any) -> Any:
    fields = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 5e-3,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False, "save_strategy": "no",
        "gradient_checkpointing": False, "disable_tqdm": True,
    }  # fmt: skip
    return trl.DPOConfig(**{**fields, **changes})


def losses(trainer: Any) -> torch.Tensor:
    """The loss of each step."""
    trainer.train()
    return torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])


def live(folder: Path, model: Any, **given: Any) -> Any:
    changes = given.pop("changes", {})
    return trl.DPOTrainer(model, args=config(folder / "live", **changes), **given)


def cached(folder: Path, model: Any, cache: str, **given: Any) -> Any:
    changes = given.pop("changes", {})
    return CachedDPOTrainer(model, args=config(folder / "cached", **changes), cache=cache, **given)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_is_that_of_a_live_reference(loss: str, model_folder: str, cache: str, tmp_path: Path) -> None:
    changes = {"loss_type": [loss], **({"label_smoothing": 0.1} if loss in SMOOTHED else {})}
    expected = losses(live(tmp_path, model_folder, train_dataset=rows(), changes=changes))
    found = losses(cached(tmp_path, model_folder, cache, train_dataset=rows(), changes=changes))
    assert len(found) == STEPS and (loss == "sft" or expected.std() > 1e-4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 3},
        {"max_length": 40},
        {"max_length": 40, "truncation_mode": "keep_end"},
        {"ld_alpha": 0.3},
        {"f_divergence_type": "forward_kl", "beta": 0.5, "learning_rate": 1e-5},  # its loss is exponential
        {"use_weighting": True},
        {"padding_free": True},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]},
    ],
    ids=str,
)
def test_options_of_trl_count(changes: dict[str, Any], model_folder: str, tmp_path: Path) -> None:
    cache, options = str(tmp_path / "cache"), {}
    if "max_length" in changes:
        options["truncation"] = changes.get("truncation_mode", "keep_start").replace("_", "-")
    dpo_cache.precompute(
        model_folder, rows(), cache, name="rows", max_length=changes.get("max_length", 1024), **options
    )
    expected = losses(live(tmp_path, model_folder, train_dataset=rows(), changes=changes))
    found = losses(cached(tmp_path, model_folder, cache, train_dataset=rows(), changes=changes))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_adapter_and_evaluations(model_folder: str, cache: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    changes = {"eval_strategy": "steps", "eval_steps": 2}
    given: dict[str, Any] = {
        "train_dataset": rows(), "eval_dataset": {"a": rows(12, 18), "b": rows(18, 24)}, "peft_config": lora, "changes": changes,
    }  # fmt: skip
    one, other = live(tmp_path, model_folder, **given), cached(tmp_path, model_folder, cache, **given)
    torch.testing.assert_close(losses(other), losses(one), rtol=1e-5, atol=1e-5)
    for name in ("eval_a_loss", "eval_b_loss"):
        values = [
            torch.tensor([line[name] for line in trainer.state.log_history if name in line])
            for trainer in (one, other)
        ]
        assert len(values[0]) >= 2
        torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)


def test_a_trained_adapter_has_no_copy(model_folder: str, tmp_path: Path) -> None:
    """TRL keeps a copy as the reference; its scores are those of the model with the adapter."""

    def adapted() -> Any:
        torch.manual_seed(1)
        lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(AutoModelForCausalLM.from_pretrained(model_folder), lora)

    adapted().save_pretrained(tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    cache = str(tmp_path / "cache")
    dpo_cache.precompute(str(tmp_path / "adapter"), rows(), cache, name="rows", tokenizer=tokenizer)
    given = {"train_dataset": rows(), "processing_class": tokenizer}
    other = cached(tmp_path, adapted(), cache, **given)
    assert list(other.model.peft_config) == ["default"]
    torch.testing.assert_close(
        losses(other), losses(live(tmp_path, adapted(), **given)), rtol=1e-5, atol=1e-5
    )


def test_a_stream(model_folder: str, cache: str, tmp_path: Path) -> None:
    stream = rows().to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    expected = losses(live(tmp_path, model_folder, train_dataset=stream))
    found = losses(cached(tmp_path, model_folder, cache, train_dataset=stream))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_new_data_set_is_evaluated_after_training(model_folder: str, cache: str, tmp_path: Path) -> None:
    trainer = cached(tmp_path, model_folder, cache, train_dataset=rows())
    trainer.train()
    other = live(tmp_path, model_folder, train_dataset=rows())
    other.train()
    for given in (rows(12, 18), {"a": rows(12, 18), "b": rows(18, 24)}):
        found, expected = trainer.evaluate(given), other.evaluate(given)
        names = [name for name in expected if name.endswith("loss")]
        assert len(names) == (2 if isinstance(given, dict) else 1)
        for name in names:
            assert found[name] == pytest.approx(expected[name], abs=1e-5)


def test_no_reference_is_loaded(
    model_folder: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = PreTrainedModel.from_pretrained.__func__  # type: ignore[attr-defined]

    def count(cls: type, *given: Any, **more: Any) -> Any:
        loaded.append(cls.__name__)
        return load(cls, *given, **more)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(count))
    trainer = cached(tmp_path, model_folder, cache, train_dataset=rows())
    assert loaded == ["LlamaForCausalLM"] and trainer.ref_model is None
    trainer.train()
    assert len(loaded) == 1
    live(tmp_path, model_folder, train_dataset=rows())
    assert len(loaded) == 3  # the check sees a reference


def test_a_changed_value_changes_the_loss(
    model_folder: str, cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_steps": 1, "per_device_train_batch_size": 12}
    expected = losses(cached(tmp_path, model_folder, cache, train_dataset=rows(), changes=changes))
    fetch = dpo_cache.store.ScoreIndex.fetch

    def changed(index: Any, keys: Any) -> Any:
        first, *others = fetch(index, keys)
        return [type(first)(first.token_logps + 0.5), *others]

    monkeypatch.setattr(dpo_cache.store.ScoreIndex, "fetch", changed)
    found = losses(
        cached(tmp_path, model_folder, cache, train_dataset=rows(), changes=changes, step_zero="off")
    )
    assert abs(found - expected).max() > 1e-3


@pytest.mark.parametrize("has_some", [False, True], ids=["new cache", "some rows"])
def test_missing_completions_are_scored_first(
    has_some: bool, model_folder: str, cache: str, tmp_path: Path
) -> None:
    folder = str(tmp_path / "cache")
    if has_some:
        dpo_cache.precompute(model_folder, rows(0, 4), folder, name="rows")
    given = {"train_dataset": rows(), "eval_dataset": rows(12, 18), "score_missing": True}
    trainer = cached(tmp_path, model_folder, folder, **given)
    (reference,) = dpo_cache.open_cache(folder).references()
    assert [reference] == dpo_cache.open_cache(cache).references()
    torch.testing.assert_close(
        losses(trainer), losses(live(tmp_path, model_folder, train_dataset=rows())), rtol=1e-5, atol=1e-5
    )
    again = dpo_cache.precompute(model_folder, rows(0, 18), folder, name="all")
    assert again.scored_now == 0


# -- mistakes ---------------------------------------------------------------------------------------------


def test_rows_that_are_not_cached_are_named(model_folder: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    dpo_cache.precompute(model_folder, rows(0, 4), cache, name="rows")
    with pytest.raises(NotInCacheError, match="rows 4, 5 of the train data set") as raised:
        cached(tmp_path, model_folder, cache, train_dataset=rows(0, 6))
    rows(0, 6).to_json(tmp_path / "more.jsonl")
    command = re.search(r"`dpo-cache (.*) DATA`", str(raised.value))
    assert command
    done = CliRunner().invoke(app, [*shlex.split(command[1]), str(tmp_path / "more.jsonl")])
    assert done.exit_code == 0, done.output
    cached(tmp_path, model_folder, cache, train_dataset=rows(0, 6))


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({"max_length": None}, "--max-length 1000000 --dataset"),
        (
            {"max_length": 40, "truncation_mode": "keep_end"},
            "--max-length 40 --truncation keep-end --dataset",
        ),
    ],
    ids=str,
)
def test_the_command_for_what_is_missing_cuts_as_the_config_does(
    changes: dict[str, Any], shown: str, model_folder: str, tmp_path: Path
) -> None:
    cache = str(tmp_path / "cache")
    dpo_cache.precompute(model_folder, rows(0, 1), cache, name="rows")
    with pytest.raises(NotInCacheError, match=shown):
        cached(tmp_path, model_folder, cache, train_dataset=rows(0, 6), changes=changes)


def test_another_policy_is_refused(model_folder: str, cache: str, tmp_path: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(model_folder)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    given = {"train_dataset": rows(), "processing_class": AutoTokenizer.from_pretrained(model_folder)}
    with pytest.raises(StepZeroError, match="the policy is not the reference"):
        cached(tmp_path, other, cache, **given).train()
    cached(tmp_path, other, cache, step_zero="off", **given).train()


def test_a_reference_is_named_where_there_are_several(model_folder: str, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    command = (
        f"dpo-cache precompute --cache {cache} --model {model_folder} --max-length .* or give .score_missing"
    )
    with pytest.raises(FormatError, match=f"no dpo-cache here .*\n.*{command}"):
        cached(tmp_path, model_folder, cache, train_dataset=rows())
    dpo_cache.open_cache(cache, create=True).publish_format()
    with pytest.raises(NotInCacheError, match=f"no references.\n.*{command}"):
        cached(tmp_path, model_folder, cache, train_dataset=rows())
    first = dpo_cache.precompute(model_folder, rows(), cache, name="rows").reference
    dpo_cache.precompute(model_folder, rows(), cache, name="half", dtype="bfloat16", limit=1)
    with pytest.raises(NotInCacheError, match="2 references"):
        cached(tmp_path, model_folder, cache, train_dataset=rows())
    assert (
        cached(
            tmp_path, model_folder, cache, train_dataset=rows(), reference=first[:8]
        ).train_dataset.num_rows
        == 12
    )


def test_missing_completions_of_a_stream_are_not_scored(
    model_folder: str, cache: str, tmp_path: Path
) -> None:
    with pytest.raises(OptionError, match="`score_missing` and a stream"):
        cached(tmp_path, model_folder, cache, train_dataset=rows().to_iterable_dataset(), score_missing=True)


def test_another_model_does_not_score_what_is_missing(model_folder: str, tmp_path: Path) -> None:
    changed = AutoModelForCausalLM.from_pretrained(model_folder)
    changed.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(tmp_path / "model")
    cache = str(tmp_path / "cache")
    dpo_cache.precompute(str(tmp_path / "model"), rows(0, 4), cache, name="rows")
    with torch.no_grad():
        changed.lm_head.weight.mul_(2)
    changed.save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="has scores of"):
        cached(tmp_path, model_folder, cache, train_dataset=rows(), score_missing=True)


@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
@pytest.mark.parametrize("kind", ["rows", "stream", "several"])
def test_a_data_set_without_rows_is_one_clear_error(
    kind: str, name: str, model_folder: str, cache: str, tmp_path: Path
) -> None:
    empty = rows(0, 0) if kind != "stream" else rows(0, 4).to_iterable_dataset().take(0)
    place = name if kind != "several" else f"{name}['test']"
    given = {"train_dataset": rows(), name: {"test": empty} if kind == "several" else empty}
    with pytest.raises(DataError, match=re.escape(f"{place} has no rows.")):
        cached(tmp_path, model_folder, cache, **given)


def test_a_later_evaluation_set_needs_rows(model_folder: str, cache: str, tmp_path: Path) -> None:
    trainer = cached(tmp_path, model_folder, cache, train_dataset=rows())
    with pytest.raises(DataError, match="eval_dataset has no rows"):
        trainer.evaluate(rows(0, 0))


def test_wrong_arguments(model_folder: str, cache: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`ref_model`"):
        cached(tmp_path, model_folder, cache, train_dataset=rows(), ref_model=model_folder)
    with pytest.raises(OptionError, match="`step_zero` maybe"):
        cached(tmp_path, model_folder, cache, train_dataset=rows(), step_zero="maybe")
