"""Faults between cache and policy: step zero stops the run or logs a remark, and names the cause."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import dpo_cache
from dpo_cache.errors import StepZeroError, TrainingError
from dpo_cache.store import open_cache
from dpo_cache.training.step import TrainingStep
from dpo_cache.training.step_zero import Expectation, StepZero
from dpo_cache.types import Completion, Score, ScoredPair
from tests.conftest import chat_rows, make_llama, make_tokenizer, naive_token_logps, write_rows
from tests.training.test_loop import train

Change = Callable[[ScoredPair], ScoredPair]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A reference of its own, its cache, and nothing else."""
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    dpo_cache.precompute(
        tmp_path / "model", write_rows(tmp_path / "pairs.jsonl", chat_rows(8)), tmp_path / "cache"
    )
    return tmp_path


def rewrite(place: Path, change: Change) -> None:
    """Put other values into the cached pair set, with all digests in order."""
    cache = open_cache(place / "cache")
    held = cache.pairs("pairs")
    pairs = [change(scored) for scored in held]
    writer = cache.write_pairs("pairs", "train")
    writer.add(pairs)
    writer.finish(
        {key: value for key, value in held.manifest.items() if key not in ("num_pairs", "parts", "format")}
    )


def rescored(place: Path, logps: Callable[[Completion], np.ndarray]) -> None:
    rewrite(
        place,
        lambda scored: ScoredPair(
            scored.pair, Score(logps(scored.pair.chosen)), Score(logps(scored.pair.rejected))
        ),
    )


def stop(place: Path, **options: object) -> str:
    with pytest.raises(StepZeroError) as caught:
        train(str(place / "cache"), place / "run", **options)
    assert not (place / "run").exists(), "a run that fails step zero leaves nothing"
    return str(caught.value)


def of(model: torch.nn.Module) -> Callable[[Completion], np.ndarray]:
    return lambda completion: naive_token_logps(model, completion).float().numpy()


def test_another_checkpoint_in_the_same_place(place: Path) -> None:
    make_llama(seed=5).save_pretrained(place / "model")
    message = stop(place)
    assert (
        "the policy should start as the reference" in message
        and "Likely cause: weights (weights: " in message
    )


def test_values_of_other_weights_under_the_same_identity(place: Path) -> None:
    rescored(place, of(make_llama(seed=5)))
    message = stop(place)
    assert (
        "the policy is the reference, but" in message
        and "Likely cause: weights: all tokens differ by much" in message
    )


def test_values_of_another_dtype_under_the_same_identity(place: Path) -> None:
    coarse = make_llama().to(torch.bfloat16).float()  # weights that went through bfloat16
    rescored(place, of(coarse))
    assert "Likely cause: dtype or quantization: all tokens differ a little" in stop(place)


def test_a_reference_of_another_dtype_is_named_and_has_its_tolerance(place: Path) -> None:
    remarks: list[str] = []
    dpo_cache.precompute(
        place / "model", place / "pairs.jsonl", place / "cache", name="coarse", dtype="bfloat16"
    )
    report = train(str(place / "cache"), place / "run", pairs="coarse", log=remarks.append, max_steps=1)
    assert report.step_zero_gap is not None and report.step_zero_gap > 5e-3
    step_zero = StepZero(Expectation("float32", "bfloat16", True))
    step_zero.check(
        [np.full(4, -9.0, np.float32)] * 4, [Score(np.full(4, -1.0, np.float32))] * 4, [0, 1, 2, 3]
    )
    with pytest.raises(
        StepZeroError, match=r"dtype \(the reference was scored in bfloat16, the policy runs in float32\)"
    ):
        step_zero.conclude()


