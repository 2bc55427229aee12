"""A DPOConfig in a file becomes the options of `train`; what has no counterpart is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dpo_cache.errors import OptionError
from dpo_cache.options.run_config import with_config
from dpo_cache.options.train import TrainOptions
from dpo_cache.options.trl_config import options_of_trl


def translated(folder: Path, fields: dict[str, Any] | str, *, num: int = 1, **given: Any) -> tuple[dict, str]:
    """The options, and the remarks in one text."""
    path = folder / ("config.yaml" if isinstance(fields, str) else "config.json")
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    remarks: list[str] = []
    options = options_of_trl(path, given, num, remarks.append)
    TrainOptions(**{**options, "cache": "cache", "output": "run", **given})
    return options, "\n".join(remarks)


CASES = [
    ({"learning_rate": 5e-7}, {"lr": 5e-7}),
    ({"output_dir": "out"}, {"output": "out"}),
    ({"max_steps": 7}, {"max_steps": 7}),
    ({"max_steps": -1}, {"max_steps": None}),
    ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, {"batch_size": 6}),
    ({"loss_type": "ipo"}, {"loss": ("ipo_norm",)}),
    ({"loss_type": ["sigmoid", "sft"]}, {"loss": ("sigmoid:1", "sft:1")}),
    ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.8, 0.2]}, {"loss": ("sigmoid:0.8", "sft:0.2")}),
    ({"loss_type": ["robust"], "label_smoothing": 0.1}, {"loss": ("robust",), "label_smoothing": 0.1}),
    ({"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3}, {"f_alpha": 0.3}),
    ({"f_divergence_type": "js_divergence"}, {"f_divergence": "js_divergence", "f_alpha": None}),
    ({"use_weighting": True}, {"wpo": "on"}),
    ({"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
    ({"warmup_steps": 0.2}, {"warmup_ratio": 0.2}),
    ({"warmup_steps": 5, "max_steps": 20}, {"warmup_steps": 5, "warmup_ratio": None}),
    ({"warmup_steps": 10, "num_train_epochs": 2}, {"warmup_steps": 10, "epochs": 2}),
    ({"warmup_steps": 10, "warmup_ratio": 0.3}, {"warmup_steps": 10, "warmup_ratio": None}),
    ({"lr_scheduler_type": "constant", "warmup_steps": 10}, {"warmup_steps": None, "warmup_ratio": 0.0}),
    ({"warmup_ratio": 0.3}, {"warmup_ratio": 0.3}),
    ({"lr_scheduler_type": "constant", "warmup_steps": 0.2}, {"lr_schedule": "constant", "warmup_ratio": 0.0}),
    ({"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 0.2}, {"warmup_ratio": 0.2}),
    ({"optim": "adamw_bnb_8bit"}, {"optimizer": "adamw-8bit"}),
    ({"bf16": True}, {"precision": "bf16-mixed"}),
    ({"bf16": False}, {"precision": "fp32"}),
    ({}, {"precision": None, "gradient_checkpointing": None}),
    ({"gradient_checkpointing": False}, {"gradient_checkpointing": "none"}),
    ({"activation_checkpointing": True}, {"gradient_checkpointing": "full"}),
    ({"activation_offloading": True}, {"place": "inputs=host"}),
    ({"fsdp": "full_shard"}, {"parallel": "fsdp"}),
    ({"save_strategy": "epoch", "save_total_limit": 2}, {"save_every": "1epoch", "keep": 2}),
    ({"save_strategy": "no", "save_total_limit": 2}, {"save_every": None, "keep": None}),
    ({"report_to": ["wandb"]}, {"log_to": ("wandb",)}),
    ({"model_name_or_path": "some/model"}, {"model": "some/model"}),
    ({"use_peft": True, "lora_target_modules": ["q_proj", "v_proj"]}, {"lora_r": 16, "lora_alpha": 32.0,
                                                                      "lora_targets": "q_proj,v_proj"}),
    ({"lora_r": 4}, {"lora_r": None}),
    ({"use_peft": True, "load_in_4bit": True}, {"quantize": "4bit"}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), CASES, ids=lambda value: str(value)[:40])
def test_fields_become_options(fields: dict, expected: dict, tmp_path: Path) -> None:
    options, remarks = translated(tmp_path, fields)
    assert {name: options.get(name) for name in expected} == expected
    assert "left out" not in remarks


def test_yaml_numbers_without_a_point_are_numbers(tmp_path: Path) -> None:
    options, _ = translated(tmp_path, "learning_rate: 5e-7\nbeta: 1e-1\nmax_steps: 3\n")
    assert (options["lr"], options["beta"], options["max_steps"]) == (5e-7, 0.1, 3)


def test_batches_of_all_processes_are_one_step(tmp_path: Path) -> None:
    options, _ = translated(tmp_path, {"per_device_train_batch_size": 4}, num=8)
    assert options["batch_size"] == 32
    path = tmp_path / "config.json"
    assert with_config({"cache": "c", "trl_config": str(path), "launch": 2})["batch_size"] == 8
    assert with_config({"cache": "c", "trl_config": str(path)}, num_launched=3)["batch_size"] == 12


def test_evaluation_needs_pairs(tmp_path: Path) -> None:
    fields = {"eval_strategy": "steps", "eval_steps": 50, "metric_for_best_model": "eval_rewards/accuracies"}
    options, remarks = translated(tmp_path, fields, eval_pairs="heldout")
    assert (options["eval_every"], options["best"]) == ("50", "accuracy") and "left out" not in remarks
    options, remarks = translated(tmp_path, fields)
    assert "eval_every" not in options and "eval_strategy steps: give `eval_pairs`" in remarks
    options, _ = translated(tmp_path, {**fields, "eval_steps": 0.25}, eval_fraction=0.1)
    assert options["eval_every"] == "0.75epochs"  # a quarter of three epochs
    options, _ = translated(tmp_path, {"eval_strategy": "epoch"}, eval_fraction=0.1)
    assert options["eval_every"] == "1epoch"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"deepspeed": "ds.json"}, "deepspeed ds.json: `--parallel fsdp`"),
        ({"max_length": 512}, "max_length 512: an option of `precompute`"),
        ({"fp16": True}, "fp16 True"),
        ({"adam_beta2": 0.95}, "adam_beta2 0.95: always 0.999"),
        ({"lr_scheduler_type": "polynomial"}, "lr_scheduler_type polynomial: `lr_schedule` has constant, cosine, linear"),
        ({"optim": "lion"}, "optim lion: `optimizer` has"),
        ({"label_smoothing": 0.1}, "label_smoothing 0.1: TRL ignores it under sigmoid"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing 0.1: ipo_norm has no use for it"),
        ({"loss_type": "sft", "beta": 0.5}, "beta 0.5: sft has no use for it"),
        ({"report_to": ["wandb", "clearml"]}, "report_to ['wandb', 'clearml']: `log_to` knows"),
        ({"lora_dropout": 0.1}, "lora_dropout 0.1: always 0"),
        ({"disable_dropout": False}, "disable_dropout False: always"),
        ({"model_init_kwargs": {"a": "x" * 90}}, "model_init_kwargs {'a': 'xxx"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_has_no_counterpart_is_reported(fields: dict, expected: str, tmp_path: Path) -> None:
    _, remarks = translated(tmp_path, fields)
    assert expected in remarks
    (line,) = [line for line in remarks.splitlines() if line.startswith("  ")]
    assert len(line) < 150


def test_defaults_of_trl_are_reported(tmp_path: Path) -> None:
    options, remarks = translated(tmp_path, {"learning_rate": 1e-5}, batch_size=4)
    assert "num_train_epochs 3, warmup_steps 0, seed 42." in remarks and "per_device" not in remarks
    assert (options["epochs"], options["warmup_ratio"], options["seed"]) == (3.0, 0.0, 42)


def test_given_options_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"beta": 0.2, "learning_rate": 1e-5}))
    found = with_config({"cache": "c", "output": "run", "trl_config": path, "beta": 0.5})
    assert found["beta"] == 0.5 and found["lr"] == 1e-5 and "trl_config" not in found


def test_code_of_the_model_needs_the_option_itself(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"trust_remote_code": True}))
    remarks: list[str] = []
    found = with_config({"cache": "c", "output": "run", "trl_config": str(path)}, remarks.append)
    assert not found.get("trust_remote_code") and "give `trust_remote_code` again" in remarks[-1]
    found = with_config({"cache": "c", "output": "run", "trl_config": str(path), "trust_remote_code": True})
    assert found["trust_remote_code"] is True


# -- mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"betta": 0.2}, "has no field betta.\nDid you mean beta?"),
        ({"zzz": 1}, "has no field zzz.\nLeave it out."),
        ({"sync_ref_model": True}, "the reference would change during training"),
        (
            {"loss_type": ["sigmoid"], "loss_weights": [1, 2]},
            "`loss_weights` has 2 values, and `loss_type` 1",
        ),
        ({"loss_type": "unheard"}, "`loss` unheard: expected one of"),
        ({"learning_rate": "fast"}, "learning_rate fast: expected a number"),
        (
            {"loss_type": ["sigmoid", "robust"], "label_smoothing": 0.1},
            "smooths robust in TRL, but not sigmoid",
        ),
        ({"loss_type": 5}, "loss_type 5: expected text, or a list of texts"),
        ({"loss_type": ["sigmoid", 5]}, "expected text, or a list of texts"),
        ({"loss_type": ["sigmoid"], "loss_weights": 0.5}, "loss_weights 0.5: expected a list of numbers"),
        ({"eval_steps": "often"}, "eval_steps often: expected a number"),
        ({"bf16": "yes"}, "bf16 yes: expected true or false"),
        ({"use_peft": 1}, "use_peft 1: expected true or false"),
        ({"output_dir": 5}, "output_dir 5: expected text"),
        ("[1, 2]", "expected fields of a DPOConfig, such as beta: 0.1, found none"),
        ("beta: [", "not readable (not yaml)"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_mistakes_in_the_file(fields: Any, expected: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as raised:
        translated(tmp_path, fields)
    assert expected in str(raised.value) and "`trl_config`" in str(raised.value)


def test_mistakes_about_the_file(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="not readable"):
        options_of_trl(tmp_path / "none.yaml", {}, 1)
    with pytest.raises(OptionError, match="`trl_config` a.yaml and `config` b.json: give one"):
        with_config({"cache": "c", "trl_config": "a.yaml", "config": "b.json"})
    with pytest.raises(OptionError, match="`resume` run and `trl_config` a.yaml"):
        with_config({"resume": "run", "trl_config": "a.yaml"})
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"beta": -1}))
    with pytest.raises(OptionError, match=r"`trl_config` .*config.json: `beta` -1"):
        with_config({"cache": "c", "output": "run", "trl_config": str(path)})
