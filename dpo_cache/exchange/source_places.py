"""Where the text of a pair set is read, and whether its chat template is rendered.

A manifest names the data set, the tokenizer and the chat template, and somebody else may have written it. So
for a pair set that this user did not make (see `own_documents.py`), a place that may hold anything is used
only if the user names it, and a chat template is rendered only if it is the tokenizer's own.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from dpo_cache.errors import ModelError, OptionError, printable
from dpo_cache.store.format.documents import Document
from dpo_cache.store.own_documents import is_own
from dpo_cache.store.starting_model import is_ambiguous

NOT_OWN = "and this user did not make the pair set"


def choose_place(manifest: Document, option: str, named: str | None) -> str:
    """The place that the user `named` with an option, `dataset` or `tokenizer`, else that of the manifest.

    Raises `OptionError` where the user has to name it.
    """
    if named is not None:
        return named
    member = "source" if option == "dataset" else "tokenization"
    place = manifest[member][option]
    if place is None:
        raise OptionError(f"the manifest names no {option}: give `{option}`.")
    if is_ambiguous(place) and not is_own(manifest):
        raise OptionError(
            f"the manifest names {printable(place)} as the {option}, a relative path or a Hub id, {NOT_OWN}: "
            f"give `{option}` if it is the right one."
        )
    return place


def set_template_of(manifest: Document, tokenizer: PreTrainedTokenizerBase, location: str) -> None:
    """Give the tokenizer the chat template of the pair set. Raises `ModelError` for one that is neither its
    own nor this user's.
    """
    template = manifest["tokenization"].get("chat_template")
    if template is not None and template != tokenizer.chat_template and not is_own(manifest):
        raise ModelError(
            f"the chat template of the pair set is not that of {printable(location)}, {NOT_OWN}: a template "
            "is a program, so give a `tokenizer` that has it."
        )
    tokenizer.chat_template = template
