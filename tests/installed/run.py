"""Runs the installed package from end to end, in a folder far from the repository: `python run.py [COMMAND...]`.

Makes a tiny random model and a few pairs, then calls the commands as a user would: precompute, train, eval,
export, ls, verify and plan, or only those that are named. Needs only what the package itself requires, and no network.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
TEMPLATE = "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"


def make_model(folder: Path) -> None:
    """Save a tiny Llama of random weights, with a tokenizer that has a token for every byte."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={letter: place for place, letter in enumerate(alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=264, max_position_embeddings=256, **sizes)).save_pretrained(
        folder
    )


def make_pairs(path: Path) -> None:
    """Write ten pairs."""
    rows = [{"prompt": f"{n} and {n}?", "chosen": f" {2 * n}", "rejected": " a number"} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


COMMANDS = (
    ("--help",),
    ("precompute", "cache", "--model", "model", "--dataset", "pairs.jsonl", "--dry-run"),
    ("precompute", "cache", "--model", "model", "--dataset", "pairs.jsonl"),
    ("train", "cache", "--output", "run", "--lora-r", "2", "--batch-size", "4", "--eval-fraction", "0.2"),
    ("eval", "cache", "--model", "run/model", "--output", "scores.jsonl"),
    ("export", "cache", "pairs", "pairs.parquet"),
    ("ls", "cache"),
    ("verify", "cache"),
    ("plan", "--model", "model", "--gpu", "24GiB", "--tflops", "10"),
)  # fmt: skip


def main(*named: str) -> int:
    """Run the commands, or only the named ones; returns 0, or the exit code of the first one that fails."""
    import dpo_cache

    place = Path(dpo_cache.__file__).resolve()
    if Path(sys.prefix).resolve() not in place.parents:
        print(f"dpo_cache is imported from {place}, which is not the environment {sys.prefix}.")
        return 1
    print(f"dpo-cache {metadata.version('dpo-cache')} on Python {sys.version.split()[0]}, in {place.parent}")
    with tempfile.TemporaryDirectory(prefix="dpo-cache-installed-") as folder:
        make_model(Path(folder, "model"))
        make_pairs(Path(folder, "pairs.jsonl"))
        program = str(Path(sys.executable).with_name("dpo-cache"))
        for words in (words for words in COMMANDS if not named or words[0] in named):
            done = subprocess.run([program, *words], cwd=folder, capture_output=True, text=True)
            print(f"  dpo-cache {words[0]}: {'ok' if not done.returncode else done.returncode}")
            if done.returncode:
                print(done.stdout + done.stderr)
                return done.returncode
        scores = Path(folder, "scores.jsonl")
        lines = scores.read_text(encoding="utf-8").splitlines() if not named else []
        if not named and len(lines) != 10:
            print(f"eval wrote {len(lines)} lines for 10 pairs.")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
