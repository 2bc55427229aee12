"""The parts of a checkpoint that are saved with its trained language model unchanged, though they were not
loaded: the tensors of its towers, and the files of its processor.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from dpo_cache.errors import ModelError
from dpo_cache.lm.model.architecture import whole_name
from dpo_cache.lm.model.checkpoint_files import INDEX, WHOLE, checkpoint_files, checkpoint_folder
from dpo_cache.lm.model.tensor_names import loaded_names

PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)
SHARD_BYTES = 2**32  # read into memory at once


@dataclass(frozen=True)
class LeftOut:
    """Tensors by the names that they have in the checkpoint's files, and the content of further files.

    The files of the tensors stay open, so that they can be copied even if their folder, an earlier checkpoint
    of the run, is removed.
    """

    tensors: dict[str, Any]  # name -> the open file that has it
    num_bytes: int
    files: dict[str, bytes]

    def add_to(self, folder: Path) -> None:
        """Add them to a folder in which `save_pretrained` has saved the language model."""
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        if not self.tensors:
            return
        index = _index_of(folder)
        for number, shard in enumerate(self._shards(), start=1):
            name = f"model-left-out-{number:05d}.safetensors"
            save_file(shard, folder / name, {"format": "pt"})
            index["weight_map"] |= dict.fromkeys(shard, name)
        index["metadata"]["total_size"] = index["metadata"].get("total_size", 0) + self.num_bytes
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def _shards(self) -> Iterator[dict[str, torch.Tensor]]:
        shard: dict[str, torch.Tensor] = {}
        for name, file in self.tensors.items():
            tensor = file.get_tensor(name)
            if shard and sum(one.nbytes for one in shard.values()) + tensor.nbytes > SHARD_BYTES:
                yield shard
                shard = {}
            shard[name] = tensor
        yield shard


def find_left_out(model: PreTrainedModel, location: str, revision: str | None = None) -> LeftOut | None:
    """The parts of the checkpoint at a folder or Hub id other than the model; None for a plain causal LM.

    None also for a model in memory whose checkpoint is gone, if the model has towers of its own.
    """
    if whole_name(model.config) != type(model).__name__:
        return None
    try:
        folder = checkpoint_folder(location, revision)
        paths = checkpoint_files(
            location, revision=revision, weights_file=getattr(model.config, "transformers_weights", None)
        )
    except ModelError:
        if any(part is None for module in model.modules() for part in module._modules.values()):
            raise
        return None
    files = {name: (folder / name).read_bytes() for name in PROCESSOR_FILES if (folder / name).is_file()}
    opened = [safe_open(path, framework="pt") for path in paths]
    in_files = {name: file for file in opened for name in file.keys()}  # noqa: SIM118  (not a dict)
    state = model.state_dict()
    names = loaded_names(model, state, [*in_files])
    tensors = {name: file for name, file in in_files.items() if names[name] not in state}
    return LeftOut(tensors, sum(_num_bytes(file, name) for name, file in tensors.items()), files)


def _num_bytes(file: Any, name: str) -> int:
    entry = file.get_slice(name)
    bits = re.search(r"\d+", entry.get_dtype())  # F32 or F8_E4M3, for example; BOOL is a byte
    return math.prod(entry.get_shape()) * (int(bits[0]) if bits else 8) // 8


def _index_of(folder: Path) -> dict[str, Any]:
    """The index of the model's files in a folder; a single file gets one, under another name."""
    if (folder / INDEX).is_file():
        return json.loads((folder / INDEX).read_bytes())
    name = "model-language.safetensors"
    (folder / WHOLE).rename(folder / name)
    with safe_open(folder / name, framework="pt") as file:
        names = list(file.keys())
    size = (folder / name).stat().st_size
    return {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(names, name)}
