"""The command that makes a pair set again, from its manifest and its reference."""

from __future__ import annotations

import shlex
from typing import Any

from dpo_cache.store.format.documents import Document
from dpo_cache.types import quantization_name


def precompute_line(cache: str, manifest: Document, reference: Document | None) -> str:
    """The command that makes a pair set again, with the options that its manifest and its reference hold.

    They hold no chat template of the user's, and not which splits were imported together. For rows or a model
    in memory it is a call in Python, with a name in capitals for each.
    """
    source = manifest.get("source", {})
    identity, provenance = ((reference or {}).get(member, {}) for member in ("identity", "provenance"))
    if "imported" in identity:
        model = provenance.get("model")
        words = ["dpo-cache", "import", cache, source.get("dataset", "DATA")]
        options = {"reference": identity["imported"], "model": model, "dtype": identity.get("dtype")}
        return _command(words, {**options, **_pair_set_options(manifest, model)})
    has_rows, has_model = source.get("rows_of") == "memory", identity.get("weights_of") == "memory"
    model = provenance.get("model")
    making = {**_scoring_options(source, identity), **_pair_set_options(manifest, model)}
    if not has_rows and not has_model:
        places = {
            "model": model or "MODEL",
            "revision": provenance.get("revision"),
            "dataset": source.get("dataset", "DATA"),
            "cache": cache,
        }
        return _command(["dpo-cache", "precompute"], {**places, **making})
    if has_model or provenance.get("tokenizer") == "in memory":
        making["tokenizer"] = _Name("TOKENIZER")
    return _call(
        [
            _Name("MODEL") if has_model or not model else model,
            _Name("ROWS") if has_rows else source.get("dataset", _Name("DATA")),
            cache,
        ],
        {"revision": provenance.get("revision"), **making},
    )


class _Name(str):
    """A name in a call, which is written without quotes."""

    __slots__ = ()

    __repr__ = str.__str__


def _scoring_options(source: Document, identity: Document) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if (quantize := quantization_name(identity)) != "none" and identity.get("weights_of") != "memory":
        options["quantize"] = quantize
    # rows may have been added since
    options |= {"dtype": identity.get("dtype", "auto"), "limit": source.get("rows_read")}
    if source.get("ranked_pairs", "all") != "all":
        options["ranked_pairs"] = source["ranked_pairs"]
    if "on_error" in source:
        options["on_error"] = source["on_error"]
    if "early_answers" in source:
        options["early_answers"] = source["early_answers"]
    return options


def _pair_set_options(manifest: Document, model: str | None) -> dict[str, Any]:
    made, source = manifest.get("tokenization", {}), manifest.get("source", {})
    options = {
        "name": manifest["name"],
        "split": manifest["split"],
        "format": source.get("format"),
        "max_length": made.get("max_length"),
        "truncation": made.get("truncation"),
        "max_prompt_length": made.get("max_prompt_length"),
        "template_date": made.get("template_date"),
    }
    if "tokenizer" in made and made["tokenizer"] != model:
        options["tokenizer"] = made["tokenizer"]
    return {**options, "map": source.get("map", [])}


def _command(words: list[str], options: dict[str, Any]) -> str:
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                words += [f"--{name.replace('_', '-')}", str(one)]
    return shlex.join(words)


def _call(places: list[str], options: dict[str, Any]) -> str:
    named = [f"{name}={value!r}" for name, value in options.items() if value is not None and value != []]
    return f"dpo_cache.precompute({', '.join([*map(repr, places), *named])})"