def test_values_under_another_template(place: Path) -> None:
    # attention mostly to near tokens: the prompt matters most to the first tokens
    model = make_llama(num_hidden_layers=1, initializer_range=0.12)
    model.save_pretrained(place / "model")
    dpo_cache.precompute(place / "model", place / "pairs.jsonl", place / "cache", overwrite=True)

    def elsewhere(completion: Completion) -> np.ndarray:
        exact = naive_token_logps(model, completion).float().numpy()
        # another token before the answer, whose effect fades as in a trained model
        ids = np.concatenate([completion.prompt_ids[:-1], np.array([7], np.uint32)])
        other = naive_token_logps(model, Completion(ids, completion.completion_ids)).float().numpy()
        return np.concatenate([other[:3], exact[3:] + 0.02 * (other[3:] - exact[3:])])

    rescored(place, elsewhere)
    assert "Likely cause: template: the first tokens of the answers differ" in stop(place)


def test_the_template_of_a_named_model_is_compared(place: Path) -> None:
    shutil.copytree(place / "model", place / "other")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(place / "other")
    rescored(place, of(make_llama(seed=5)))
    assert "Likely cause: template (the chat template of " in stop(place, model=str(place / "other"))


def test_sums_over_truncated_answers(place: Path) -> None:
    model = make_llama()
    rows = [
        {
            "prompt_ids": scored.pair.chosen.prompt_ids.tolist(),
            "chosen_ids": scored.pair.chosen.completion_ids.tolist(),
            "rejected_ids": scored.pair.rejected.completion_ids.tolist(),
            "ref_chosen_logps": float(naive_token_logps(model, scored.pair.chosen)[:-2].sum()),
            "ref_rejected_logps": float(naive_token_logps(model, scored.pair.rejected)[:-2].sum()),
        }
        for scored in open_cache(place / "cache").pairs("pairs")
    ]
    data = place / "imported.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dpo_cache.import_pairs(
        place / "cache",
        data,
        reference="elsewhere",
        model=str(place / "model"),
        dtype="float32",
        log=lambda text: None,
    )
    message = stop(place, pairs="imported")
    assert "Likely cause: truncation: the cached sums are of fewer tokens than the answers have" in message
    remarks: list[str] = []
    options = {"pairs": "imported", "step_zero": "warn", "max_steps": 1}
    assert train(str(place / "cache"), place / "run", log=remarks.append, **options).finished
    assert any(
        "the values of the imported reference 'elsewhere' are not those of the policy.\n"
        "Likely cause: truncation" in remark
        for remark in remarks
    )


def test_a_row_of_the_cache_that_was_changed(place: Path) -> None:
    rewrite(
        place,
        lambda scored: (
            ScoredPair(
                scored.pair, scored.ref_chosen, Score(scored.ref_rejected.token_logps + np.float32(0.5))
            )
            if scored.pair.row == 3
            else scored
        ),
    )
    message = stop(place)
    assert (
        "completion of row 3" in message and "Likely cause: cache: only the values of row 3 differ" in message
    )


