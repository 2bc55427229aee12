"""Whether a checkpoint with towers is saved whole, and identified by its language model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import transformers as hf
from safetensors import safe_open
from safetensors.torch import save_file

from dpo_cache.lm.model.adapter import CheckpointLocation
from dpo_cache.lm.model.checkpoint_files import checkpoint_files
from dpo_cache.lm.model.left_out import find_left_out
from dpo_cache.lm.model.load import load_base, load_config
from dpo_cache.lm.model.tensor_names import find_tensor_names
from dpo_cache.lm.model.towers import loading_class

CPU = torch.device("cpu")


def saved_architectures(folder: str) -> list[str]:
    return json.loads(Path(folder, "config.json").read_text()).get("architectures") or []


def tower_problems(folder: str) -> list[str]:
    """What is wrong with the checkpoint that is saved after training, and with the tensors of an identity."""
    files = checkpoint_files(folder)
    whole = getattr(hf, saved_architectures(folder)[0])
    try:
        whole.from_pretrained(folder)
    except ImportError:  # its tower needs timm
        whole = loading_class(load_config(folder))
    return [*_saving_problems(folder, files, whole), *_identity_problems(folder, files, whole)]


def _saving_problems(folder: str, files: list[Path], whole: type[hf.PreTrainedModel]) -> list[str]:
    """Save what is loaded, with what was left out: the tensors are those of the checkpoint, to the bit."""
    model = load_base(CheckpointLocation(folder, None), dtype=torch.float32, device=CPU)
    left_out, target = find_left_out(model, folder), Path(folder, "saved")
    model.save_pretrained(target)
    if left_out is not None:
        left_out.add_to(target)
    before, after = _tensors(files), _tensors(checkpoint_files(str(target)))
    problems = [f"saved: {sorted(before.keys() ^ after.keys())[0]}"] if before.keys() != after.keys() else []
    problems += [
        f"saved: {name} differs"
        for name in before.keys() & after.keys()
        if not torch.equal(before[name], after[name])
    ]
    _, report = whole.from_pretrained(target, output_loading_info=True)
    problems += [f"saved: {key} {report[key]}" for key in ("missing_keys", "mismatched_keys") if report[key]]
    return problems


@torch.no_grad()
def _identity_problems(folder: str, files: list[Path], whole: type[hf.PreTrainedModel]) -> list[str]:
    """Change all tensors that do not count: the logits stay as they are."""
    unused, stored = find_tensor_names(load_config(folder), files).unused, _tensors(files)
    if not stored.keys() - unused:
        return ["identity: no tensor counts"]
    target, ids = Path(folder, "changed"), torch.arange(3, 60)[None]
    target.mkdir()
    shutil.copy(Path(folder, "config.json"), target)
    changed = {
        name: one + (name in unused) if one.is_floating_point() else one for name, one in stored.items()
    }
    save_file(changed, target / "model.safetensors", {"format": "pt"})
    try:
        one, other = (
            whole.from_pretrained(place).eval()(input_ids=ids, use_cache=False).logits
            for place in (folder, target)
        )
    except AttributeError:  # of Llama 4, see `as_whole`
        return []
    return [] if torch.equal(one, other) else ["identity: a tensor that does not count changes the logits"]


def _tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    found = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found
