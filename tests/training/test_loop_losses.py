"""Losses that need more of the loop than a pair's sums: whole steps, token log-probs, routers."""

import json
from pathlib import Path

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

import dpo_cache
from dpo_cache.errors import OptionError, TrainingError
from dpo_cache.lm.rows import row_logps, run_rows
from dpo_cache.store import open_cache
from dpo_cache.training.batches import completions_of
from dpo_cache.training.pair_logps import reference_logps
from tests.conftest import chat_rows, make_tokenizer, write_rows
from tests.lm.families import make_model
from tests.training.test_loop import assert_alike, metrics, train


@pytest.mark.rotating(2)
@pytest.mark.parametrize("options", [
    {"loss": "aot", "beta": 0.5}, {"loss": ("aot_unpaired:0.5", "sft:0.1")}, {"loss": ("sigmoid", "sft")}, {"loss": "cpo"},
    {"loss": "sigmoid", "ld_alpha": 0.3, "wpo": "on"},
])  # fmt: skip
def test_losses_that_look_at_a_whole_step_do_not_depend_on_its_split(
    cache: str, tmp_path: Path, options: dict
) -> None:
    remarks: list[str] = []
    shared = {"batch_size": 8, "max_steps": 2, "lr": 1e-4, "eval_pairs": "heldout", **options}
    train(cache, tmp_path / "whole", budget_tokens="100000", log=remarks.append, **shared)
    assert not any("twice" in remark for remark in remarks)
    train(cache, tmp_path / "split", budget_tokens="60", log=remarks.append, **shared)
    assert sum("run each of them twice" in remark for remark in remarks) == ("aot" in str(options))
    assert len(metrics(tmp_path / "whole")) == 4
    assert_alike(metrics(tmp_path / "whole"), metrics(tmp_path / "split"))


@pytest.fixture(scope="module")
def expert_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Pairs scored by a mixture of experts."""
    folder = tmp_path_factory.mktemp("experts")
    make_model("mixtral").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    dpo_cache.precompute(
        str(folder / "model"), write_rows(folder / "pairs.jsonl", chat_rows(8)), str(folder / "cache")
    )
    return str(folder / "cache")


@pytest.mark.rotating(2)
@pytest.mark.parametrize("mode", ["none", "full"])
def test_a_mixture_of_experts_trains_with_its_router_loss(
    expert_cache: str, tmp_path: Path, mode: str
) -> None:
    options = {
        "batch_size": 8,
        "max_steps": 1,
        "lr": 1e-4,
        "shuffle": False,
        "gradient_checkpointing": mode,
        "router_aux_loss_coef": 0.5,
    }
    lines = []
    for name, budget_tokens in (("whole", "100000"), ("split", "60")):
        train(expert_cache, tmp_path / name, budget_tokens=budget_tokens, **options)
        lines.append(metrics(tmp_path / name)[0])
    model, pairs = make_model("mixtral"), list(open_cache(expert_cache).pairs("pairs"))
    completions = completions_of(pairs)
    rows = run_rows(model, completions, output_router_logits=True)
    aux = load_balancing_loss_func(rows.router_logits, 4, 2, rows.uses)
    sums = torch.stack([logps.double().sum() for logps in row_logps(model, completions)])
    margins = torch.stack(list(sums - torch.from_numpy(reference_logps(pairs)))).chunk(2)
    loss = -torch.nn.functional.logsigmoid(0.1 * (margins[0] - margins[1])).mean() + 0.5 * aux
    loss.backward()
    norm = torch.nn.utils.get_total_norm(
        [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    )
    for line in lines:
        assert line["aux_loss"] == pytest.approx(aux.item(), rel=1e-5)
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_the_router_loss_has_the_weight_of_the_model_config(
    expert_cache: str, cache: str, tmp_path: Path
) -> None:
    train(expert_cache, tmp_path / "default", max_steps=1)
    assert (
        json.loads((tmp_path / "default" / "config.json").read_text())["resolved"]["router_coefficient"]
        == 0.001
    )
    train(expert_cache, tmp_path / "off", max_steps=1, router_aux_loss_coef=0.0)
    assert "aux_loss" in metrics(tmp_path / "default")[0] and "aux_loss" not in metrics(tmp_path / "off")[0]
    with pytest.raises(OptionError, match="LlamaForCausalLM returns no router logits"):
        train(cache, tmp_path / "run", router_aux_loss_coef=0.1)


def test_a_run_of_an_older_version_is_resumed(cache: str, tmp_path: Path) -> None:
    train(cache, tmp_path / "run", loss="ipo", should_stop=lambda: True)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    for name in (
        "f_divergence",
        "f_alpha",
        "ld_alpha",
        "ld_reference",
        "wpo",
        "discopop_tau",
        "simpo_gamma",
        "cpo_alpha",
        "router_aux_loss_coef",
    ):
        del config[name]
    path.write_text(json.dumps({**config, "loss": "ipo"}))
    with pytest.raises(TrainingError, match=r"loss: \['ipo'\] before, \['sigmoid'\] now"):
        train(cache, tmp_path / "run", resume=True)
    assert train(cache, tmp_path / "run", resume=True, loss="ipo").finished


def test_pairs_with_only_sums_serve_every_loss_that_needs_no_more(
    cache: str, model_folder: str, tmp_path: Path
) -> None:
    folder = tmp_path / "sums"
    dpo_cache.precompute(model_folder, write_rows(tmp_path / "pairs.jsonl", chat_rows(6)), folder)
    opened = open_cache(folder)
    pairs, manifest = list(opened.pairs("pairs")), opened.pairs("pairs").manifest
    writer = opened.write_pairs("pairs", "train")
    writer.add(
        [
            dpo_cache.ScoredPair(
                entry.pair, *(only_sum(score) for score in (entry.ref_chosen, entry.ref_rejected))
            )
            for entry in pairs
        ]
    )
    writer.finish(
        {
            **{key: value for key, value in manifest.items() if key not in ("num_pairs", "parts", "format")},
            "token_logps": False,
        }
    )
    assert not open_cache(folder).pairs("pairs").has_token_logps
    with pytest.raises(
        TrainingError,
        match="pairs/train holds only sums of log-probs, and `ld_alpha` weights .*\nUse `ld_reference=False`",
    ):
        train(str(folder), tmp_path / "run", ld_alpha=0.5)
    assert not (tmp_path / "run").exists()
    train(str(folder), tmp_path / "ipo", loss="ipo_norm", max_steps=1)
    assert train(str(folder), tmp_path / "run", ld_alpha=0.5, ld_reference=False, max_steps=1).finished


def only_sum(score: dpo_cache.Score) -> dpo_cache.Score:
    return dpo_cache.Score(score.token_logps[:0], score.logps)
