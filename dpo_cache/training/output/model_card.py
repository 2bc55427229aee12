"""The model card in the folder of a trained model: its base, data, training and results.

A card may be published, so it names only the last part of a path on this machine. Texts of the cache are
shown as they are: Markdown and HTML in them have no effect.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path, PureWindowsPath
from typing import Any

from huggingface_hub import ModelCardData

from dpo_cache.errors import TrainingError
from dpo_cache.files.atomic import refused_writes, write_whole
from dpo_cache.losses.metrics import Metrics
from dpo_cache.losses.table import LOSSES
from dpo_cache.losses.terms import SETTINGS, is_served, loss_terms, papers_of
from dpo_cache.options.base import flag_of
from dpo_cache.options.run_config import complete_config, evaluation_name
from dpo_cache.options.train import TrainOptions
from dpo_cache.progress import format_share
from dpo_cache.store.format.documents import Document
from dpo_cache.training.output.markdown import code, plain

LOSS_SETTINGS = (*SETTINGS, "router_aux_loss_coef")
SHOWN_IN_SECTIONS = {"model", "pairs", "eval_pairs", "loss", "reference", *LOSS_SETTINGS}
MACHINE_ONLY = {"cache", "output", "config", "resume", "dry_run", "log_to", "log_names", "trust_remote_code"}
FLAGS = {entry.name: flag_of(entry) for entry in fields(TrainOptions)}
DEFAULTS = {
    entry.name: entry.default_factory() if entry.default_factory is not MISSING else entry.default
    for entry in fields(TrainOptions)
}


def model_card(
    config: Mapping[str, Any],
    manifest: Document,
    reference: Document,
    *,
    before: Metrics | None = None,
    after: Metrics | None = None,
    first: Metrics | None = None,
    last: Metrics | None = None,
    num_steps: int | None = None,
    versions: Mapping[str, str] | None = None,
) -> str:
    """README.md of a trained model, with its YAML front matter.

    `config` is the run's config.json, `manifest` that of the pairs trained on, `reference` the reference.json
    that scored them; `before` and `after` are lines of evaluations, `first` and `last` are lines of steps,
    all as metrics.jsonl has them.
    """
    config = complete_config(dict(config))
    sections = [
        _head(config, manifest, reference),
        _data(config, manifest),
        _reference(reference, manifest),
        _loss(config),
        _procedure(config, num_steps, last),
        _options(config),
        _results(evaluation_name(config), before, after, first, last),
        _loading(config),
        _versions(versions or {}),
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{card_data(config, manifest, reference).to_yaml()}\n---\n\n{body}\n"


def card_data(config: Mapping[str, Any], manifest: Document, reference: Document) -> ModelCardData:
    """The front matter. A base model or data set is named there if it comes from the Hub: a folder's name
    would link to another's.
    """
    base, dataset = _base_model(config, reference), manifest["source"]["dataset"]
    return ModelCardData(
        base_model=base if base and not is_local(base) else None,
        library_name="peft" if _is_adapter(config) else "transformers",
        pipeline_tag="text-generation",
        tags=["dpo-cache", *_loss_tags(config)],
        datasets=None if is_local(dataset) else dataset,
    )


def write_card(folder: Path, card: str) -> None:
    """Write README.md into a model's folder, in place of the one of a library. Raises `TrainingError`."""
    path = folder / "README.md"
    with refused_writes(path, TrainingError, f"The model in {folder} is whole."):
        write_whole(path, card)


def library_versions(config: Mapping[str, Any]) -> dict[str, str]:
    """The versions that a card records."""
    names = ["dpo-cache", "torch", "transformers", *(["peft"] if config["resolved"].get("adapter") else [])]
    return {name: version(name) for name in names}


def is_local(location: str) -> bool:
    """Return whether a model or data set is a folder or file of this machine, and not an id on the Hub."""
    is_id = re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", location, re.ASCII)
    return not is_id or os.path.exists(location)


def shown_name(location: str) -> str:
    """A Hub id as it is; the last part of a path or URL."""
    if not is_local(location):
        return location
    path = PureWindowsPath(location.rstrip("/\\"))
    is_of_run = path.name in ("model", "best")  # every run has folders of these names
    return (path.parent.name if is_of_run else "") or path.name or "a local folder"


# -- sections --------------------------------------------------------------------------------------------


