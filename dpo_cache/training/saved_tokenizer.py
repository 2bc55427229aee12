"""The tokenizer and the chat template that are saved with a trained model.

The tokenizer is the one that made the pairs, if it can be read, otherwise the model's own. The author of
the cache chose where the first one is read: its Python code does not run, and a place with unknown content (a
relative path, a Hub id) is read only if this user made the pair set or named the place.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpo_cache.errors import ModelError, printable
from dpo_cache.log import Log
from dpo_cache.options.train import TEMPLATES, TrainOptions
from dpo_cache.store.format.documents import Document
from dpo_cache.store.own_documents import is_own
from dpo_cache.store.starting_model import is_ambiguous
from dpo_cache.tokenizer import load_tokenizer, set_chat_template, tokenizer_digest
from dpo_cache.training.start import is_same_place

Place = tuple[str, str | None]  # location and revision
NO_TEMPLATE = object()  # a model without a tokenizer has no template, not even an empty one


@dataclass(frozen=True)
class SavedTokenizer:
    """The tokenizer to save, with its template, and a flag that is true if the model's own template differs
    from that of the pairs.
    """

    tokenizer: PreTrainedTokenizerBase
    has_other_template: bool


def restore_tokenizer(checkpoint: str, *, trusted: bool) -> SavedTokenizer:
    """The tokenizer of a checkpoint, with the template that was chosen when the run started."""
    return SavedTokenizer(load_tokenizer(checkpoint, trust_remote_code=trusted), has_other_template=False)


def choose_tokenizer(
    options: TrainOptions,
    manifest: Document,
    places: Sequence[Place],
    given: PreTrainedTokenizerBase | None,
    log: Log,
    *,
    trusted: bool,
) -> SavedTokenizer:
    """The tokenizer to save: a copy of the `given` one, else that of the pairs, else the first one found in
    the model's `places`. `trusted` lets Python code of these places run. Raises `ModelError`.
    """
    own = given if given is not None else _first_of(places, trusted=trusted)
    chosen = None if given is not None else _of_pairs(manifest, places, own, log, trusted=trusted)
    chosen = copy.deepcopy(own) if chosen is None else chosen
    if chosen is None:
        known = [manifest["tokenization"]["tokenizer"], *(location for location, _ in places)]
        raise ModelError(
            f"no tokenizer in {' or '.join(dict.fromkeys(map(printable, filter(None, known))))}; the trained "
            "model would be saved without one.\nPut its files there."
        )
    template = NO_TEMPLATE if own is None else own.chat_template
    return SavedTokenizer(chosen, _set_template(options, manifest, chosen, template, places[0][0], log))


def _of_pairs(
    manifest: Document,
    places: Sequence[Place],
    own: PreTrainedTokenizerBase | None,
    log: Log,
    *,
    trusted: bool,
) -> PreTrainedTokenizerBase | None:
    """The tokenizer that made the pairs; None if it is the model's `own`. If it cannot be read, the result is
    None and a remark is logged.
    """
    made_with = manifest["tokenization"]
    place, digest = made_with["tokenizer"], made_with.get("tokenizer_sha256")
    if place is None or (own is not None and digest is not None and _digest_with(own, made_with) == digest):
        return None
    for location, revision in places:
        if is_same_place(place, location):
            return _first_of([(location, revision)], trusted=trusted)
    problem = "this user did not make the pair set, and a place of that name may hold anything"
    if is_own(manifest) or not is_ambiguous(place):
        problem = "its files are gone, or only Python code in them could read it"
        with suppress(ModelError):
            return load_tokenizer(place)
    if own is not None:
        log(
            f"the tokenizer that made the pairs, {printable(place)}, is not read: {problem}. The tokenizer "
            f"of {places[0][0]} is saved with the model; whether it is the same is not known."
        )
    return None


def _set_template(
    options: TrainOptions,
    manifest: Document,
    tokenizer: PreTrainedTokenizerBase,
    own: Any,
    model: str,
    log: Log,
) -> bool:
    """Give the tokenizer the template that the options choose; returns whether the model's `own` differs from
    that of the pairs. Pairs whose token ids were imported have none.
    """
    made_with, choice = manifest["tokenization"], options.chat_template
    template = made_with.get("chat_template")
    differs = made_with["tokenizer"] is not None and own is not NO_TEMPLATE and own != template
    if choice not in TEMPLATES:
        set_chat_template(tokenizer, choice)
    elif choice == "model":
        if own is NO_TEMPLATE:
            raise ModelError(
                f"`chat_template` model: no tokenizer in {model}.\nGive `chat_template` pairs, or a file."
            )
        tokenizer.chat_template = own
    elif made_with["tokenizer"] is not None:
        tokenizer.chat_template = template
        if differs:
            has = "has no chat template" if own is None else "has another chat template"
            log(
                f"{model} {has} than the one that the pairs were made with, which is saved with the trained "
                "model. `chat_template` model saves the model's own, a file the one in it."
            )
    return differs


def _first_of(places: Sequence[Place], *, trusted: bool) -> PreTrainedTokenizerBase | None:
    for location, revision in places:
        with suppress(ModelError):
            return load_tokenizer(location, revision=revision, trust_remote_code=trusted)
    return None


def _digest_with(tokenizer: PreTrainedTokenizerBase, made_with: Document) -> str:
    """The digest that the tokenizer would have with the template of the pairs."""
    before, tokenizer.chat_template = tokenizer.chat_template, made_with.get("chat_template")
    try:
        return tokenizer_digest(tokenizer)
    finally:
        tokenizer.chat_template = before
