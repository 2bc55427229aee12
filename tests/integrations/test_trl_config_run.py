"""`train --trl-config` has the losses of TRL's own run of the same DPOConfig."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

import dpo_cache
from tests.conftest import chat_rows

trl = pytest.importorskip("trl", reason="TRL is not installed")


pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and Trainer's own

CONFIGS: list[dict[str, Any]] = [
    {"lr_scheduler_type": "cosine", "warmup_steps": 0.4, "beta": 0.3, "weight_decay": 0.1},
    {"loss_type": ["ipo", "sft"], "loss_weights": [1.0, 0.2], "lr_scheduler_type": "constant", "max_grad_norm": 0.5,
     "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},  # TRL's sft is a mean over a micro-batch
    {"warmup_steps": 4},  # of 6; how many there are follows from the data
]  # fmt: skip


@pytest.mark.parametrize("changes", CONFIGS, ids=["schedule", "losses", "warm-up"])
def test_a_run_from_a_dpo_config_is_that_of_trl(
    changes: dict[str, Any], model_folder: str, tmp_path: Path
) -> None:
    rows = Dataset.from_list(chat_rows(12))
    fields = {
        "output_dir": str(tmp_path / "run"), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2,
        "learning_rate": 5e-3, "num_train_epochs": 2, "use_cpu": True, "bf16": False, "report_to": "none",
        "gradient_checkpointing": False, **changes,
    }  # fmt: skip
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    dpo_cache.precompute(model_folder, rows, tmp_path / "cache", name="rows")
    report = dpo_cache.train(tmp_path / "cache", trl_config=path, shuffle=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = torch.tensor([line["loss"] for line in lines if "loss" in line])

    config = trl.DPOConfig(
        **{**fields, "output_dir": str(tmp_path / "trl")}, logging_steps=1, disable_tqdm=True,
        save_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = trl.DPOTrainer(model_folder, args=config, train_dataset=rows)
    trainer.train()
    expected = torch.tensor([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(found) == len(expected) == report.num_steps
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