def _head(config: Mapping[str, Any], manifest: Document, reference: Document) -> str:
    base, what = _base_model(config, reference), "An adapter for" if _is_adapter(config) else "A fine-tune of"
    losses = " + ".join(f"`{entry}`" for entry in config["loss"])
    return (
        f"# {shown_name(config['output'])}\n\n"
        f"{what} {_named(base)}, trained on the preference pairs `{manifest['name']}/{manifest['split']}` "
        f"with the loss {losses} by dpo-cache. "
        "The log-probs of the reference were computed once, before, and read from a cache; no reference "
        "model was in memory."
    )


def _data(config: Mapping[str, Any], manifest: Document) -> str:
    source, made_with, resolved = manifest["source"], manifest["tokenization"], config["resolved"]
    rows = [
        ("pair set", f"`{manifest['name']}/{manifest['split']}`"),
        (
            "source",
            f"{_named(source['dataset'], 'datasets/')}, {plain(source['format'])} "
            f"format{', log-probs imported' if manifest.get('imported') else ''}",
        ),
        ("pairs to train on", f"{resolved['num_pairs']:,} of {manifest['num_pairs']:,}"),
        ("digest of the pairs", code(manifest["pairs_digest"])),
        (
            "longest prompt + answer",
            f"{made_with['max_length']:,} tokens, truncation {plain(made_with['truncation'])}",
        ),
    ]
    if config["eval_pairs"]:
        shared = resolved.get("num_shared_eval_pairs")
        trained = f", {shared:,} of them with prompts that are trained on" if shared else ""
        what = "held-out pairs" if shared == 0 else "evaluation pairs"
        rows.append((what, f"{resolved['num_eval_pairs']:,} of `{config['eval_pairs']}`{trained}"))
    elif config["eval_fraction"]:
        rows.append(
            (
                "held-out pairs",
                f"{resolved['num_eval_pairs']:,} of the same set, a share of "
                f"{config['eval_fraction']} of its prompts",
            )
        )
    return f"## Data\n\n{_table(rows)}"


def _reference(reference: Document, manifest: Document) -> str:
    identity, source = reference["identity"], reference["provenance"]
    model, revision = _model_of(reference), source.get("revision")
    rows = [
        ("id", code(manifest["reference"])),
        (
            "model",
            (_named(model) if model else "not known") + (f", revision {code(revision)}" if revision else ""),
        ),
        ("dtype", plain(identity.get("dtype") or "not known")),
    ]
    if "imported" in identity:
        rows.append(("imported as", code(identity["imported"])))
    elif "weights" in identity:
        rows.append(("sha256 over its tensors", code(identity["weights"])))
    return f"## Reference\n\n{_table(rows)}"


def _loss(config: Mapping[str, Any]) -> str:
    terms = loss_terms(config["loss"])
    used = [
        name
        for name in LOSS_SETTINGS
        if config[name] != DEFAULTS[name] or (name == "beta" and is_served("beta", list(terms)))
    ]
    rows = [(f"`{name}`", f"weight {weight:g}") for name, weight in terms.items()]
    rows += [(f"`{FLAGS[name]}`", _shown(config[name])) for name in used]
    cited = "\n".join(f"- {paper.cite()}" for paper in papers_of(dict(config)))
    return f"## Loss\n\n{_table(rows)}" + (f"\n\n{cited}" if cited else "")


def _procedure(config: Mapping[str, Any], num_steps: int | None, last: Metrics | None) -> str:
    resolved = config["resolved"]
    steps = num_steps if num_steps is not None else resolved["total_steps"]
    largest = config["max_grad_norm"]
    clipping = f"gradient norm clipped to {largest:g}" if largest else "gradient never clipped"
    rows = [
        (
            "steps",
            f"{steps:,}, of up to {config['batch_size']} pairs each, of {resolved['total_steps']:,} in "
            "the schedule",
        ),
        *([("epochs", f"{last['epoch']:g}")] if last and "epoch" in last else []),
        (
            "learning rate",
            f"{resolved.get('lr') or config['lr']:g}, {config['lr_schedule']} after a warm-up over "
            + _warmup(config),
        ),
        ("optimizer", f"{config['optimizer']}, weight decay {config['weight_decay']:g}, {clipping}"),
        ("precision", resolved["precision"]),
        ("trained weights", _trained(config)),
        ("seed", str(config["seed"])),
    ]
    return f"## Training\n\n{_table(rows)}"


def _warmup(config: Mapping[str, Any]) -> str:
    steps = config.get("warmup_steps")
    return f"{config['warmup_ratio']:.0%} of the steps" if steps is None else f"{steps:,} steps"


