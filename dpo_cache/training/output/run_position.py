"""The position of a run in its data, as it is stored in a checkpoint's state.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_cache.lm.memory.recompute import MODES
from dpo_cache.training.evaluations import MEASURES


@dataclass(frozen=True)
class RunPosition:
    """The position of a run: steps done, its epoch (from 0), pairs of that epoch already used, and state."""

    step: int = 0
    epoch: int = 0
    pairs_seen: int = 0
    step_memory: dict[str, Any] | None = None  # the way to split steps: another split rounds differently
    best: dict[str, Any] | None = None  # the best evaluation so far, see `Best`


def problem_of(position: RunPosition) -> str | None:
    """A description of the first member of a wrong type; None if there is none."""
    members: list[tuple[str, Any, Callable[[Any], bool]]] = [
        (name, getattr(position, name), _is_count) for name in ("step", "epoch", "pairs_seen")
    ]
    for name, kinds in (("step_memory", STEP_MEMORY), ("best", BEST)):
        found = getattr(position, name)
        if found is not None and not isinstance(found, dict):
            return f"`{name}` is of the wrong kind"
        if found:
            members += [(f"{name}.{member}", found.get(member), is_kind) for member, is_kind in kinds.items()]
    return next(
        (f"`{name}` is of the wrong kind" for name, value, is_kind in members if not is_kind(value)), None
    )


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


STEP_MEMORY: dict[str, Callable[[Any], bool]] = {
    "requested": lambda value: isinstance(value, list),
    "micro_tokens": lambda value: _is_count(value) and value > 0,
    "pair_tokens": lambda value: value is None or (_is_number(value) and value > 0),
    "mode": lambda value: isinstance(value, str) and value in MODES,
}
BEST: dict[str, Callable[[Any], bool]] = {
    "measure": lambda value: isinstance(value, str) and value in MEASURES,
    "step": lambda value: value is None or _is_count(value),
    "value": lambda value: value is None or _is_number(value),
    "num_worse": _is_count,
}
