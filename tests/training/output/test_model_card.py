"""The model card: its content, its validity, and that it names nothing of the machine."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from dpo_cache.errors import TrainingError
from dpo_cache.losses.table import LOSSES
from dpo_cache.losses.terms import papers_of
from dpo_cache.options.train import TrainOptions
from dpo_cache.training.output.model_card import (
    is_local,
    library_versions,
    model_card,
    shown_name,
    write_card,
)
from tests.training.test_loop import metrics, train

RESOLVED = {
    "model": "org/base",
    "num_pairs": 900,
    "num_eval_pairs": 100,
    "total_steps": 57,
    "precision": "fp32",
}
MANIFEST = {
    "name": "helpful", "split": "train", "reference": "ab" * 32, "num_pairs": 1000, "pairs_digest": "cd" * 32,
    "source": {"dataset": "org/preferences", "format": "conversation"}, "tokenization": {"max_length": 1024, "truncation": "keep-start"},
}  # fmt: skip
REFERENCE = {
    "identity": {"weights": "ef" * 32, "dtype": "float32"}, "provenance": {"model": "org/base", "revision": "main"},
}  # fmt: skip
BEFORE = {"step": 0, "eval/loss": 0.6931, "eval/rewards/accuracies": None, "eval/rewards/margins": 0.0}
AFTER = {"step": 57, "eval/loss": 0.3156, "eval/rewards/accuracies": 0.974, "eval/rewards/margins": 1.05}
LAST = {"step": 57, "loss": 0.2367, "rewards/accuracies": 1.0, "rewards/margins": 1.3}

GOLDEN = """---
base_model: org/base
datasets: org/preferences
library_name: transformers
pipeline_tag: text-generation
tags:
- dpo-cache
- dpo
- preference-optimization
---

# run

