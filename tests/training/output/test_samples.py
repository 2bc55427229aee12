"""`sample`: what the policy answers at each evaluation."""

import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import dpo_cache
from dpo_cache.lm.generation import write_answers
from dpo_cache.lm.policy import PolicyModel
from dpo_cache.lm.self_check import choose_attention
from dpo_cache.store import open_cache
from dpo_cache.training.output import samples
from dpo_cache.training.output.samples import end_tokens
from tests.conftest import chat_rows, make_llama, make_tokenizer, write_rows
from tests.training.test_loop import comparable, train, weights

SAMPLED = {"eval_pairs": "heldout", "eval_every": 2, "sample": 3, "lr": 1e-2}
LONGEST = 96  # tokens


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    """Of short rows, which bound the answers."""
    folder = tmp_path_factory.mktemp("samples")
    for name, rows in (("pairs", chat_rows(15)), ("heldout", chat_rows(6, seed=9))):
        data = write_rows(folder / f"{name}.jsonl", rows)
        report = dpo_cache.precompute(model_folder, data, folder / "cache", max_length=LONGEST)
        assert report.rows_truncated == 0
    return str(folder / "cache")


def lines(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def distinct_prompts(cache: str, name: str = "heldout") -> list:
    found: dict = {}
    for scored in open_cache(cache).pairs(name):
        found.setdefault(scored.pair.chosen.prompt_ids.tobytes(), scored.pair)
    return list(found.values())


def test_each_evaluation_answers_the_first_distinct_prompts(cache: str, tmp_path: Path) -> None:
    remarks: list[str] = []
    train(cache, tmp_path / "run", **SAMPLED, log=remarks.append)
    found, tokenizer = lines(tmp_path / "run"), make_tokenizer()
    expected = distinct_prompts(cache)[:3]
    assert [(line["step"], line["row"]) for line in found] == [
        (step, pair.row) for step in (0, 2, 4) for pair in expected
    ]
    # every third row repeats a prompt
    assert len({pair.row for pair in expected}) == 3 and expected[-1].row > 2
    for line, pair in zip(found, expected * 3, strict=True):
        assert list(line) == ["step", "row", "prompt", "chosen", "sample", "num_tokens", "finished"]
        assert line["prompt"] == tokenizer.decode(pair.chosen.prompt_ids.tolist()) and line[
            "prompt"
        ].startswith("<|user|>")
        assert line["chosen"] and line["chosen"] == tokenizer.decode(
            pair.chosen.completion_ids.tolist(), skip_special_tokens=True
        )
        assert 0 < line["num_tokens"] <= LONGEST - len(pair.chosen.prompt_ids)
    assert sum(remark.startswith("step 2, sample of row 0: '<|user|>") for remark in remarks) == 1
    assert max(len(remark) for remark in remarks if "sample of row" in remark) < 400


def test_a_sample_is_the_answer_of_the_policy_at_that_step(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", **SAMPLED, seed=5)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(report.model), make_tokenizer()
    prompts = [pair.chosen.prompt_ids for pair in distinct_prompts(cache)[:3]]
    rows = choose_attention(model, "rows", max_length=LONGEST)
    answers = write_answers(
        PolicyModel(model, rows),
        prompts,
        model=model,
        attention=rows,
        max_length=LONGEST,
        end_ids=end_tokens(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        seed=[5, 4],
    )
    for line, answer in zip(lines(tmp_path / "run")[-3:], answers, strict=True):
        assert line["num_tokens"] == len(answer.token_ids) and line["finished"] == answer.is_finished
        assert line["sample"] == tokenizer.decode(answer.token_ids.tolist(), skip_special_tokens=True)


def test_answers_go_no_further_than_the_pairs_do(model_folder: str, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "pairs.jsonl", chat_rows(12))
    dpo_cache.precompute(model_folder, data, tmp_path / "cache", max_length=40)
    model = make_llama()
    with torch.no_grad():
        model.lm_head.weight[make_tokenizer().eos_token_id] = 0  # never the likeliest
    model.save_pretrained(tmp_path / "model")
    train(
        str(tmp_path / "cache"),
        tmp_path / "run",
        eval_fraction=0.5,
        sample=2,
        max_steps=1,
        model=str(tmp_path / "model"),
    )
    found, tokenizer = lines(tmp_path / "run"), make_tokenizer()
    assert any(not line["finished"] for line in found)
    for line in found:
        num_prompt = len(tokenizer(line["prompt"])["input_ids"])
        assert num_prompt + line["num_tokens"] == 40 or (
            line["finished"] and num_prompt + line["num_tokens"] < 40
        )


def test_sampling_changes_nothing_in_the_training(cache: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    train(cache, tmp_path / "plain", **{**SAMPLED, "sample": 0})
    state = torch.get_rng_state()
    train(cache, tmp_path / "sampled", **SAMPLED)
    assert torch.equal(torch.get_rng_state(), state)
    assert comparable(tmp_path / "plain") == comparable(tmp_path / "sampled")
    one, other = weights(tmp_path / "plain" / "model"), weights(tmp_path / "sampled" / "model")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert not (tmp_path / "plain" / "samples.jsonl").exists()


@pytest.mark.rotating(2)
@pytest.mark.parametrize(
    "options",
    [{"lora_r": 4}, {"precision": "bf16-mixed"}, {"gradient_checkpointing": "full"}, {"deterministic": True}],
    ids=str,
)
def test_samples_are_written_however_the_policy_is_trained(cache: str, tmp_path: Path, options: dict) -> None:
    changes = {**SAMPLED, **options, "max_steps": 2}
    train(cache, tmp_path / "plain", **{**changes, "sample": 0})
    train(cache, tmp_path / "sampled", **changes)
    assert comparable(tmp_path / "plain") == comparable(tmp_path / "sampled")
    found = lines(tmp_path / "sampled")
    assert [line["step"] for line in found] == [0] * 3 + [2] * 3
    assert [line["sample"] for line in found[:3]] != [line["sample"] for line in found[3:]]


def test_a_resumed_run_has_the_samples_of_one_that_was_not_stopped(cache: str, tmp_path: Path) -> None:
    train(cache, tmp_path / "whole", **SAMPLED)

    def crash(line: dict) -> None:
        if line["step"] == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        train(cache, tmp_path / "cut", **SAMPLED, save_every=1, on_metrics=crash)
    with open(tmp_path / "cut" / "samples.jsonl", "a") as file:
        file.write('{"step": 3, "row": 0, "sample": "past the checkpoint"}\n{"step": 3, "ro')
    train(cache, tmp_path / "cut", **SAMPLED, save_every=1, resume=True)
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")


def test_fewer_prompts_than_asked_for_is_said(cache: str, tmp_path: Path) -> None:
    remarks: list[str] = []
    train(cache, tmp_path / "run", eval_pairs="heldout", sample=50, max_steps=1, log=remarks.append)
    assert (
        "`sample` 50: the evaluation pairs have 4 distinct prompts shorter than 96 tokens; those are "
        "answered." in remarks
    )
    assert len(lines(tmp_path / "run")) == 8


def test_a_lack_of_memory_costs_the_samples_and_not_the_run(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_out(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(samples, "write_answers", run_out)
    remarks: list[str] = []
    assert train(cache, tmp_path / "run", **SAMPLED, log=remarks.append).finished
    assert not (tmp_path / "run" / "samples.jsonl").exists()
    assert [remark[:6] for remark in remarks if "there is not enough memory to sample" in remark] == [
        "step 0",
        "step 2",
        "step 4",
    ]


def test_another_error_while_sampling_is_not_hidden(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_, **__):
        raise RuntimeError("something else")

    monkeypatch.setattr(samples, "write_answers", fail)
    with pytest.raises(RuntimeError, match="something else"):
        train(cache, tmp_path / "run", **SAMPLED)


def test_the_time_of_sampling_is_in_no_pairs_per_second(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, seconds, num_samplings = samples.Sampler.write, count(), 0

    def slowly(self, step: int) -> None:
        nonlocal seconds, num_samplings
        seconds, num_samplings = count(next(seconds) + 1000), num_samplings + 1
        write(self, step)

    monkeypatch.setattr(samples.Sampler, "write", slowly)
    monkeypatch.setattr(
        "dpo_cache.training.loop.time", SimpleNamespace(perf_counter=lambda: float(next(seconds)))
    )
    train(cache, tmp_path / "run", **{**SAMPLED, "eval_every": 1})
    steps = comparable_steps(tmp_path / "run")
    assert num_samplings >= len(steps) > 1
    assert all(line["num_pairs"] / line["pairs_per_s"] < 1000 for line in steps)


def comparable_steps(output: Path) -> list[dict]:
    return [
        line
        for line in map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]


@pytest.mark.parametrize(
    ("configured", "expected"), [(None, [256]), (7, [7, 256]), ([7, 9], [7, 9, 256]), (256, [256])]
)
def test_an_answer_ends_with_the_tokenizers_or_the_models_end_tokens(
    configured: object, expected: list[int]
) -> None:
    model, tokenizer = make_llama(), make_tokenizer()
    model.generation_config = GenerationConfig(eos_token_id=configured)
    assert tokenizer.eos_token_id == 256
    assert end_tokens(model, tokenizer) == expected


def test_a_prompt_without_room_for_an_answer_is_left_out(cache: str) -> None:
    pairs = list(open_cache(cache).pairs("heldout"))
    lengths = [len(scored.pair.chosen.prompt_ids) for scored in pairs]
    found = samples._distinct_prompts(pairs, 10, max(lengths))
    assert 0 < len(found) < len({scored.pair.chosen.prompt_ids.tobytes() for scored in pairs})
    assert all(len(scored.pair.chosen.prompt_ids) < max(lengths) for scored in found)
    assert np.all(np.diff([scored.pair.row for scored in found]) > 0)