def test_configurations_that_compute_otherwise(place: Path) -> None:
    config = json.loads((place / "model/config.json").read_text())
    (place / "model/config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    assert "Likely cause: configuration (config.rms_norm_eps: " in stop(place)


def test_an_adapter_that_does_not_start_at_nothing(place: Path) -> None:
    from peft import LoraConfig

    LoraConfig(
        r=2, init_lora_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM"
    ).save_pretrained(place / "lora")
    assert "Likely cause: " in stop(place, peft_config=str(place / "lora/adapter_config.json"))


def test_warn_logs_and_continues_and_off_logs_nothing(place: Path) -> None:
    rescored(place, of(make_llama(seed=5)))
    remarks: list[str] = []
    assert train(
        str(place / "cache"), place / "warned", step_zero="warn", log=remarks.append, max_steps=1
    ).finished
    assert any("beyond rounding" in remark and "Likely cause: weights" in remark for remark in remarks)
    remarks.clear()
    report = train(str(place / "cache"), place / "silent", step_zero="off", log=remarks.append, max_steps=1)
    assert report.step_zero_gap is None and not any("step zero" in remark for remark in remarks)


def test_strict_stops_for_a_model_that_was_named(place: Path) -> None:
    make_llama(seed=5).save_pretrained(place / "other")
    make_tokenizer().save_pretrained(place / "other")
    assert train(str(place / "cache"), place / "run", model=str(place / "other"), max_steps=1).finished
    shutil.rmtree(place / "run")
    assert "weights (weights: " in stop(place, model=str(place / "other"), step_zero="strict")


def test_a_failure_is_found_in_the_first_evaluation_already(place: Path) -> None:
    rescored(place, of(make_llama(seed=5)))
    seen: list[dict] = []
    with pytest.raises(StepZeroError):
        train(str(place / "cache"), place / "run", eval_fraction=0.4, on_metrics=seen.append)
    assert not seen


def test_a_changed_row_is_named_though_the_dtypes_differ(place: Path) -> None:
    step_zero = StepZero(Expectation("float32", "bfloat16", True))
    exact = [np.full(4, -1.0, np.float32)] * 10
    scores = [Score(values) for values in exact]
    scores[3] = Score(np.full(4, -9.0, np.float32))
    step_zero.check(exact, scores, list(range(10)))
    with pytest.raises(StepZeroError, match="Likely cause: cache: only the values of row 3 differ"):
        step_zero.conclude()


def test_training_pairs_are_compared_after_a_large_evaluation(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cache.training.step_zero.MOST_COMPLETIONS", 4)
    data = write_rows(place / "heldout.jsonl", chat_rows(6, seed=9))
    dpo_cache.precompute(place / "model", data, place / "cache")
    rescored(place, of(make_llama(seed=5)))
    init = StepZero.__init__
    monkeypatch.setattr(
        StepZero, "__init__", lambda self, *args, **kwargs: init(self, *args, **{"most": 4, **kwargs})
    )
    numbers: list[int] = []
    begin = StepZero.begin_training
    monkeypatch.setattr(
        StepZero, "begin_training", lambda self: (numbers.append(len(self.compared)), begin(self))
    )
    assert "its log-prob of a completion of row" in stop(place, eval_pairs="heldout")
    assert numbers and numbers[0] >= 4, "the evaluation pairs, which agree"


def test_log_probs_that_are_no_numbers_are_a_gap(place: Path) -> None:
    step_zero = StepZero(Expectation("float32", "float32", True))
    step_zero.check([np.array([np.nan, -1.0], np.float32)], [Score(np.array([-1.0, -1.0], np.float32))], [4])
    with pytest.raises(StepZeroError, match="row 4 is nan"):
        step_zero.conclude()


@pytest.mark.rotating(2)
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_quantized_base_is_the_reference_that_was_quantized_alike(place: Path, quantize: str) -> None:
    data = place / "pairs.jsonl"
    dpo_cache.precompute(
        place / "model", data, place / "cache", name="coarse", quantize=quantize, log=lambda text: None
    )
    remarks: list[str] = []
    options = {
        "pairs": "coarse",
        "quantize": quantize,
        "lora_r": 2,
        "max_steps": 2,
        "lr": 1e-3,
        "save_every": 1,
    }
    report = train(str(place / "cache"), place / "run", log=remarks.append, **options)
    assert report.finished and any("the policy is the reference." in remark for remark in remarks)
    assert report.step_zero_gap is not None and report.step_zero_gap < (1e-3 if quantize == "4bit" else 0.5)


def test_a_quantized_policy_under_a_whole_reference_is_logged(place: Path) -> None:
    remarks: list[str] = []
    options = {"quantize": "4bit", "lora_r": 2, "max_steps": 1}
    assert train(str(place / "cache"), place / "run", log=remarks.append, **options).finished
    assert any("another model than the reference" in remark for remark in remarks)
    shutil.rmtree(place / "run")
    assert "Likely cause: quantization (quantization.bnb_4bit" in stop(place, step_zero="strict", **options)


def test_a_resumed_adapter_over_another_base_is_an_error(place: Path) -> None:
    options = {"lora_r": 2, "max_steps": 3, "lr": 1e-2}
    train(str(place / "cache"), place / "run", should_stop=lambda: True, **options)
    make_llama(seed=5).save_pretrained(place / "model")
    with pytest.raises(
        TrainingError,
        match=r"this run was started with other options:\n  base_weights: [0-9a-f]{64} before, [0-9a-f]{64} now",
    ):
        train(str(place / "cache"), place / "run", resume=True, **options)
    assert (place / "run/checkpoints").exists(), "the checkpoint is kept"


# -- the whole training set --------------------------------------------------------------------------------


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A reference and the cache of a hundred pairs."""
    make_llama().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = write_rows(tmp_path / "pairs.jsonl", chat_rows(100))
    dpo_cache.precompute(tmp_path / "model", data, tmp_path / "cache", audit="off")
    return tmp_path


def damage(place: Path, row: int, nats: float = 30.0) -> None:
    """Add to the cached log-prob of one answer of one row."""

    def change(scored: ScoredPair) -> ScoredPair:
        if scored.pair.row != row:
            return scored
        values = scored.ref_rejected.token_logps.copy()
        return ScoredPair(scored.pair, scored.ref_chosen, Score(values + np.float32(nats / len(values))))

    rewrite(place, change)


@pytest.mark.rotating(2)
@pytest.mark.parametrize("options", [{}, {"lora_r": 2}, {"shuffle": False}, {"eval_fraction": 0.1}])
def test_a_row_beyond_the_first_batch_is_found_before_the_first_update(large: Path, options: dict) -> None:
    damage(large, 60)
    message = stop(large, batch_size=4, max_steps=4, **options)
    assert "completion of row 60" in message and "only the values of row 60 differ" in message


def test_the_base_of_a_resumed_adapter_is_compared_on_the_whole_set(large: Path) -> None:
    options = {"lora_r": 2, "max_steps": 3, "lr": 1e-2, "batch_size": 4}
    train(str(large / "cache"), large / "run", should_stop=lambda: True, **options)
    damage(large, 60)
    config = large / "run/config.json"
    content = json.loads(config.read_text())
    del content["resolved"]["reference_values"]  # as of an earlier version: else other values are refused
    config.write_text(json.dumps(content))
    with pytest.raises(
        StepZeroError, match="with its adapter switched off is the reference, but .* of row 60 "
    ):
        train(str(large / "cache"), large / "run", resume=True, **options)
    assert (large / "run/checkpoints").exists(), "the checkpoint is kept"


def test_an_adapter_that_is_trained_further_is_compared_on_the_whole_set(large: Path) -> None:
    options = {"max_steps": 2, "lr": 1e-2, "batch_size": 4}
    train(str(large / "cache"), large / "first", lora_r=2, **options)
    damage(large, 60)
    message = stop(large, model=str(large / "first/model"), **options)
    assert "with its adapter switched off is the reference" in message and "of row 60" in message


def test_a_loaded_policy_is_compared_on_the_whole_set(large: Path) -> None:
    damage(large, 60)
    model = LlamaForCausalLM.from_pretrained(large / "model")
    message = stop(large, model=model, tokenizer=make_tokenizer(), batch_size=4, max_steps=2)
    assert "completion of row 60" in message


@pytest.mark.rotating(2)
@pytest.mark.parametrize("options", [{}, {"lora_r": 2}])
def test_the_sample_changes_no_bit_of_the_run(large: Path, options: dict) -> None:
    found = []
    for step_zero in ("auto", "off"):
        lines: list[dict] = []
        train(
            str(large / "cache"),
            large / step_zero,
            step_zero=step_zero,
            batch_size=4,
            max_steps=3,
            lr=1e-3,
            on_metrics=lines.append,
            log=lambda text: None,
            **options,
        )
        values = ("loss", "grad_norm", "logps/chosen", "rewards/margins")
        found.append([[line[name] for name in values if name in line] for line in lines])
    assert found[0] == found[1] and len(found[0]) == 3


def test_the_sample_is_small_and_a_dry_run_takes_none(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    compare = TrainingStep.compare

    def count(self: TrainingStep, pairs: list[ScoredPair]) -> None:
        numbers.append(len(pairs))
        compare(self, pairs)

    monkeypatch.setattr(TrainingStep, "compare", count)
    for steps, most in ((2, 17), (60, 33)):
        train(
            str(large / "cache"), large / f"run{steps}", batch_size=4, max_steps=steps, log=lambda text: None
        )
        assert len(numbers) == 1 and most - 3 <= numbers.pop() <= most
    train(str(large / "cache"), large / "dry", batch_size=4, dry_run=True)
    train(str(large / "cache"), large / "off", batch_size=4, max_steps=1, step_zero="off")
    assert not numbers


# -- imported references -----------------------------------------------------------------------------------


def import_values(place: Path, scorer: torch.nn.Module, **options: object) -> None:
    """Log-probs by a model, as another program's."""
    rows = [
        {
            "prompt_ids": scored.pair.chosen.prompt_ids.tolist(),
            "chosen_ids": scored.pair.chosen.completion_ids.tolist(),
            "rejected_ids": scored.pair.rejected.completion_ids.tolist(),
            "ref_chosen_logps": float(naive_token_logps(scorer, scored.pair.chosen).sum()),
            "ref_rejected_logps": float(naive_token_logps(scorer, scored.pair.rejected).sum()),
        }
        for scored in open_cache(place / "cache").pairs("pairs")
    ]
    (place / "imported.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    dpo_cache.import_pairs(
        place / "cache", place / "imported.jsonl", reference="elsewhere", log=lambda text: None, **options
    )


def test_a_gap_to_an_imported_reference_stops_where_the_import_named_the_policy(place: Path) -> None:
    import_values(place, make_llama(seed=5), model=str(place / "model"), dtype="float32")
    expected = "the policy should start as the reference, but its log-prob"
    assert expected in stop(place, pairs="imported")
    assert expected in stop(place, pairs="imported", model=str(place / "model"))
    shutil.copytree(place / "model", place / "copy")
    assert expected in stop(place, pairs="imported", model=str(place / "copy")), "its identity is the same"
    model = LlamaForCausalLM.from_pretrained(place / "copy")
    assert expected in stop(place, pairs="imported", model=model, tokenizer=make_tokenizer())
    assert expected in stop(place, pairs="imported", lora_r=2)
    remarks: list[str] = []
    options = {"pairs": "imported", "step_zero": "warn", "max_steps": 1}
    assert train(str(place / "cache"), place / "warned", log=remarks.append, **options).finished
    assert any("the values of the imported reference 'elsewhere' are not those" in text for text in remarks)


def test_a_gap_to_an_imported_reference_is_logged_where_the_policy_is_another_model(place: Path) -> None:
    make_llama(seed=7).save_pretrained(place / "other")
    make_tokenizer().save_pretrained(place / "other")
    import_values(place, make_llama(seed=5), model=str(place / "model"), dtype="float32")
    options = {"pairs": "imported", "max_steps": 1}
    model = LlamaForCausalLM.from_pretrained(place / "model")
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)  # no longer the named one, though its name is
    for number, other in enumerate(
        ({"model": str(place / "other")}, {"model": model, "tokenizer": make_tokenizer()})
    ):
        remarks: list[str] = []
        given = {**options, **other}
        assert train(str(place / "cache"), place / f"run{number}", log=remarks.append, **given).finished
        assert any(
            "the values of the imported reference 'elsewhere' are not those" in text for text in remarks
        )


def test_values_of_the_named_model_pass(place: Path) -> None:
    import_values(place, make_llama(), model=str(place / "model"), dtype="float32")
    remarks: list[str] = []
    options = {"pairs": "imported", "max_steps": 1}
    assert train(str(place / "cache"), place / "run", log=remarks.append, **options).finished
    assert any(
        "the policy starts as the model of the imported reference 'elsewhere'" in text for text in remarks
    )
