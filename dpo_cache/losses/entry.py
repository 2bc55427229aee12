"""The kinds of entries in `table.py`: a loss, a setting, a paper.

The command line reads them for its help, so nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

# The parameters of loss functions that are computed from a batch of pairs.
INPUTS = {
    "margins": "score of the chosen minus score of the rejected completion, summed over tokens",
    "mean_margins": "the same with each score divided by its completion's length",
    "chosen_logratios": "log policy minus log reference of the chosen completion, summed over tokens",
    "rejected_logratios": "the same of the rejected completion",
    "policy_margins": "the policy's log-prob of the chosen minus that of the rejected completion",
    "reference_margins": "the same of the reference",
    "chosen_logps": "the policy's log-prob of the chosen completion, summed over tokens",
    "rejected_logps": "the same of the rejected completion",
    "chosen_sums": "the policy's log-prob of the chosen completion with each token counted once",
    "chosen_lengths": "tokens of the chosen completion",
    "rejected_lengths": "tokens of the rejected completion",
    "mean_chosen_tokens": "mean length of the chosen completions of the step, one number",
}
SCORE_INPUTS = {"margins", "mean_margins"}
REFERENCE_INPUTS = SCORE_INPUTS | {"chosen_logratios", "rejected_logratios", "reference_margins"}
REJECTED_INPUTS = REFERENCE_INPUTS | {"policy_margins", "rejected_logps"}


@dataclass(frozen=True)
class Paper:
    """A paper, and its short name."""

    name: str
    title: str
    authors: str
    year: int
    url: str

    def cite(self) -> str:
        """One line of Markdown."""
        return f"{self.name}: {self.authors}, [{self.title}]({self.url}), {self.year}"


def arxiv(name: str, number: str, authors: str, title: str) -> Paper:
    """A paper on arXiv."""
    return Paper(name, title, authors, 2000 + int(number[:2]), f"https://arxiv.org/abs/{number}")


@dataclass(frozen=True)
class Limit:
    """The values that a setting may have; `message` may contain `{flag}` and `{value}`."""

    allows: Callable[[Any], bool]
    message: str


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A loss. Its function is `NAME_losses` in `reference_losses.py` or `policy_losses.py`; its parameters
    are the inputs, then the settings.
    """

    name: str
    inputs: tuple[str, ...]  # keys of INPUTS
    settings: tuple[str, ...] = ("beta",)  # fields of LossSettings
    formula: str  # the loss of a pair, in the letters of docs/losses.md, as Markdown
    paper: Paper | None
    equation: str = ""
    elsewhere: Mapping[str, str] = field(default_factory=dict)  # its names in other systems
    tag: str = ""  # on the Hub, where that is not the name
    limits: Mapping[str, Limit] = field(default_factory=dict)  # limits of settings under this loss
    papers: Mapping[str, tuple[Paper, str]] = field(default_factory=dict)  # papers of settings
    whole_step: bool = False  # a pair's loss depends on the other pairs of its step
    is_logistic: bool = False  # ln 2 where the policy is the reference, near 0 where margins are large

    @property
    def function(self) -> str:
        """Name of the function that computes it."""
        return f"{self.name}_losses"

    @property
    def has_reference(self) -> bool:
        """Return whether it depends on the reference's log-probs."""
        return bool(REFERENCE_INPUTS & set(self.inputs))

    @property
    def compares_scores(self) -> bool:
        """Return whether it is a function of the difference of two scores, which an f-divergence changes."""
        return bool(SCORE_INPUTS & set(self.inputs))

    @property
    def prefers(self) -> bool:
        """Return whether it compares chosen with rejected completions."""
        return bool(REJECTED_INPUTS & set(self.inputs))

    @property
    def per_token(self) -> bool:
        """Return whether it takes averages over tokens and not sums."""
        return bool({"mean_margins", "chosen_lengths"} & set(self.inputs))


def setting(
    default: Any,
    help: str,
    *,
    serves: Callable[[Loss], bool] | None = None,
    limit: Limit | None = None,
    choices: tuple[str, ...] = (),
    flag: str = "",
    paper: Paper | None = None,
) -> Any:
    """A field of `LossSettings`, with the metadata of an option.

    `serves` is true for the losses whose inputs or weights the setting changes; without it the setting is a
    parameter of loss functions. `paper` is cited where the value is not the default.
    """
    metadata = {
        "help": help,
        "choices": choices,
        "flag": flag,
        "required": False,
        "positional": "",
        "metavar": "",
        "old": (),
        "value_is_optional": False,
        "serves": serves,
        "limit": limit,
        "paper": paper,
    }
    return field(default=default, metadata=metadata)
