"""Tokenizers: loading one, and the digest that identifies one.

`data` makes ids with a tokenizer; `evaluation` compares a policy's tokenizer with the one that made the ids.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import cached_file

from dpo_cache.errors import DataError, ModelError, first_line

PROCESSORS_TEMPLATE = "chat_template.json"
PROBE = "The  cat's É e\u0301 ﬁ 世界 12345\n\n\tdon't  "


def load_tokenizer(
    location: str,
    *,
    revision: str | None = None,
    chat_template: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The tokenizer. `chat_template` is a file with another template, or the name of one of its own.

    Raises `ModelError`, and `DataError` for the template.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            location, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{location}: no tokenizer can be loaded from it ({first_line(error)}).\n"
            "Give a folder with a tokenizer, or a Hub id, as `tokenizer`."
        ) from error
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processors_template(location, revision)
    if chat_template is not None:
        set_chat_template(tokenizer, chat_template)
    return tokenizer


def _processors_template(location: str, revision: str | None) -> str | None:
    """The chat template in chat_template.json, where older checkpoints of images and text have theirs."""
    path = cached_file(
        location,
        PROCESSORS_TEMPLATE,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if path is None:
        return None
    try:
        template = json.loads(Path(path).read_text(encoding="utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: no chat template can be read from it ({first_line(error)}).") from error
    return template


def set_chat_template(tokenizer: PreTrainedTokenizerBase, choice: str) -> None:
    """Give the tokenizer the chat template in a file, or the one of its own that has this name. Raises
    `DataError`.
    """
    own = tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else {}
    if choice in own and not Path(choice).is_file():
        tokenizer.chat_template = own[choice]
        return
    try:
        tokenizer.chat_template = Path(choice).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = f"\nThe tokenizer's own templates are {', '.join(sorted(own))}." if own else ""
        detail = str(error.strerror).lower() if isinstance(error, OSError) else "not UTF-8"
        raise DataError(f"`chat_template` {choice}: not readable ({detail}).{names}") from error


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hex sha256 of all that determines the ids: vocabulary, rules, special tokens and templates."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = _python_rules_of(tokenizer) if backend is None else _rules_of(backend)
    splits = str(getattr(tokenizer, "split_special_tokens", False))
    template = tokenizer.chat_template
    if isinstance(template, dict):  # the order of its files in a folder has no meaning
        template = dict(sorted(template.items()))
    parts = [
        type(tokenizer).__name__,
        rules,
        str(tokenizer.special_tokens_map),
        splits,
        str(template),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@contextmanager
def without_padding(backend: Tokenizer) -> Iterator[None]:
    """Switch padding and truncation off in this block: both depend on the last call."""
    padding, truncation = backend.padding, backend.truncation
    backend.no_padding()
    backend.no_truncation()
    try:
        yield
    finally:
        if padding is not None:
            backend.enable_padding(**padding)
        if truncation is not None:
            backend.enable_truncation(**truncation)


def _python_rules_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The vocabulary and added tokens of a tokenizer in Python, whose rules are code, and what it makes of a
    text that rules differ in.
    """
    added = sorted((number, repr(token)) for number, token in tokenizer.added_tokens_decoder.items())
    ids = tokenizer(PROBE)["input_ids"]
    return str([sorted(tokenizer.get_vocab().items()), added, ids])


def _rules_of(backend: Tokenizer) -> str:
    """The fast tokenizer as JSON, without padding and truncation."""
    with without_padding(backend):
        return backend.to_str()
