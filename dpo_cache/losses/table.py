"""The losses that `--loss` takes, and which of them each option serves. Their formulas are in
`reference_losses.py` and `policy_losses.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from dpo_cache.errors import OptionError

MARGIN_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "ipo_norm", "exo_pair", "robust", "discopop")
RATIO_LOSSES = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
SORTED_LOSSES = ("aot", "aot_unpaired")
SFT_LOSSES = ("sft", "sft_norm")
POLICY_LOSSES = ("simpo", "orpo", "cpo", "slic")
LOSSES = (*MARGIN_LOSSES, *RATIO_LOSSES, *SORTED_LOSSES, *SFT_LOSSES, *POLICY_LOSSES)
# Losses that an option has a meaning for, where that is not all of them: without any of these it is refused.
USED_BY = {
    "beta": tuple(name for name in LOSSES if name not in SFT_LOSSES),
    "label_smoothing": ("sigmoid", "exo_pair", "robust", *SORTED_LOSSES, "simpo", "cpo"),
    "discopop_tau": ("discopop",),
    "simpo_gamma": ("simpo",),
    "cpo_alpha": ("cpo",),
    "reference_free": MARGIN_LOSSES,
    "f_divergence": MARGIN_LOSSES,
    "ld_alpha": (*MARGIN_LOSSES, *RATIO_LOSSES, *SORTED_LOSSES),
    "wpo": (*MARGIN_LOSSES, *RATIO_LOSSES),
}
# These change what a loss compares: each loss of a weighted sum must have them, or be plain SFT.
FOR_ALL = ("reference_free", "f_divergence", "ld_alpha", "wpo")


def loss_terms(entries: Sequence[str]) -> dict[str, float]:
    """`("sigmoid:0.8", "sft:0.2")` as `{"sigmoid": 0.8, "sft": 0.2}`: loss -> weight, 1 where none is given.
    Raises `OptionError`.
    """
    terms: dict[str, float] = {}
    for entry in entries:
        name, _, weight = entry.partition(":")
        if name not in LOSSES:
            hint = (
                "\nRepeat --loss for a weighted sum, as in --loss sigmoid:0.8 --loss sft:0.2."
                if "," in entry
                else ""
            )
            raise OptionError(f"--loss {entry}: expected one of {', '.join(LOSSES)}; sigmoid is DPO.{hint}")
        if name in terms:
            raise OptionError(f"--loss {entry}: {name} is given twice.")
        try:
            terms[name] = float(weight or 1)
        except ValueError:
            terms[name] = math.nan
        if not 0 < terms[name] < math.inf:
            raise OptionError(
                f"--loss {entry}: expected NAME or NAME:WEIGHT with a number above 0, for example {name}:0.8."
            )
    if not terms:
        raise OptionError("--loss is needed.")
    return terms


def check_serves(option: str, given: str, names: Sequence[str]) -> None:
    """Raise `OptionError` where an option has no meaning under these losses, and so would be ignored; `given`
    is what the message calls it.
    """
    used_by = USED_BY.get(option, LOSSES)
    idle = [name for name in names if name not in used_by]
    if len(idle) == len(names) or (option in FOR_ALL and not set(idle) <= set(SFT_LOSSES)):
        raise OptionError(
            f"{given} has no meaning under --loss {', '.join(idle)}.\n"
            f"Leave it out; it serves {', '.join(used_by)}."
        )
