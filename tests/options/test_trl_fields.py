"""The table of TRL's fields has the names and defaults of TRL 1.16, and options that exist."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from dpo_cache.losses.table import LOSSES
from dpo_cache.options import trl_config
from dpo_cache.options.train import LR_SCHEDULES, OPTIMIZERS, TRACKERS, TrainOptions
from dpo_cache.options.trl_fields import DPO_CONFIG, EARLIER, FIELDS, MODEL_FIELDS
from tests.options.write_trl_tables import PAGE, with_tables

OPTIONS = {entry.name for entry in dataclasses.fields(TrainOptions)}


def defaults_of(kind: type) -> dict[str, Any]:
    return {
        entry.name: entry.default_factory()
        if entry.default_factory is not dataclasses.MISSING
        else entry.default
        for entry in dataclasses.fields(kind)
    }


def test_the_fields_are_those_of_trl() -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    assert {name: field.default for name, field in DPO_CONFIG.items()} == defaults_of(trl.DPOConfig)
    assert {name: field.default for name, field in MODEL_FIELDS.items()} == defaults_of(trl.ModelConfig)


def test_each_counterpart_is_an_option_of_train() -> None:
    for name, field in FIELDS.items():
        assert not field.equal or {*field.equal.split(", ")} <= {*OPTIONS}, name
        assert field.equal or field.note, name  # a reason where there is no option


def test_the_tables_of_the_docs_are_these() -> None:
    assert PAGE.read_text() == with_tables(PAGE.read_text()), "run `python -m tests.options.write_trl_tables`"


def test_no_field_is_in_two_parts() -> None:
    assert not set(DPO_CONFIG) & set(MODEL_FIELDS) and not set(EARLIER) & set(DPO_CONFIG)


def test_names_of_values_are_those_of_the_options() -> None:
    assert set(trl_config.SCHEDULES.values()) == {"linear", "cosine", "constant"} == set(LR_SCHEDULES)
    assert set(trl_config.OPTIMIZERS.values()) <= set(OPTIMIZERS)
    assert set(trl_config.LOSS_NAMES.values()) <= set(LOSSES)
    assert trl_config.TRACKERS == TRACKERS


def test_names_of_values_are_those_of_trl() -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    from transformers.trainer_utils import SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(trl_config.SCHEDULES) <= {one.value for one in SchedulerType}
    assert set(trl_config.OPTIMIZERS) <= {one.value for one in OptimizerNames} | {"paged_adamw"}


@pytest.mark.filterwarnings("ignore")
def test_a_config_that_trl_wrote_with_its_defaults_leaves_nothing_out(tmp_path: Any) -> None:
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    path = tmp_path / "args.json"
    path.write_text(trl.DPOConfig(str(tmp_path / "run"), use_cpu=True, bf16=False).to_json_string())
    remarks: list[str] = []
    options = trl_config.options_of_trl(path, {}, 1, remarks.append)
    assert remarks == []
    assert set(json.loads(path.read_text())) <= set(FIELDS)
    assert (options["epochs"], options["lr"], options["batch_size"], options["seed"]) == (3.0, 1e-6, 8, 42)
    assert (options["precision"], options["device"], options["warmup_ratio"]) == ("fp32", "cpu", 0.0)
