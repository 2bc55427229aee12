"""Models and data sets in place of `trl-internal-testing/NAME`: folders of these names, from rows of our own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import LlamaConfig

from tests.conftest import make_llama, make_tokenizer
from tests.families.tiny import make_tiny

OWNER = "trl-internal-testing"
FAMILIES = {
    "tiny-Cohere2ForCausalLM": "cohere2", "tiny-Glm4MoeForCausalLM": "glm4_moe", "tiny-GptOssForCausalLM": "gpt_oss",
    "tiny-Qwen2ForCausalLM-2.5": "qwen2", "tiny-Qwen3MoeForCausalLM": "qwen3_moe",
    "tiny-NemotronHForCausalLM-nano": "nemotron_h", "tiny-Olmo3ForCausalLM": "olmo3",
    "tiny-Lfm2ForCausalLM": "lfm2", "tiny-Lfm2ForCausalLM-2.5": "lfm2",
}  # fmt: skip
ROWS = {"train": 9, "test": 2}
TASKS = ("Name a colour", "Name a fruit", "Say a number", "Name a river", "Name a planet", "Name a metal", "Say a day",
         "Name a bird", "Name a tool", "Name a tree", "Say a month")  # fmt: skip
REMOTE_CODE = """\
from transformers import LlamaConfig, LlamaForCausalLM


class RemoteConfig(LlamaConfig):
    model_type = "remote"


class RemoteForCausalLM(LlamaForCausalLM):
    config_class = RemoteConfig
"""


def prepare(folder: Path) -> None:
    """Write all of them into `folder`."""
    for name, family in FAMILIES.items():
        make_tiny(family).save_pretrained(folder / OWNER / name)
        make_tokenizer().save_pretrained(folder / OWNER / name)
    _write_remote(folder / OWNER / "tiny-RemoteForCausalLM")
    _write_data(folder / OWNER / "zen", ZEN)
    _write_data(folder / OWNER / "harmony", {"preference": _conversation})
    _write_data(folder / OWNER / "toolcall", {"preference": _tool_call})


def _write_remote(folder: Path) -> None:
    """A model whose class is in its own folder."""
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "remote.py").write_text(REMOTE_CODE)
    config = LlamaConfig.from_pretrained(folder).to_dict()
    config |= {
        "model_type": "remote",
        "architectures": ["RemoteForCausalLM"],
        "auto_map": {"AutoConfig": "remote.RemoteConfig", "AutoModelForCausalLM": "remote.RemoteForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))


def _write_data(folder: Path, configs: dict[str, Callable[[str, int], dict[str, Any]]]) -> None:
    """A folder that `load_dataset` reads by the names of its configs, with the splits train and test."""
    described = []
    for name, row in configs.items():
        files = []
        for split, count in ROWS.items():
            start = 0 if split == "train" else ROWS["train"]
            path = folder / name / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            tasks = TASKS[start : start + count]
            Dataset.from_list([row(task, start + place) for place, task in enumerate(tasks)]).to_parquet(path)
            files.append(f"  - split: {split}\n    path: {name}/{split}.parquet")
        described.append(f"- config_name: {name}\n  data_files:\n" + "\n".join(files))
    (folder / "README.md").write_text("---\nconfigs:\n" + "\n".join(described) + "\n---\n")


def _text(task: str, place: int) -> dict[str, Any]:
    return {"prompt": f"{task}:", "chosen": f" answer {place}.", "rejected": " I would rather not say."}


def _conversation(task: str, place: int) -> dict[str, Any]:
    prompt = [{"role": "user", "content": task}]
    sides = {"chosen": f"Answer {place}.", "rejected": "I would rather not say."}
    return {"prompt": prompt} | {
        side: [{"role": "assistant", "content": content}] for side, content in sides.items()
    }


def _without_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The prompt as the start of both answers."""
    return {side: row["prompt"] + row[side] for side in ("chosen", "rejected")}


def _unpaired(task: str, place: int) -> dict[str, Any]:
    return {"prompt": f"{task}:", "completion": f" answer {place}.", "label": bool(place % 2)}


def _tool_call(task: str, place: int) -> dict[str, Any]:
    tool = {
        "type": "function",
        "function": {
            "name": "look_up",
            "description": "Look something up.",
            "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
        },
    }
    return {**_conversation(task, place), "tools": json.dumps([tool])}


ZEN: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "standard_preference": _text,
    "conversational_preference": _conversation,
    "standard_implicit_prompt_preference": lambda task, place: _without_prompt(_text(task, place)),
    "conversational_implicit_prompt_preference": lambda task, place: _without_prompt(
        _conversation(task, place)
    ),
    "standard_unpaired_preference": _unpaired,
}
