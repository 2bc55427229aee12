"""TRL 1.16's side of the benchmarks, which run this file with an interpreter that has TRL, not dpo-cache.

    trl_side.py logps MODEL ROWS.jsonl OUT.json    precomputed reference log-probs in nats, with seconds and
                                                   memory
    trl_side.py ids   -     FOLDER     OUT.json    token ids of every case in FOLDER/cases.json, and the
                                                   seconds of tokenizing
    trl_side.py train MODEL ROWS.jsonl OUT.json    {"losses", "grad_norms"} of each step of one epoch, with
                                                   seconds and memory; with a live reference or, with
                                                   --precompute, TRL's own precomputed log-probs

ROWS.jsonl has prompt, chosen and rejected. `rows` are the numbers (from 0) of the lines that TRL keeps, in
its order; no value is rounded. Everything is computed in float32 on the CPU.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", choices=("logps", "train", "ids"))
    parser.add_argument("model", help="a local folder or a Hub id")
    parser.add_argument("rows", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-length", type=int, default=1024, help="longest prompt + answer, in tokens")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--precompute", action="store_true")
    parser.add_argument(
        "--lora-r",
        type=int,
        help="train a LoRA adapter of this rank on all linear layers, with twice the rank as its alpha",
    )
    arguments = parser.parse_args()
    if arguments.mode == "ids":
        arguments.out.write_text(json.dumps(token_ids(arguments.rows)))
        return
    rows = read_rows(arguments.rows)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.mode == "logps":
            found = reference_logps(arguments.model, rows, arguments.max_length, folder)
        else:
            found = train(
                arguments.model,
                rows,
                arguments.max_length,
                folder,
                arguments.lora_r,
                per_device_train_batch_size=arguments.batch_size,
                precompute_ref_log_probs=arguments.precompute,
            )
        arguments.out.write_text(json.dumps(found))


def read_rows(path: Path) -> Dataset:
    """The lines of a JSONL file with their numbers, in memory: for rows from a file, TRL would reuse the
    log-probs of an earlier run.
    """
    with path.open(encoding="utf-8") as lines:
        return Dataset.from_list([{"index": index, **json.loads(line)} for index, line in enumerate(lines)])


def reference_logps(model: str, rows: Dataset, max_length: int, folder: str) -> dict[str, Any]:
    """Summed log-probs of every row that TRL keeps, the seconds of scoring, and the peak memory before and
    during it.
    """
    measured: dict[str, Any] = {}
    score = DPOTrainer._precompute_ref_logps

    def timed(self: DPOTrainer, *arguments: Any) -> Dataset:
        measured["loaded_bytes"] = peak_bytes()
        started = time.perf_counter()
        scored = score(self, *arguments)
        measured["scoring_s"] = time.perf_counter() - started
        measured["peak_bytes"] = peak_bytes()
        return scored

    DPOTrainer._precompute_ref_logps = timed
    scored = make_trainer(model, rows, max_length, folder, precompute_ref_log_probs=True).train_dataset
    columns = {
        "rows": scored["index"][:],
        "chosen": scored["ref_chosen_logps"][:],
        "rejected": scored["ref_rejected_logps"][:],
    }
    return {**columns, **measured}


def peak_bytes() -> int:
    """Peak resident memory of this process so far (Linux)."""
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM:")
    )


def token_ids(folder: Path) -> dict[str, Any]:
    """For each case in the folder's cases.json: ids as TRL's collator truncates them, the position where each
    answer starts, and the seconds of tokenizing.
    """
    found = {}
    for case in json.loads((folder / "cases.json").read_text()):
        measured: dict[str, float] = {}
        prepare = DPOTrainer._prepare_dataset

        def timed(
            self: DPOTrainer, *arguments: Any, prepare: Any = prepare, measured: dict[str, float] = measured
        ) -> Dataset:
            started = time.perf_counter()
            prepared = prepare(self, *arguments)
            measured["elapsed_s"] = time.perf_counter() - started
            return prepared

        DPOTrainer._prepare_dataset = timed
        with tempfile.TemporaryDirectory() as output:
            trainer = make_trainer(
                str(folder / case["model"]),
                read_rows(folder / case["rows"]),
                case["max_length"],
                output,
                truncation_mode=case["truncation"],
            )
        DPOTrainer._prepare_dataset = prepare
        rows = [collated(trainer, row) for row in trainer.train_dataset]
        found[case["name"]] = {**measured, "rows": rows}
    return found


def collated(trainer: DPOTrainer, row: dict[str, Any]) -> dict[str, Any]:
    """Ids, and position of the first answer token, of both sides."""
    batch = trainer.data_collator([row])
    sides = []
    for ids, mask, answer in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        sides.append((ids[mask.bool()].tolist(), int((mask.bool() & ~answer.bool()).sum())))
    return {"index": row["index"], "chosen": sides[0], "rejected": sides[1]}


def train(
    model: str, rows: Dataset, max_length: int, folder: str, lora_r: int | None, **options: Any
) -> dict[str, Any]:
    """Loss and gradient norm (before clipping) of each step; the seconds of the steps, without loading and
    precomputing, and the peak memory.
    """
    trainer = make_trainer(
        model if lora_r is None else with_adapter(model, lora_r), rows, max_length, folder, **options
    )
    started = time.perf_counter()
    trainer.train()
    elapsed_s = time.perf_counter() - started
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "losses": [step["loss"] for step in steps],
        "grad_norms": [step["grad_norm"] for step in steps],
        "train_s": elapsed_s,
        "num_pairs": len(trainer.train_dataset),
        "peak_bytes": peak_bytes(),
    }


def with_adapter(model: str, lora_r: int) -> Any:
    """The model with a new adapter, initialized with seed 0."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(0)
    return get_peft_model(
        loaded,
        LoraConfig(
            r=lora_r,
            lora_alpha=2 * lora_r,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )


def make_trainer(model: Any, rows: Dataset, max_length: int, folder: str, **options: Any) -> DPOTrainer:
    """A trainer that takes the rows in order, 8 per step, without dropout, warm-up or decay."""
    config = DPOConfig(
        output_dir=folder,
        model_init_kwargs={"dtype": "float32"} if isinstance(model, str) else None,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=max_length,
        loss_type="sigmoid",
        beta=0.1,
        train_sampling_strategy="sequential",
        num_train_epochs=1,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        report_to="none",
        save_strategy="no",
        **{"per_device_train_batch_size": 8, **options},
    )
    return DPOTrainer(model, args=config, train_dataset=rows)


if __name__ == "__main__":
    main()
