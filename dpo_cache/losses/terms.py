"""The losses of a run as the option `loss` names them, the settings that they use, and their papers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from dpo_cache.errors import OptionError
from dpo_cache.losses.entry import Paper
from dpo_cache.losses.table import LOSSES, LossSettings

SETTINGS = {entry.name: entry for entry in fields(LossSettings)}


def loss_terms(entries: Sequence[str]) -> dict[str, float]:
    """`("sigmoid:0.8", "sft:0.2")` as `{"sigmoid": 0.8, "sft": 0.2}`: loss -> weight, 1 where none is given.
    Raises `OptionError`.
    """
    terms: dict[str, float] = {}
    for entry in entries:
        name, _, weight = entry.partition(":")
        if name not in LOSSES:
            hint = "\nRepeat `loss` for a weighted sum, as in `loss` sigmoid:0.8 `loss` sft:0.2."
            raise OptionError(
                f"`loss` {entry}: expected one of {', '.join(LOSSES)}; sigmoid is DPO."
                f"{hint if ',' in entry else ''}"
            )
        if name in terms:
            raise OptionError(f"`loss` {entry}: {name} is given twice.")
        try:
            terms[name] = float(weight or 1)
        except ValueError:
            terms[name] = math.nan
        if not 0 < terms[name] < math.inf:
            raise OptionError(
                f"`loss` {entry}: expected NAME or NAME:WEIGHT with a number above 0, for example {name}:0.8."
            )
    if not terms:
        raise OptionError("`loss` is needed.")
    return terms


def losses_served_by(setting: str) -> list[str]:
    """The losses that a setting changes: it is their parameter, or it changes their inputs or weights."""
    serves = SETTINGS[setting].metadata["serves"]
    return [name for name, loss in LOSSES.items() if (serves(loss) if serves else setting in loss.settings)]


def is_served(setting: str, names: Sequence[str]) -> bool:
    """Return whether a setting has a meaning under a sum of these losses.

    It must serve one of them. A setting that changes the compared inputs must serve each loss that compares.
    """
    idle = set(names) - set(losses_served_by(setting))
    is_parameter = SETTINGS[setting].metadata["serves"] is None
    return len(idle) < len(names) and (is_parameter or not any(LOSSES[name].prefers for name in idle))


def papers_of(config: Mapping[str, Any]) -> list[Paper]:
    """The papers behind the losses of a run and their settings, each once."""
    losses = [LOSSES[name] for name in loss_terms(config["loss"])]
    changed = [name for name, entry in SETTINGS.items() if config[name] != entry.default]
    found = [loss.paper for loss in losses]
    found += [loss.papers[name][0] for loss in losses for name in changed if name in loss.papers]
    found += [SETTINGS[name].metadata["paper"] for name in changed]
    return list(dict.fromkeys(paper for paper in found if paper is not None))
