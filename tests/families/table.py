"""The expected outcome of each family, `expected.json`, and docs/families.md, which is made from it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import transformers as hf

import dpo_cache
from tests.families.check import Outcome
from tests.families.tiny import IMAGES_AND_TEXT, VARIANTS, WITH_TOWERS

EXPECTED = Path(__file__).with_name("expected.json")
DOCS = Path(dpo_cache.__file__).parents[1] / "docs" / "families.md"
RUNS = ("forest", "rows", "one row at a time", "refused")

Entry = dict[str, str]

VARIANTS_HEAD = """
Other settings of some families:

| family | run as | layer-major | why not the forest, or why refused |
|---|---|---|---|
"""

TOWERS_HEAD = """
## Models of images and text

These are the other {total} families that `AutoModelForImageTextToText` of transformers {release} knows; {shared} of the first table are
in its mapping, too: their checkpoints have towers for images as well. Rows of text are run in the class that the checkpoint was saved in,
without its towers, and are compared with the whole model's own forward on `input_ids`. A test also saves the model: it has the names
and the tensors of the original, those of the towers to the bit. And tensors that do not count in the identity change no logit.

{counts}.

| family | run as | layer-major | why not the forest, or why refused |
|---|---|---|---|
"""

HEAD = """# How each model family is run

These are all {total} families that `AutoModelForCausalLM` of transformers {release} knows. A test makes a tiny random model of each, with
windows, chunks and top-k shorter than the rows, saves it, loads it and compares it with the model's own forward on one unpadded row each:
log-probs in chunks or batches of 100 and of 2,048 tokens, and the gradient of a preference loss under each `--gradient-checkpointing`, for
all weights and for LoRA on all linear layers. Whatever is not refused is exact.

| run as | families | |
|---|---|---|
| forest | {forest} | each distinct prefix is computed once |
| rows | {rows} | plain padded rows, which are slower |
| one row at a time | {one} | plain rows without padding, which are slower still |
| refused | {refused} | with the reason below |

*Layer-major* are families whose layers can run one by one, so that the weights, gradients and states of training need not all be on the
device ({layer_major} of the {run} that are not refused): log-probs to the bit, the gradient of each tensor within 1e-5. A check at the
start of such a run compares both on the model itself. A model that cannot run so runs all layers at once, and the log has the reason; the
run stops if its weights are to be on the host.

The self-check at the start of each run makes the choice on the model itself; other settings of a family may give another one.
`python -m tests.families` wrote this page.

| family | run as | layer-major | why not the forest, or why refused |
|---|---|---|---|
"""


def release() -> str:
    """The version of transformers, less its patches: another one may run families in other ways."""
    return ".".join(hf.__version__.split(".")[:2])


def entry_of(outcome: Outcome) -> Entry:
    """The part of an outcome that is the same on every machine."""
    return {
        "run": outcome.run,
        "reason": without_figures(outcome.reason),
        "training": without_figures(outcome.training),
        "lora": without_figures(outcome.lora),
        "layer_major": outcome.layer_major,
    }


def without_figures(reason: str) -> str:
    """The reason without gaps, whose last digits are the machine's."""
    return re.sub(r" by up to [^ ]+ nats per token", "", reason)


def read_expected() -> tuple[str, dict[str, Entry]]:
    """The version of transformers, and the entries by family."""
    document = json.loads(EXPECTED.read_text())
    return document["transformers"], document["families"]


def write_expected(entries: dict[str, Entry]) -> None:
    document = {"transformers": release(), "families": dict(sorted(entries.items()))}
    EXPECTED.write_text(json.dumps(document, indent=1) + "\n")


def count_runs(entries: dict[str, Entry]) -> Counter[str]:
    return Counter(entry["run"] for entry in entries.values())


def page(version: str, entries: dict[str, Entry]) -> str:
    """The content of docs/families.md."""
    families = {name: entry for name, entry in entries.items() if name not in (*VARIANTS, *WITH_TOWERS)}
    towers = {name: entry for name, entry in entries.items() if name in WITH_TOWERS}
    counts = count_runs(families)
    head = HEAD.format(
        total=len(families),
        release=version,
        forest=counts["forest"],
        rows=counts["rows"],
        one=counts["one row at a time"],
        refused=counts["refused"],
        run=len(families) - counts["refused"],
        layer_major=sum(entry["layer_major"] == "yes" for entry in families.values()),
    )
    lines = [_line(name, entry) for name, entry in sorted(families.items())]
    variants = [_line(name, entry) for name, entry in sorted(entries.items()) if name in VARIANTS]
    towers_head = TOWERS_HEAD.format(
        total=len(towers),
        release=version,
        shared=sum(name in IMAGES_AND_TEXT for name in families),
        counts=", ".join(f"{number} {run}" for run, number in count_runs(towers).most_common()),
    )
    with_towers = [_line(name, entry) for name, entry in sorted(towers.items())]
    return "".join([head, *lines, VARIANTS_HEAD, *variants, towers_head, *with_towers])


def _line(family: str, entry: Entry) -> str:
    notes = [entry["reason"]] if entry["reason"] else []
    notes += [f"{name}: {entry[name]}" for name in ("training", "lora") if entry[name] not in ("", "exact")]
    cells = (family, entry["run"], entry["layer_major"], "; ".join(notes))
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |\n"
