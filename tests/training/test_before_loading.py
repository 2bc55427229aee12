"""Mistakes that need no weights are found before the weights are loaded."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

import dpo_cache
from dpo_cache.errors import DpoCacheError, ModelError, OptionError, TrainingError
from dpo_cache.lm.model.adapter import CheckpointLocation
from dpo_cache.options.train import TrainOptions
from dpo_cache.training import before_loading, inputs
from dpo_cache.training.before_loading import check_before_loading, check_later_run
from dpo_cache.training.output import disk
from tests.conftest import chat_rows, make_llama, make_tokenizer, write_rows
from tests.families.tiny import make_tiny
from tests.training.test_loop import train


class WeightsWereLoaded(Exception):
    """Raised in place of loading."""


@pytest.fixture(autouse=True)
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise WeightsWereLoaded

    monkeypatch.setattr(inputs, "load_base", refuse)


def peft_file(folder: Path, **fields: object) -> str:
    path = folder / "adapter.json"
    path.write_text(json.dumps({"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **fields}))
    return str(path)


LINEAR = "Its linear layers: down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj."


@pytest.mark.parametrize("targets", ["nosuch", "q_proj,nosuch", "model.layers.9.self_attn.q_proj"])
def test_lora_targets_that_the_model_lacks(cache: str, tmp_path: Path, targets: str) -> None:
    absent = targets.rpartition(",")[2]
    with pytest.raises(OptionError) as caught:
        train(cache, tmp_path / "run", lora_r=2, lora_targets=targets)
    assert str(caught.value) == (
        f"LlamaForCausalLM has no layer called {absent} (`lora_targets`, or target_modules of the adapter's "
        f"config).\n{LINEAR}"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"modules_to_save": ["nope"]}, "no layer called nope .modules_to_save of the adapter's config"),
        ({"target_modules": "nosuch.*"}, "cannot take this adapter: Target modules nosuch.* not found"),
        ({"target_modules": "(("}, "cannot take this adapter"),
        ({"task_type": "SEQ_CLS"}, "task_type SEQ_CLS: the policy is a causal language model"),
        ({"peft_type": "VBLORA", "vector_length": 7}, "cannot take this adapter: .*must be divisible"),
        ({"r": 0}, "cannot take this adapter: .*should be a positive integer"),
    ],
)
def test_adapters_that_the_model_cannot_take(cache: str, tmp_path: Path, fields: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        train(cache, tmp_path / "run", peft_config=peft_file(tmp_path, **fields))


def test_an_adapter_that_needs_values_waits_for_the_weights(cache: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsWereLoaded):  # SHiRA chooses places by the weights' values
        train(cache, tmp_path / "run", peft_config=peft_file(tmp_path, peft_type="SHIRA"))


def test_a_run_without_mistakes_loads_the_weights(cache: str, tmp_path: Path) -> None:
    for options in ({}, {"lora_r": 2}, {"lora_r": 2, "lora_targets": "q_proj,mlp.up_proj"}):
        with pytest.raises(WeightsWereLoaded):
            train(cache, tmp_path / "run", **options)


def test_a_router_loss_of_a_model_without_experts(cache: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="`router_aux_loss_coef` 0.1: LlamaForCausalLM returns no router"):
        train(cache, tmp_path / "run", router_aux_loss_coef=0.1)


def test_samples_of_a_model_that_writes_nothing(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "can_generate", lambda _: False)
    with pytest.raises(TrainingError, match="`sample` 2: LlamaForCausalLM has no way to write answers"):
        train(cache, tmp_path / "run", sample=2, eval_fraction=0.5)


@pytest.mark.parametrize("options", [{}, {"lora_r": 2}, {"lora_r": 2, "merge_adapter": True}])
def test_a_disk_that_is_too_small(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    model = make_llama()
    weights = sum(one.nbytes for one in model.parameters())
    adapter = sum(2 * 4 * sum(one.weight.shape) for one in linear_layers(model))
    needed = adapter if options and "merge_adapter" not in options else weights
    monkeypatch.setattr(disk, "free_bytes", lambda folder: needed - 1)
    monkeypatch.setattr(disk, "shown_bytes", str)
    with pytest.raises(TrainingError, match=f"run: {needed} are needed for the model and its checkpoints"):
        train(cache, tmp_path / "run", **options)
    monkeypatch.setattr(disk, "free_bytes", lambda folder: needed)
    with pytest.raises(WeightsWereLoaded):
        train(cache, tmp_path / "run", **options)


def linear_layers(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [
        one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and name != "lm_head"
    ]


def test_pairs_with_ids_that_the_model_has_no_embeddings_for(cache: str, tmp_path: Path) -> None:
    make_llama(vocab_size=200).save_pretrained(tmp_path / "smaller")
    make_tokenizer().save_pretrained(tmp_path / "smaller")
    with pytest.raises(ModelError, match="holds token id .* but .*smaller has 200 embeddings"):
        train(cache, tmp_path / "run", model=tmp_path / "smaller")


def test_a_merged_adapter_on_a_shared_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = write_rows(tmp_path / "pairs.jsonl", chat_rows(6))
    dpo_cache.precompute(tmp_path / "model", data, tmp_path / "cache")
    with (
        pytest.warns(UserWarning, match="tie_word_embeddings"),
        pytest.raises(OptionError, match="share one"),
    ):
        train(
            str(tmp_path / "cache"),
            tmp_path / "run",
            merge_adapter=True,
            lora_r=2,
            lora_targets="q_proj,embed_tokens",
        )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("later", [False, True])
def test_a_device_that_is_not_there(cache: str, tmp_path: Path, later: bool) -> None:
    options = {"device": "cuda", "output": str(tmp_path / "run"), "cache": cache, "pairs": "pairs"}
    with pytest.raises(OptionError, match="`device` cuda: not available here.\nAvailable: cpu"):
        check_later_run(TrainOptions(**options)) if later else dpo_cache.train(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora_r": 2, "lora_targets": "nosuch"}, "no layer called nosuch"),
        ({"merge_adapter": True}, "`merge_adapter` needs an adapter"),
        ({"router_aux_loss_coef": 0.1}, "LlamaForCausalLM returns no router logits"),
    ],
)
def test_a_run_that_another_process_will_start_is_checked_alike(
    cache: str, tmp_path: Path, options: dict, message: str
) -> None:
    with pytest.raises(DpoCacheError, match=message):
        check_later_run(TrainOptions(cache=cache, output=str(tmp_path / "run"), pairs="pairs", **options))


def test_a_later_run_without_mistakes_passes(cache: str, tmp_path: Path) -> None:
    options = {"lora_r": 2, "lora_targets": "q_proj", "eval_pairs": "heldout"}
    check_later_run(TrainOptions(cache=cache, output=str(tmp_path / "run"), pairs="pairs", **options))
    assert not (tmp_path / "run").exists()


def test_a_model_that_cannot_be_made_empty_is_loaded(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("reads a weight when it is made")

    monkeypatch.setattr(before_loading, "make_empty", fail)
    with pytest.raises(WeightsWereLoaded):
        train(cache, tmp_path / "run", lora_r=2, lora_targets="nosuch")


@pytest.mark.parametrize("family", ["mistral3", "gemma3"])
def test_layers_of_a_checkpoint_with_towers_have_the_paths_of_the_whole(tmp_path: Path, family: str) -> None:
    model = make_tiny(family)
    config = model.config
    config.architectures = [type(model).__name__]  # as it is saved
    for layer, is_there in (
        ("language_model.layers.0.self_attn.q_proj", True),
        ("layers.9.self_attn.q_proj", False),
    ):
        options = TrainOptions(cache="-", output=str(tmp_path / "run"), lora_r=2, lora_targets=layer)
        outcome = (
            nullcontext() if is_there else pytest.raises(OptionError, match="has no layer called layers.9")
        )
        with outcome:
            check_before_loading(
                options,
                config,
                CheckpointLocation(str(tmp_path), None),
                torch.float32,
                is_adapted=True,
                trusted=False,
            )
