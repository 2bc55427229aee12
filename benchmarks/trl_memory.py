"""Peak memory of TRL 1.16's own DPO step in torch's CPU allocator, for `memory_table.py`, which runs this file
with an interpreter that has TRL.

    trl_memory.py MODEL OUT.json    with the repository in PYTHONPATH

It runs `DPOTrainer._compute_loss` and its backward pass on the pair of `memory_table.validate`, in float32,
with a live reference. On a GPU, TRL's head computes only the answers' positions, with kernels that work
inside a tile of logits. Here TRL is made to do the same: its fallback for these kernels is called on a few
rows of a tile at a time, which needs almost no memory.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import trl.kernels.chunked_logprob as kernels
import trl.trainer.utils as trl_utils
from accelerate import Accelerator
from memory_table import VALIDATION
from transformers import AutoModelForCausalLM
from trl import DPOTrainer
from trl_losses import DEFAULTS

from dpo_cache.planning.live_bytes import allocated_peak
from dpo_cache.planning.padded_step import prepare

FEW = 4


def main(location: str, out: Path) -> None:
    trl_utils._use_triton = lambda _: True
    kernels._forward_tile, kernels._backward_tile = (
        by_rows(kernels._forward_tile),
        by_rows(kernels._backward_tile),
    )
    out.write_text(
        json.dumps(
            {"off": step_bytes(location, checkpointing=False), "on": step_bytes(location, checkpointing=True)}
        )
    )


def by_rows(fold: Callable[..., None]) -> Callable[..., None]:
    """The same function on a few rows of the tile at a time; tensor arguments, which have one entry per row,
    are split in the same way.
    """

    def run(tile: torch.Tensor, stride: int, *arguments: Any, **flags: Any) -> None:
        for first in range(0, len(tile), FEW):
            rows = slice(first, first + FEW)
            fold(
                tile[rows],
                stride,
                *(
                    argument[rows] if isinstance(argument, torch.Tensor) else argument
                    for argument in arguments
                ),
                **flags,
            )

    return run


def step_bytes(location: str, *, checkpointing: bool) -> int:
    """Peak bytes of the step, without weights and gradients, which exist before."""
    trainer = DPOTrainer.__new__(DPOTrainer)
    trainer.accelerator, trainer.model, trainer.ref_model = (
        Accelerator(cpu=True),
        load(location),
        load(location).eval(),
    )
    trainer.args = SimpleNamespace(gradient_checkpointing_kwargs={"use_reentrant": False}, discopop_tau=0.05)
    trainer.precompute_ref_logps = False
    for name, value in DEFAULTS.items():
        setattr(trainer, name, value)
    trainer._metrics, trainer._total_train_tokens, trainer._tp_size = {"train": defaultdict(list)}, 0, 1
    prepare(trainer.model, checkpointing=checkpointing)
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    batch = inputs()
    return allocated_peak(lambda: trainer._compute_loss(trainer.model, batch, False).backward())


def load(location: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "mean_logits", "is_top1"))
    return model


def inputs() -> dict[str, torch.Tensor]:
    """The pair as TRL's collator pads it: chosen rows, then rejected ones."""
    completions = VALIDATION.completions()
    rows = [*completions[::2], *completions[1::2]]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(
            [torch.from_numpy(row.sequence_ids.astype("int64")) for row in rows], batch_first=True
        ),
        "attention_mask": pad([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True),
        "completion_mask": pad(
            [(torch.arange(len(row)) >= len(row.prompt_ids)).long() for row in rows], batch_first=True
        ),
    }


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
