"""Tiny adapters on disk, as PEFT saves them, and copies of them with changes."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpo_cache.lm.model.identity import reference_identity
from dpo_cache.lm.model.load import load_config, load_model
from tests.conftest import make_completions, naive_token_logps

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def save_adapter(
    base: Path, folder: Path, config: PeftConfig | None = None, *, rows: int | None = None, **fields: Any
) -> Path:
    """An adapter with random weights; `rows` resizes the vocabulary of its base first, `fields` are LoRA's."""
    model = AutoModelForCausalLM.from_pretrained(base)
    torch.manual_seed(1)
    if rows is not None:
        model.resize_token_embeddings(rows)
    with _no_warnings():
        adapted = get_peft_model(model, config or LoraConfig(**{**LORA, **fields}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    with _no_warnings():
        adapted.save_pretrained(folder)
    return folder


def edit_config(adapter: Path, folder: Path, **fields: Any) -> Path:
    """A copy of an adapter with other fields in its config."""
    shutil.copytree(adapter, folder)
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


def edit_tensors(adapter: Path, folder: Path, change: Any) -> Path:
    """A copy of an adapter whose tensors are `change(tensors)`."""
    shutil.copytree(adapter, folder)
    save_file(change(load_file(adapter / WEIGHTS)), folder / WEIGHTS)
    return folder


def identity(folder: Path) -> dict[str, Any]:
    return reference_identity(str(folder), load_config(str(folder)), torch.float32)


def logps(folder: Path) -> torch.Tensor:
    """The log-probs of one completion by the loaded checkpoint."""
    with _no_warnings():  # PEFT's, of fields without effect
        model = load_model(str(folder), dtype=torch.float32, device=torch.device("cpu"))
    return naive_token_logps(model, make_completions()[0])


def logps_by_peft(base: Path, adapter: Path, rows: int | None = None) -> torch.Tensor:
    """The same as PEFT's users compute them."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    with _no_warnings():
        adapted = PeftModel.from_pretrained(model, adapter).eval()
    return naive_token_logps(adapted, make_completions()[0])


@contextmanager
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
