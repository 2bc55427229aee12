"""The optimizers: AdamW, its state in float32, in bfloat16, or in 8 bits or paged by bitsandbytes; Adafactor.

Bytes of state per parameter: adamw 8; adamw-bf16 4; adamw-8bit 2, and 1/32 for scales; adafactor about 0: a
row and a column of each matrix. Paged state takes as much, in memory that the CUDA driver moves to the host
if the GPU needs the room.

Adafactor is that of transformers with an absolute learning rate, as in trainers based on transformers, so
`lr` means the same as for AdamW; torch's own scales it by each weight's size and by the step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from dpo_cache.errors import OptionError
from dpo_cache.lm.sharded import LocalShard
from dpo_cache.options.train import ON_SHARDS
from dpo_cache.packages import check_bitsandbytes
from dpo_cache.training.optim.slots import Slicing
from dpo_cache.training.optim.streaming import Transfer
from dpo_cache.training.optim.updates import Updater

Groups = list[dict[str, Any]]

# how to slice the optimizers that update values, or blocks of them, independently
SLICINGS = {
    "adamw": Slicing(),
    "adamw-bf16": Slicing(moments=torch.bfloat16, is_for_all=True),
    "adamw-8bit": Slicing(is_for_all=True),
}

# in lower case: parts of the names of parameters that are not decayed
SPARED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def make_optimizer(
    model: PreTrainedModel,
    name: str = "adamw",
    *,
    lr: float,
    weight_decay: float,
    rounding: str = "auto",
    seed: int = 0,
    compute_device: torch.device | None = None,
    transfer: Transfer | None = None,
    shards: Mapping[str, LocalShard] | None = None,
) -> Updater:
    """The optimizer of the trained parameters; weight decay applies to those of `decayed_names`.

    `rounding` is the rounding of updated bfloat16 weights: stochastic (also auto), compensated or nearest;
    other dtypes need none. Parameters are updated where they are, but those on the host pass through
    `compute_device` if it is a GPU, except under Adafactor; `transfer` makes the copies. If the model is
    cut into `shards`, this rank's shards are updated. Raises `OptionError` if the optimizer is not available
    here.
    """
    if shards is not None and name not in ON_SHARDS:
        raise OptionError(f"`optimizer` {name}: it is not tested on shards of weights.")
    _check_available(name, model.device)
    slicing = SLICINGS.get(name)
    device = compute_device if compute_device is not None and slicing else model.device
    trained = [(entry, one) for entry, one in model.named_parameters() if one.requires_grad]
    if shards is not None:
        trained = [(entry, shard.parameter) for entry, shard in shards.items()]
    return Updater(
        trained,
        lambda leaves, names: _build(
            name, _groups(leaves, names, decayed_names(model), weight_decay), lr, device
        ),
        rounding="stochastic" if rounding == "auto" else rounding,
        seed=seed,
        slicing=slicing,
        compute_device=compute_device,
        transfer=transfer,
        first_rows={entry: shard.start for entry, shard in (shards or {}).items()},
    )


def decayed_names(model: torch.nn.Module) -> set[str]:
    """Names of the parameters that are decayed: the same as in transformers, for every family.

    Equals `transformers.Trainer.get_decay_parameter_names(None, model)`. A parameter is exempt by its name
    or its module, not by its number of dimensions: biases of experts are matrices, and the decay rates of
    state space models are vectors.
    """
    norms = (name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm))
    inside = tuple(f"{name}." for name in norms)
    names = [name for name, _ in model.named_parameters()]
    return {name for name in names if not SPARED.search(name.lower()) and not name.startswith(inside)}


def _groups(
    leaves: Iterable[torch.nn.Parameter], names: Iterable[str], decayed: set[str], weight_decay: float
) -> Groups:
    both = list(zip(leaves, names, strict=True))
    groups: Groups = [
        {"params": [leaf for leaf, name in both if name in decayed], "weight_decay": weight_decay},
        {"params": [leaf for leaf, name in both if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _build(name: str, groups: Groups, lr: float, device: torch.device) -> torch.optim.Optimizer:
    if name in ("adamw", "adamw-bf16"):
        return torch.optim.AdamW(groups, lr=lr, fused=device.type in ("cpu", "cuda"))
    if name == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(groups, lr=lr, scale_parameter=False, relative_step=False, warmup_init=False)
    from bitsandbytes import optim  # loads its library of kernels

    kinds = {
        "adamw-8bit": optim.AdamW8bit,
        "adamw-paged": optim.PagedAdamW,
        "adamw-8bit-paged": optim.PagedAdamW8bit,
    }
    return kinds[name](groups, lr=lr)


def _check_available(name: str, device: torch.device) -> None:
    if name in ("adamw", "adamw-bf16", "adafactor"):
        return
    check_bitsandbytes(f"`optimizer` {name}")
    if name.endswith("paged") and device.type != "cuda":
        raise OptionError(
            f"`optimizer` {name}: pages move between a CUDA GPU and its host, and the policy is on "
            f"{device.type}.\n"
            f"Use `optimizer` {name.removesuffix('-paged')}."
        )
