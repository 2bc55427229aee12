"""The options of the loss, which `train` and `eval` share, with their checks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import Field, dataclass
from typing import Any, ClassVar

from dpo_cache.errors import OptionError
from dpo_cache.losses.table import LOSSES, LossSettings
from dpo_cache.losses.terms import SETTINGS, is_served, loss_terms, losses_served_by
from dpo_cache.options.base import Options, option


@dataclass(frozen=True, kw_only=True)
class _LossNames(Options):
    loss: tuple[str, ...] = option(
        ("sigmoid",),
        f"{', '.join(LOSSES)}; repeated as NAME:WEIGHT it is a weighted sum. Default: sigmoid (DPO).",
    )


@dataclass(frozen=True, kw_only=True)
class LossOptions(LossSettings, _LossNames):
    """`loss` and the settings of losses."""

    groups: ClassVar[dict[str, str]] = {"loss": "Loss", "beta": "Loss"}

    def check_losses(self) -> None:
        """Raise `OptionError` for a loss or setting that makes no sense, and for a setting that no loss
        uses.
        """
        names = tuple(loss_terms(self.loss))
        for entry in SETTINGS.values():
            self._check_setting(entry, names)
        self._require(
            self.ld_reference or self.ld_alpha is not None,
            "`ld_reference=False` is used only with `ld_alpha`.",
        )
        self._require(
            self.f_alpha == SETTINGS["f_alpha"].default or self.f_divergence == "alpha_divergence",
            "`f_alpha` is used only by `f_divergence` alpha_divergence.",
        )
        self._require(
            not (self.reference_free and self.f_divergence != "reverse_kl"),
            "`reference_free` and `f_divergence`: there is nothing to diverge from.",
        )

    def _check_setting(self, entry: Field[Any], names: Sequence[str]) -> None:
        value, flag = getattr(self, entry.name), f"`{entry.name}`"
        if isinstance(value, float):
            self._require(math.isfinite(value), f"{flag} {value}: expected a finite number.")
        if value != entry.default and not is_served(entry.name, names):
            serving = losses_served_by(entry.name)
            idle = [name for name in names if name not in serving]
            raise OptionError(
                f"{_given(entry, value)} has no meaning under `loss` {', '.join(idle)}.\n"
                f"Leave it out; it is used by {', '.join(serving)}."
            )
        limits = [entry.metadata["limit"], *(LOSSES[name].limits.get(entry.name) for name in names)]
        for limit in limits:
            if limit and value is not None and not limit.allows(value):
                raise OptionError(limit.message.format(flag=flag, value=value))


def _given(entry: Field[Any], value: Any) -> str:
    """The option and its value; a switch that is on has none."""
    if isinstance(value, bool):
        return f"`{entry.name}`" if value else f"`{entry.name}=False`"
    return f"`{entry.name}` {value}"
