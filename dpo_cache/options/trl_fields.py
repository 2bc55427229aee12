"""Every field of TRL 1.16's `DPOConfig` and `ModelConfig`, with its counterpart here.

`trl_config.py` reads the table to translate a file, and docs/coming-from-trl.md shows it.
`tests/options/test_trl_fields.py` compares names and defaults with TRL's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrlField:
    """A field of TRL: its default there, what stands for it here, and other values that mean the default.

    `equal` is an option of `train`, or several with commas; empty where there is none. `note` completes the
    sentence in the docs: how values translate, or why there is no option.
    """

    default: Any
    equal: str = ""
    note: str = ""
    also: tuple[Any, ...] = ()


def equal(options: str, default: Any, note: str = "", also: tuple[Any, ...] = ()) -> TrlField:
    """A field with an option of `train` that has the same meaning."""
    return TrlField(default, options, note, also)


def without(default: Any, note: str, also: tuple[Any, ...] = ()) -> TrlField:
    """A field without an option of `train`."""
    return TrlField(default, "", note, also)


PRECOMPUTE = "an option of `precompute`: pairs are tokenized and cut once"
NO_PADDING = "batches are forests of tokens, without padding"
NO_LOADER = "batches are read from the cache, without a data loader"
EVERY_STEP = "each step is a line of metrics.jsonl"
NO_UPLOAD = "nothing is uploaded; `model/` is a folder for `hf upload`"
DDP = "`--parallel ddp` chooses it"
ACCELERATOR = {
    "split_batches": False, "dispatch_batches": None, "even_batches": True, "use_seedable_sampler": True,
    "non_blocking": False, "gradient_accumulation_kwargs": None,
}  # fmt: skip

LOSS_FIELDS = {
    "loss_type": equal("loss", ["sigmoid"], "`ipo` is `ipo_norm` here, the others keep their names"),
    "loss_weights": equal("loss", None, "as in `--loss sigmoid:0.8 --loss sft:0.2`"),
    "beta": equal("beta", 0.1),
    "label_smoothing": equal(
        "label_smoothing", 0.0, "TRL ignores it under `sigmoid`, so it is left out there"
    ),
    "ld_alpha": equal("ld_alpha", None),
    "f_divergence_type": equal("f_divergence", "reverse_kl"),
    "f_alpha_divergence_coef": equal("f_alpha", 0.5, "under `alpha_divergence`"),
    "use_weighting": equal("wpo", False, "True is `on`"),
    "discopop_tau": equal("discopop_tau", 0.05, "under `discopop`"),
    "router_aux_loss_coef": equal("router_aux_loss_coef", None),
    "precompute_ref_log_probs": without(False, "always: `precompute` does it once, for all runs"),
    "precompute_ref_batch_size": without(None, "`precompute --budget-tokens` is chosen automatically"),
    "sync_ref_model": without(False, "refused: a cache belongs to a reference that does not change"),
    "ref_model_mixup_alpha": without(0.6, "only with `sync_ref_model`"),
    "ref_model_sync_steps": without(512, "only with `sync_ref_model`"),
    "disable_dropout": without(True, "always: the reference was scored without dropout"),
}

DATA_FIELDS = {
    "max_length": without(1024, PRECOMPUTE + " (`--max-length`)"),
    "truncation_mode": without("keep_start", PRECOMPUTE + " (`--truncation`)"),
    "dataset_num_proc": without(None, "`precompute` tokenizes in one process"),
    "pad_token": without(None, NO_PADDING, ("<PAD_TOKEN>",)),
    "padding_free": without(False, "always: " + NO_PADDING),
    "pad_to_multiple_of": without("auto", NO_PADDING, (None,)),
    "dataloader_drop_last": without(False, "the last step of an epoch has the pairs that are left"),
    "dataloader_num_workers": without(0, NO_LOADER),
    "dataloader_pin_memory": without(True, NO_LOADER, (False,)),
    "dataloader_persistent_workers": without(False, NO_LOADER),
    "dataloader_prefetch_factor": without(None, NO_LOADER),
    "dataloader_multiprocessing_context": without(None, NO_LOADER),
    "dataloader_in_order": without(True, NO_LOADER),
    "remove_unused_columns": without(True, NO_LOADER),
    "label_names": without(None, NO_LOADER),
    "train_sampling_strategy": without("random", "`--no-shuffle` keeps the order; no other sampling"),
    "length_column_name": without("length", NO_LOADER),
    "accelerator_config": without(None, "no data loader, and no accelerator", (ACCELERATOR,)),
}

OPTIMIZER_FIELDS = {
    "per_device_train_batch_size": equal("batch_size", 8, "times accumulation steps and processes"),
    "gradient_accumulation_steps": equal("batch_size", 1, "one number: the pairs of an update"),
    "num_train_epochs": equal("epochs", 3.0),
    "max_steps": equal("max_steps", -1, "-1 is none"),
    "learning_rate": equal("lr", 1e-6),
    "lr_scheduler_type": equal(
        "lr_schedule", "linear", "`linear`, `cosine`, `constant`, `constant_with_warmup`"
    ),
    "warmup_steps": equal("warmup_steps, warmup_ratio", 0, "below 1 it is the ratio"),
    "optim": equal("optimizer", "adamw_torch_fused", "the AdamW and Adafactor variants"),
    "weight_decay": equal("weight_decay", 0.0),
    "max_grad_norm": equal("max_grad_norm", 1.0),
    "seed": equal("seed", 42, "the order of pairs differs all the same"),
    "full_determinism": equal("deterministic", False),
    "adam_beta1": without(0.9, "always 0.9"),
    "adam_beta2": without(0.999, "always 0.999"),
    "adam_epsilon": without(1e-8, "always 1e-8"),
    "lr_scheduler_kwargs": without(None, "the schedules take none"),
    "optim_args": without(None, "the optimizers take none"),
    "optim_target_modules": without(None, "no optimizer for some layers only"),
    "data_seed": without(None, "`--seed` is for both"),
    "average_tokens_across_devices": without(True, "the loss is a mean over pairs"),
    "label_smoothing_factor": without(0.0, "smooths cross-entropy, which DPO does not use"),
    "neftune_noise_alpha": without(None, "no noise: the reference was scored without it"),
    "auto_find_batch_size": without(False, "always: after out-of-memory a step is repeated in smaller parts"),
}

MEMORY_FIELDS = {
    "bf16": equal("precision", None, "true is `bf16-mixed`, false `fp32`, absent `auto`"),
    "activation_checkpointing": equal("gradient_checkpointing", None, "true is `full`, false `none`"),
    "gradient_checkpointing": equal("gradient_checkpointing", True, "absent is `auto`"),
    "activation_offloading": equal("place", False, "`inputs=host`"),
    "use_cpu": equal("device", False, "true is `cpu`"),
    "fsdp": equal("parallel", None, "any value is `fsdp`"),
    "fp16": without(False, "float16 needs a loss scale; `--precision bf16-mixed`"),
    "bf16_full_eval": without(False, "evaluation has the run's precision"),
    "fp16_full_eval": without(False, "evaluation has the run's precision"),
    "tf32": without(None, "torch.backends decides"),
    "activation_checkpointing_kwargs": without(None, "never reentrant"),
    "gradient_checkpointing_kwargs": without(None, "never reentrant"),
    "torch_compile": without(False, "not used"),
    "torch_compile_backend": without(None, "not used"),
    "torch_compile_mode": without(None, "not used"),
    "use_liger_kernel": without(False, "the head never builds all logits"),
    "liger_kernel_config": without(None, "the head never builds all logits"),
    "use_cache": without(False, "never in training"),
    "torch_empty_cache_steps": without(None, "not used"),
    "fsdp_config": without(None, "shards are whole decoder layers"),
    "deepspeed": without(None, "`--parallel fsdp` or `--memory small`"),
    "parallelism_config": without(None, "data parallel only"),
    "ddp_find_unused_parameters": without(None, DDP),
    "ddp_bucket_cap_mb": without(None, DDP),
    "ddp_broadcast_buffers": without(None, DDP),
    "ddp_static_graph": without(None, DDP),
    "ddp_backend": without(None, "nccl on CUDA, gloo on the CPU"),
    "ddp_timeout": without(1800, "the launcher's"),
}

RUN_FIELDS = {
    "output_dir": equal("output", None),
    "eval_strategy": equal("eval_every", "no", "with `--eval-pairs` or `--eval-fraction`"),
    "eval_steps": equal("eval_every", None, "steps; below 1 a share of the run"),
    "save_strategy": equal("save_every", "steps", "absent: no checkpoints"),
    "save_steps": equal("save_every", 500, "steps; below 1 a share of the run"),
    "save_total_limit": equal("keep", None),
    "metric_for_best_model": equal(
        "best", None, "`eval_loss`, `eval_rewards/accuracies`, `eval_rewards/margins`"
    ),
    "report_to": equal("log_to", "none", "TensorBoard, W&B, Trackio, MLflow", ([], None, ["none"])),
    "trust_remote_code": equal("trust_remote_code", False, "never from a file: give it again"),
    "model_init_kwargs": without(None, "`--model`, `--precision`, `--quantize`; `precompute --revision`"),
    "load_best_model_at_end": without(False, "`best/` has the best model; with `--patience` so has `model/`"),
    "greater_is_better": without(None, "follows from the measure"),
    "resume_from_checkpoint": without(None, "`dpo-cache train --resume RUN`"),
    "save_only_model": without(False, "checkpoints are for `--resume`; `model/` has the model only"),
    "restore_callback_states_from_checkpoint": without(False, "a run resumes with the same bits"),
    "ignore_data_skip": without(False, "a run resumes at its next pair"),
    "save_on_each_node": without(False, "one process writes"),
    "enable_jit_checkpoint": without(False, "always: SIGTERM saves a checkpoint"),
    "eval_delay": without(0, "evaluation begins before the first step"),
    "eval_on_start": without(False, "always"),
    "per_device_eval_batch_size": without(8, "evaluation fills the token budget"),
    "eval_accumulation_steps": without(None, "evaluation keeps numbers, not logits"),
    "eval_do_concat_batches": without(True, "evaluation keeps numbers, not logits"),
    "eval_use_gather_object": without(False, "evaluation keeps numbers, not logits"),
    "prediction_loss_only": without(False, "evaluation keeps numbers, not logits"),
    "include_for_metrics": without([], "evaluation keeps numbers, not logits"),
    "batch_eval_metrics": without(False, "evaluation keeps numbers, not logits"),
    "logging_strategy": without("steps", EVERY_STEP),
    "logging_steps": without(10, EVERY_STEP),
    "logging_first_step": without(False, EVERY_STEP),
    "logging_nan_inf_filter": without(True, "a loss that is not finite stops the run"),
    "log_on_each_node": without(True, "one process writes"),
    "log_level": without("passive", "`--verbose`"),
    "log_level_replica": without("warning", "one process writes"),
    "include_num_input_tokens_seen": without("no", "not counted", (False,)),
    "disable_tqdm": without(None, "no progress line off a terminal", (False,)),
    "skip_memory_metrics": without(True, "peak memory is in the report"),
    "debug": without("", "not used", ([],)),
    "run_name": without(None, "the tracker's run is named by the folder"),
    "project": without("huggingface", "the tracker's variables, such as WANDB_PROJECT"),
    "trackio_space_id": without(None, "the tracker's variables"),
    "trackio_bucket_id": without(None, "the tracker's variables"),
    "trackio_static_space_id": without(None, "the tracker's variables"),
    "push_to_hub": without(False, NO_UPLOAD),
    "hub_model_id": without(None, NO_UPLOAD),
    "hub_strategy": without("every_save", NO_UPLOAD),
    "hub_token": without(None, NO_UPLOAD, ("<HUB_TOKEN>",)),
    "hub_private_repo": without(None, NO_UPLOAD),
    "hub_always_push": without(False, NO_UPLOAD),
    "hub_revision": without(None, NO_UPLOAD),
    "do_train": without(False, "`dpo-cache train`"),
    "do_eval": without(False, "`dpo-cache eval`"),
    "do_predict": without(False, "`dpo-cache eval`"),
    "local_rank": without(-1, "the launcher's variables", (0,)),
}

# Of TRL's `ModelConfig`, which its script `trl dpo` reads from the same file
MODEL_FIELDS = {
    "model_name_or_path": equal("model", None),
    "use_peft": equal("lora_r", False, "turns the fields `lora_...` on"),
    "lora_r": equal("lora_r", 16),
    "lora_alpha": equal("lora_alpha", 32),
    "lora_target_modules": equal("lora_targets", None, "absent is `all-linear` here, PEFT's choice in TRL"),
    "load_in_8bit": equal("quantize", False, "true is `8bit`"),
    "load_in_4bit": equal("quantize", False, "true is `4bit`"),
    "lora_dropout": without(0.05, "always 0: the reference was scored without dropout"),
    "lora_target_parameters": without(None, "`--peft-config`"),
    "lora_modules_to_save": without(None, "`--peft-config`"),
    "lora_task_type": without("CAUSAL_LM", "always"),
    "use_rslora": without(False, "`--peft-config`"),
    "use_dora": without(False, "`--peft-config`"),
    "model_revision": without("main", "`precompute --revision`"),
    "dtype": without("float32", "`--precision`, and `precompute --dtype`"),
    "attn_implementation": without(None, "a check chooses an attention that is exact"),
    "bnb_4bit_quant_type": without("nf4", "always nf4"),
    "use_bnb_nested_quant": without(False, "not used"),
    "bnb_4bit_quant_storage": without(None, "bfloat16"),
}

PARTS = {
    "Loss and reference": LOSS_FIELDS,
    "Data": DATA_FIELDS,
    "Optimization": OPTIMIZER_FIELDS,
    "Memory, precision and devices": MEMORY_FIELDS,
    "Evaluation, checkpoints and logs": RUN_FIELDS,
}
DPO_CONFIG = {name: field for part in PARTS.values() for name, field in part.items()}
EARLIER = {"warmup_ratio": equal("warmup_ratio", 0.0), "evaluation_strategy": equal("eval_every", "no")}
FIELDS = {**DPO_CONFIG, **MODEL_FIELDS, **EARLIER}