A fine-tune of [org/base](https://huggingface.co/org/base), trained on the preference pairs `helpful/train` with the loss `sigmoid` by dpo-cache. \
The log-probs of the reference were computed once, before, and read from a cache; no reference model was in memory.

## Data

|  |  |
| --- | --- |
| pair set | `helpful/train` |
| source | [org/preferences](https://huggingface.co/datasets/org/preferences), conversation format |
| pairs to train on | 900 of 1,000 |
| digest of the pairs | `cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd` |
| longest prompt + answer | 1,024 tokens, truncation keep-start |
| held-out pairs | 100 of the same set, a share of 0.1 of its prompts |

## Reference

|  |  |
| --- | --- |
| id | `abababababababababababababababababababababababababababababababab` |
| model | [org/base](https://huggingface.co/org/base), revision `main` |
| dtype | float32 |
| sha256 over its tensors | `efefefefefefefefefefefefefefefefefefefefefefefefefefefefefefefef` |

## Loss

|  |  |
| --- | --- |
| `sigmoid` | weight 1 |
| `--beta` | `0.1` |

- DPO: Rafailov et al., [Direct Preference Optimization: Your Language Model is Secretly a Reward Model](https://arxiv.org/abs/2305.18290), 2023

## Training

|  |  |
| --- | --- |
| steps | 57, of up to 16 pairs each, of 57 in the schedule |
| learning rate | 1e-05, linear after a warm-up over 10% of the steps |
| optimizer | adamw, weight decay 0, gradient norm clipped to 1 |
| precision | fp32 |
| trained weights | all |
| seed | 0 |

## Options that differ from their defaults

|  |  |
| --- | --- |
| `--batch-size` | `16` |
| `--lr` | `1e-05` |
| `--eval-fraction` | `0.1` |

## Results

|  | loss | accuracy | reward margin |
| --- | --- | --- | --- |
| held out, before | 0.6931 | - | +0.0000 |
| held out, after | 0.3156 | 97.4% | +1.0500 |
| last step | 0.2367 | 100.0% | +1.3000 |

There is no accuracy (-) where reward margins are zero up to rounding.

## Use

```python
from transformers import AutoTokenizer
from transformers import AutoModelForCausalLM as Model

model = Model.from_pretrained("run/model")  # this folder, or its id on the Hub
tokenizer = AutoTokenizer.from_pretrained("run/model")
```

## Versions

dpo-cache 0.1.0, torch 2.13.0
"""


def config(**options: object) -> dict:
    """A run's config.json as it is read back."""
    chosen = TrainOptions(**{"cache": "/home/ann/cache", "output": "/home/ann/runs/run", **options})
    adapter = f"LORA, rank {chosen.lora_r}" if chosen.lora_r else "IA3" if chosen.peft_config else None
    found = {"adapter": adapter, "lr": chosen.peak_lr(is_adapted=bool(adapter))}
    return json.loads(json.dumps({**asdict(chosen), "resolved": {**RESOLVED, **found}}))


def card(manifest: dict = MANIFEST, reference: dict = REFERENCE, **options: object) -> str:
    return model_card(config(**options), manifest, reference, before=BEFORE, after=AFTER)


def test_the_card_of_a_small_run() -> None:
    versions = {"dpo-cache": "0.1.0", "torch": "2.13.0"}
    options = config(batch_size=16, lr=1e-5, eval_fraction=0.1)
    assert (
        model_card(
            options,
            MANIFEST,
            REFERENCE,
            before=BEFORE,
            after=AFTER,
            last=LAST,
            num_steps=57,
            versions=versions,
        )
        == GOLDEN
    )


@pytest.mark.parametrize(
    "options",
    [{"loss": name, **({"label_smoothing": 0.1} if name == "exo_pair" else {})} for name in LOSSES]
    + [{"lora_r": 8}, {"loss": ("sigmoid:0.8", "sft:0.2")}, {"output": "/tmp/a: b # c"}],
    ids=str,
)
def test_the_front_matter_is_valid_yaml(options: dict) -> None:
    data = ModelCard(card(**options)).data
    assert (
        data.base_model == "org/base"
        and data.pipeline_tag == "text-generation"
        and data.datasets == "org/preferences"
    )
    assert data.library_name == ("peft" if options.get("lora_r") else "transformers")
    assert data.tags[0] == "dpo-cache" and all(isinstance(tag, str) and tag for tag in data.tags)
    assert len(set(data.tags)) == len(data.tags)


HOSTILE = "x` <script>alert(1)</script> ![a](http://evil)\n\n# you | won\x1b[2J"


def test_texts_of_a_cache_are_shown_and_do_nothing_else() -> None:
    manifest = {
        **MANIFEST,
        "pairs_digest": HOSTILE,
        "source": {"dataset": HOSTILE, "format": HOSTILE},
        "tokenization": {"max_length": 1024, "truncation": HOSTILE},
    }
    for identity in ({"weights": HOSTILE, "dtype": HOSTILE}, {"imported": HOSTILE, "dtype": None}):
        reference = {"identity": identity, "provenance": {"model": HOSTILE, "revision": HOSTILE}}
        found = card(manifest, reference)
        assert ModelCard(found).data.library_name == "transformers"
        assert all(line.isprintable() for line in found.split("\n"))
        body = without_code(found)
        assert "<script>" not in body and "](http://" not in body
        assert "\n# you" not in found
        rows = [line for line in found.splitlines() if line.startswith("|")]
        assert {line.replace(r"\|", "").count("|") for line in rows} <= {3, 5}


def without_code(text: str) -> str:
    """The text without its code spans and escaped characters, as CommonMark reads them."""
    return re.sub(r"\\[!-/:-@\[-`{-~]|(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text, flags=re.DOTALL)


def test_tags_are_the_names_that_people_look_for() -> None:
    def tags(*loss: str) -> list[str]:
        return ModelCard(card(loss=loss)).data.tags[1:]

    assert tags("sigmoid") == ["dpo", "preference-optimization"] == tags("sigmoid_norm")
    assert tags("ipo_norm") == ["ipo", "preference-optimization"] and tags("bco_pair") == [
        "bco",
        "preference-optimization",
    ]
    assert tags("sigmoid:0.8", "sft:0.2") == ["dpo", "sft", "preference-optimization"] and tags("sft") == [
        "sft"
    ]


def test_no_folder_of_the_machine_is_named() -> None:
    manifest = {**MANIFEST, "source": {"dataset": "/home/ann/secret/pairs.jsonl", "format": "text"}}
    reference = {
        **REFERENCE,
        "provenance": {
            "model": "/home/ann/secret/my-model",
            "revision": None,
            "tokenizer": "/home/ann/secret/tok",
        },
    }
    text = card(
        manifest,
        reference,
        peft_config="/home/ann/secret/lora.json",
        config="/home/ann/secret/config.json",
        log_to="wandb",
    )
    assert not any(word in text for word in ("/home", "ann", "secret", "C:", "wandb"))
    assert (
        "`my-model`, a local copy" in text
        and "`pairs.jsonl`, a local copy" in text
        and "`lora.json`" in text
        and "# run\n" in text
    )
    data = ModelCard(text).data
    assert data.base_model is None and data.datasets is None  # a folder's name would link to another's model
    other = card(reference=reference, model="C:\\Users\\ann\\secret\\my-model")
    assert "Users" not in other and "`my-model`" in other


@pytest.mark.parametrize(("location", "local", "shown"), [
    ("gpt2", False, "gpt2"), ("org/model-1.5", False, "org/model-1.5"), ("/a/b/c", True, "c"), ("./b/c/", True, "c"), ("~/c", True, "c"),
    ("a/b/c", True, "c"), ("C:\\a\\c", True, "c"), ("s3://user:key@bucket/c.jsonl", True, "c.jsonl"), ("/", True, "a local folder"),
])  # fmt: skip
def test_ids_and_folders_are_distinguished(location: str, local: bool, shown: str) -> None:
    assert is_local(location) is local and shown_name(location) == shown


def test_a_folder_that_looks_like_an_id_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_local("models/mine")
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert is_local("models/mine")


def test_settings_of_the_loss_are_said_with_their_papers() -> None:
    text = card(
        loss=("sigmoid:0.8", "sft_norm:0.2"),
        label_smoothing=0.1,
        ld_alpha=0.3,
        wpo="on",
        f_divergence="js_divergence",
    )
    for line in (
        "| `sigmoid` | weight 0.8 |",
        "| `sft_norm` | weight 0.2 |",
        "| `--label-smoothing` | `0.1` |",
        "| `--ld-alpha` | `0.3` |",
    ):
        assert line in text
    cited = papers_of(
        config(
            loss=("sigmoid:0.8", "sft_norm:0.2"),
            label_smoothing=0.1,
            ld_alpha=0.3,
            wpo="on",
            f_divergence="js_divergence",
        )
    )
    assert [paper.name for paper in cited] == ["DPO", "RPO", "cDPO", "f-DPO", "LD-DPO", "WPO"]
    assert all(paper.cite() in text for paper in cited)
    assert "--beta" not in card(loss="sft") and "arxiv" not in card(loss="sft")


def test_every_loss_has_the_paper_that_the_docs_name() -> None:
    page = (Path(__file__).parents[3] / "docs" / "losses.md").read_text()
    for loss in LOSSES.values():
        assert loss.paper is None or loss.paper.url in page, loss.paper


def test_an_adapter_is_loaded_as_one() -> None:
    text = card(lora_r=8, lora_targets="q_proj,v_proj")
    assert (
        "An adapter for [org/base]" in text
        and "AutoPeftModelForCausalLM" in text
        and "LoRA of rank 8, alpha 16, on q_proj,v_proj" in text
    )
    merged = card(lora_r=8, merge_adapter=True)
    assert (
        "A fine-tune of" in merged
        and "AutoModelForCausalLM" in merged
        and "merged into the weights" in merged
    )
    assert ModelCard(merged).data.library_name == "transformers"
    assert "peft" in library_versions(config(lora_r=8)) and "peft" not in library_versions(config())


def test_an_imported_reference_without_a_model_is_said_to_be_unknown() -> None:
    reference = {
        "identity": {"imported": "their scores", "dtype": None},
        "provenance": {"model": None, "revision": None},
    }
    text = card({**MANIFEST, "imported": True}, reference, model="org/start")
    assert (
        "| model | not known |" in text
        and "| imported as | `their scores` |" in text
        and "log-probs imported" in text
    )
    assert ModelCard(text).data.base_model == "org/start"


def test_a_run_saves_its_card(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", eval_pairs="heldout", beta=0.3, save_every=2)
    text = (tmp_path / "run" / "model" / "README.md").read_text()
    last = [line for line in metrics(tmp_path / "run") if "loss" in line][-1]
    assert str(tmp_path) not in text and str(tmp_path.parent) not in text and "model0" in text
    assert (
        report.eval_after is not None
        and f"| held out, after | {report.eval_after['eval/loss']:.4f} |" in text
    )
    assert f"| last step | {last['loss']:.4f} |" in text and "| pairs to train on | 15 of 15 |" in text
    assert "| steps | 4, of up to 4 pairs each, of 4 in the schedule |" in text and "| epochs | 1 |" in text
    assert "| `--beta` | `0.3` |" in text and "| `--batch-size` | `4` |" in text and "--save-every" in text
    ModelCard(text)


def test_the_card_of_the_best_policy_is_of_its_step(cache: str, tmp_path: Path) -> None:
    options = {
        "eval_pairs": "heldout",
        "eval_every": 1,
        "best": "accuracy",
        "lr": 1e-2,
        "warmup_ratio": 0.0,
        "epochs": 2.0,
    }
    report = train(cache, tmp_path / "run", **options)
    assert (
        report.best is not None and report.best_model is not None and report.best["step"] < report.num_steps
    )
    step = report.best["step"]
    (evaluation,) = [
        line for line in metrics(tmp_path / "run") if "eval/loss" in line and line["step"] == step
    ]
    text = (tmp_path / "run" / "best" / "README.md").read_text()
    assert (
        f"| steps | {step}, of up to 4 pairs each, of 8 in the schedule |" in text
        and f"| held out, after | {evaluation['eval/loss']:.4f} |" in text
    )
    assert (
        "| steps | 8, of up to 4 pairs each, of 8 in the schedule |"
        in (tmp_path / "run" / "model" / "README.md").read_text()
    )


def test_an_adapter_has_our_card_and_not_that_of_its_library(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", lora_r=4, max_steps=1)
    text = (Path(report.model) / "README.md").read_text()
    assert "An adapter for `model0`, a local copy" in text and ModelCard(text).data.library_name == "peft"
    assert str(tmp_path.parent) not in text


def test_a_card_replaces_that_of_a_library_or_names_the_file_it_cannot_write(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("another")
    write_card(tmp_path, "card")
    assert (tmp_path / "README.md").read_text() == "card" and [path.name for path in tmp_path.iterdir()] == [
        "README.md"
    ]
    with pytest.raises(TrainingError, match="cannot write .*README.md"):
        write_card(tmp_path / "none", "card")
