"""The fresh folder in which the blocks of a page run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

import dpo_cache
from dpo_cache.progress import bars_hidden
from tests.conftest import make_llama, make_tokenizer

ROOT = Path(dpo_cache.__file__).parents[1]
SHOWN_AS = "/home/me/prefs"  # how pages show the folder
MODELS = ("model", "models/smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct")

# What a page can start with, and the commands that make it; a name needs those before it.
READY: dict[str, list[str]] = {
    "cache": [
        "dpo-cache precompute cache --model model --dataset pairs.jsonl",
        "dpo-cache precompute cache --model model --dataset heldout.jsonl",
    ],
    "run": [
        "dpo-cache train cache --output run --pairs pairs --eval-pairs heldout --lora-r 16 --lr 4e-4 --batch-size 8"
    ],
}

GAIN = 10.0
CHAT_TEMPLATE = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


class Workplace:
    """Makes fresh folders, always at `path`, because a cache records where its model and data are.

    What pages start with is kept in the folder `kept`. `run` runs a command in the current folder.
    """

    def __init__(self, path: Path, kept: Path, run: Callable[[str], None], model: str = ""):
        self.path = path
        self._ready, self._base, self._run = kept / "ready", kept / "base", run
        self._fill_base(model)

    def fresh(self, names: list[str]) -> Path:
        """The folder, with what its page starts with."""
        states = [name for name in READY if name in names or (name == "cache" and "run" in names)]
        start = self._ready / "-".join(states) if states else self._base
        if not start.exists():
            self.fresh(states[:-1])
            self._in_folder(READY[states[-1]])
            _copy(self.path, start)
        _copy(start, self.path)
        return self.path

    def _in_folder(self, commands: list[str]) -> None:
        before = Path.cwd()
        os.chdir(self.path)
        try:
            for command in commands:
                self._run(command)
        finally:
            os.chdir(before)

    def _fill_base(self, model: str) -> None:
        examples = self._base / "examples"
        shutil.copytree(ROOT / "examples", examples, ignore=shutil.ignore_patterns("__pycache__"))
        if model:
            _copy(Path(model), self._base / "model")
        else:
            _save_tiny_model(self._base / "model")
            for name in ("train.jsonl", "heldout.jsonl"):
                _keep_easy_rows(examples / "data" / name)
        for other in MODELS[1:]:
            _copy(self._base / "model", self._base / other)
        shutil.copy(examples / "data" / "train.jsonl", self._base / "pairs.jsonl")
        shutil.copy(examples / "data" / "heldout.jsonl", self._base / "heldout.jsonl")


def _keep_easy_rows(path: Path) -> None:
    """Keep the first row, which pages show, and those with JSON as the chosen answer: the tiny model learns these."""
    first, *others = path.read_text().splitlines(keepends=True)
    easy = [line for line in others if json.loads(line)["chosen"][0]["content"].startswith("{")]
    path.write_text("".join([first, *easy]))


def _save_tiny_model(folder: Path) -> None:
    """A random model with a tokenizer of bytes, and the chat template of the demo's model."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"})
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    model = make_llama(vocab_size=len(tokenizer), max_position_embeddings=4096)
    _make_sensitive(model)
    with bars_hidden("transformers"):
        model.save_pretrained(folder)


def _make_sensitive(model: LlamaForCausalLM) -> None:
    """Scale the weights so that the model computes the same, but a few steps change it like a real model.

    Each weight after a norm is divided by `GAIN`, and the norm's own weight is multiplied by it.
    """
    layers = model.model.layers
    pairs = [(model.model.norm, [model.lm_head])]
    for layer in layers:
        attention, mlp = layer.self_attn, layer.mlp
        pairs.append((layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]))
        pairs.append((layer.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]))
    with torch.no_grad():
        for norm, linears in pairs:
            norm.weight.mul_(GAIN)
            for linear in linears:
                linear.weight.div_(GAIN)


def _copy(source: Path, target: Path) -> None:
    """Copy a folder over another. Files that nothing writes to are linked."""

    def copy_file(original: str, copy: str) -> None:
        if original.endswith(".safetensors") and Path(original).stat().st_dev == target.stat().st_dev:
            os.link(original, copy)
        else:
            shutil.copy2(original, copy)

    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, copy_function=copy_file)
