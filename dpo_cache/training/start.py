"""The model that a policy starts from, and the rule for running Python code of models.

`trust_remote_code` covers the model that the user names with `model`, the base of an adapter that is named in
this way, and the checkpoint of the run that is resumed. A place that only the cache names is read as data:
the default start, and the tokenizer of the pairs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from dpo_cache.log import Log
from dpo_cache.options.train import TrainOptions
from dpo_cache.store.format.documents import Document
from dpo_cache.store.starting_model import default_start, describe_start


@dataclass(frozen=True)
class Start:
    """Location and revision of a model, and a flag that is true if the user, and not the cache, named it."""

    location: str
    revision: str | None
    is_named: bool


def find_start(options: TrainOptions, reference: Document, log: Log, *, is_resumed: bool) -> Start:
    """The model of the options, or the one that the reference's entry names, which is logged.

    Raises `ModelError` if the entry names no model, or one that the user must name.
    """
    if options.model is not None:
        return Start(options.model, None, is_named=True)
    location, revision = default_start(reference, checks_place=not is_resumed)
    if not is_resumed:
        log(
            f"the policy starts from {describe_start(location, revision)}, which the cache names; `model` "
            "chooses another."
        )
        if options.trust_remote_code:
            log(
                "`trust_remote_code` runs only code of a place that you name with `model`: no code of "
                f"{location} runs."
            )
    return Start(location, revision, is_named=False)


def trusts_code(options: TrainOptions, start: Start) -> bool:
    """Return whether Python code at the start, or in a checkpoint of a run from there, may run."""
    return options.trust_remote_code and start.is_named


def is_same_place(location: str, other: str) -> bool:
    """Return whether both are the same Hub id, or lead to the same folder."""
    if os.path.isdir(location) and os.path.isdir(other):
        return os.path.realpath(location) == os.path.realpath(other)
    return location == other