def _options(config: Mapping[str, Any]) -> str:
    rows = [
        (f"`{FLAGS[name]}`", _shown(config[name]))
        for name, default in DEFAULTS.items()
        if name not in SHOWN_IN_SECTIONS | MACHINE_ONLY and _shown(config[name]) != _shown(default)
    ]
    return f"## Options that differ from their defaults\n\n{_table(rows)}" if rows else ""


def _results(
    evaluation: str,
    before: Metrics | None,
    after: Metrics | None,
    first: Metrics | None,
    last: Metrics | None,
) -> str:
    lines = [
        (f"{evaluation}, before", before, "eval/"),
        (f"{evaluation}, after", after, "eval/"),
        ("first step", first, ""),
        ("last step", last, ""),
    ]
    rows = [
        (
            title,
            f"{line[f'{prefix}loss']:.4f}",
            format_share(line[f"{prefix}rewards/accuracies"]),
            f"{line[f'{prefix}rewards/margins']:+.4f}",
        )
        for title, line, prefix in lines
        if line
    ]
    if not rows:
        return ""
    has_noise = any(row[2] == "-" for row in rows)
    note = "\n\nThere is no accuracy (-) where reward margins are zero up to rounding." if has_noise else ""
    table = _table(rows, ("", "loss", "accuracy", "reward margin"))
    return f"## Results\n\n{table}{note}"


def _loading(config: Mapping[str, Any]) -> str:
    name = shown_name(config["output"])
    kind = config["resolved"].get("auto_class", "AutoModelForCausalLM")
    if _is_adapter(config) and kind != "AutoModelForCausalLM":
        base = shown_name(str(config["resolved"]["model"]))
        return (
            "## Use\n\n```python\nfrom peft import PeftModel\n"
            f"from transformers import AutoTokenizer, {kind}\n\n"
            f'model = PeftModel.from_pretrained({kind}.from_pretrained("{base}"), "{name}/model")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}/model")\n```'
        )
    load = (
        "from peft import AutoPeftModelForCausalLM as Model"
        if _is_adapter(config)
        else f"from transformers import {kind} as Model"
    )
    return (
        f"## Use\n\n```python\nfrom transformers import AutoTokenizer\n{load}\n\n"
        f'model = Model.from_pretrained("{name}/model")  # this folder, or its id on the Hub\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}/model")\n```'
    )


def _versions(versions: Mapping[str, str]) -> str:
    return (
        "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in versions.items())
        if versions
        else ""
    )


# -- helpers ---------------------------------------------------------------------------------------------


def _base_model(config: Mapping[str, Any], reference: Document) -> str | None:
    return config["model"] or _model_of(reference) or config["resolved"].get("model")


def _model_of(reference: Document) -> str | None:
    """The model that the reference's entry names; None if the entry holds no text there."""
    model = reference["provenance"].get("model")
    return model if isinstance(model, str) else None


def _is_adapter(config: Mapping[str, Any]) -> bool:
    return bool(config["resolved"].get("adapter")) and not config["merge_adapter"]


def _loss_tags(config: Mapping[str, Any]) -> list[str]:
    losses = [LOSSES[name] for name in loss_terms(config["loss"])]
    shared = ["preference-optimization"] if any(loss.prefers for loss in losses) else []
    return list(dict.fromkeys([*(loss.tag or loss.name for loss in losses), *shared]))


def _trained(config: Mapping[str, Any]) -> str:
    base = "" if config["quantize"] == "none" else f" over weights held in {config['quantize']}"
    merged = ", merged into the weights" if config["merge_adapter"] else ""
    if config["lora_r"]:
        alpha = config["lora_alpha"] if config["lora_alpha"] is not None else 2 * config["lora_r"]
        return f"LoRA of rank {config['lora_r']}, alpha {alpha:g}, on {config['lora_targets']}{base}{merged}"
    kind = config["resolved"].get("adapter")
    return f"an adapter ({kind}){base}{merged}" if kind else "all"


def _named(location: str | None, kind: str = "") -> str:
    """A link to the Hub, or a folder's name; data sets are of the kind `datasets/`."""
    if location is None:
        return "a model that is not known"
    name = shown_name(location)
    return (
        f"{code(name)}, a local copy"
        if is_local(location)
        else f"[{name}](https://huggingface.co/{kind}{name})"
    )


def _shown(value: Any) -> str:
    """An option's value; a path by its last part."""
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    is_path = isinstance(value, str) and (os.path.isabs(value) or "/" in value or "\\" in value)
    return code(PureWindowsPath(value.rstrip("/")).name if is_path else value)


def _table(rows: Sequence[Sequence[str]], head: Sequence[str] = ("", "")) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *escaped])
