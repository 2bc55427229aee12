"""An evaluation with the loss settings of a training run gives the numbers of the run's last evaluation."""

import json
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.errors import NotInCacheError, OptionError
from dpo_cache.evaluation import EvalReport, scoring
from dpo_cache.options.run_losses import with_run
from dpo_cache.store import open_cache
from tests.conftest import chat_rows, make_tokenizer, write_rows
from tests.lm.families import make_model
from tests.training.test_loop_losses import only_sum

LOSSES = {
    "sigmoid": {"beta": 0.3},
    "smoothed": {"label_smoothing": 0.2},
    "ipo": {"loss": "ipo", "beta": 0.5},
    "aot": {"loss": "aot"},
    "simpo": {"loss": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
    "cpo": {"loss": "cpo", "cpo_alpha": 0.3},
    "a weighted sum": {"loss": ("sigmoid:0.8", "sft:0.2")},
    "f-divergence": {"f_divergence": "alpha_divergence", "f_alpha": 0.3},
    "reference-free": {"reference_free": True},
    "LD-DPO": {"ld_alpha": 0.3},
    "LD-DPO of the policy": {"ld_alpha": 0.3, "ld_reference": False, "loss": ("ipo_norm", "sft_norm:0.5")},
    "WPO": {"wpo": "on", "loss": ("sigmoid", "sft:0.5")},
    "WPO, clipped": {"wpo": "clipped", "label_smoothing": 0.1},
}


def train(cache: str, run: Path, **options: object) -> dpo_cache.TrainReport:
    shared = {"pairs": "pairs", "eval_pairs": "heldout", "batch_size": 6, "lr": 3e-3, "warmup_ratio": 0}
    return dpo_cache.train(cache, run, log=lambda _: None, **{**shared, **options})


def evaluate(cache: str, **options: object) -> EvalReport:
    return dpo_cache.evaluate(cache, "heldout", **{"log": lambda _: None, **options})


def last_evaluation(run: dpo_cache.TrainReport) -> dict[str, object]:
    assert run.eval_after is not None and run.eval_before is not None
    before, after = run.eval_before["eval/loss"], run.eval_after["eval/loss"]
    assert abs(after / before - 1) > 1e-2  # it has learned something
    found = {name.removeprefix("eval/"): value for name, value in run.eval_after.items() if name != "step"}
    smallest = {"loss": 1e-9}  # losses under WPO are as small as their weights
    return {
        name: pytest.approx(value, rel=1e-5, abs=smallest.get(name, 1e-5)) for name, value in found.items()
    }


@pytest.mark.rotating(3)
@pytest.mark.parametrize("name", LOSSES)
def test_metrics_are_those_that_the_run_ended_with(cache: str, tmp_path: Path, name: str) -> None:
    run = train(cache, tmp_path / "run", **LOSSES[name])
    report = evaluate(cache, run=tmp_path / "run")
    assert report.metrics == last_evaluation(run)
    assert report.model == str(tmp_path / "run" / "model") and report.run == str(tmp_path / "run")
    settings = {key: value for key, value in LOSSES[name].items() if key != "loss"}
    assert settings.items() <= report.loss_settings.items()


@pytest.fixture(scope="module")
def run(cache: str, tmp_path_factory: pytest.TempPathFactory) -> dpo_cache.TrainReport:
    options = {"beta": 0.3, "f_divergence": "js_divergence", "eval_every": 1, "best": "margin"}
    return train(cache, tmp_path_factory.mktemp("found") / "run", **options)


def test_the_run_is_found_from_inside_its_model_and_through_links(
    run: dpo_cache.TrainReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(run.model)
    (tmp_path / "runs").symlink_to(run.output)
    monkeypatch.chdir(run.model)
    for model in (".", "./", tmp_path / "link", tmp_path / "runs" / "model", "../best/../model"):
        found = with_run({"model": model})
        assert Path(found["run"]).resolve() == Path(run.output).resolve(), model
        assert found["model"] == model and found["beta"] == 0.3
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert with_run({"model": "."}) == {"model": "."} and with_run({"model": "model"}) == {"model": "model"}


def test_the_run_of_a_model_is_found_with_one_remark(cache: str, run: dpo_cache.TrainReport) -> None:
    remarks: list[str] = []
    report = evaluate(cache, model=run.model, log=remarks.append)
    assert report.metrics == last_evaluation(run) and report.run == str(Path(run.output))
    found = [remark for remark in remarks if "loss settings" in remark]
    assert found == [
        f"{run.model} is the model of a run, whose loss settings are used: "
        "sigmoid, beta 0.3, f_divergence js_divergence."
    ]


def test_the_run_of_its_best_model_is_found(run: dpo_cache.TrainReport) -> None:
    assert with_run({"model": f"{run.output}/best"})["run"] == run.output if run.best_model else True
    assert "run" not in with_run({"model": f"{run.output}/checkpoints"})
    assert "run" not in with_run({"model": "org/model"}) and "run" not in with_run({})


def test_options_that_are_given_override_those_of_the_run(cache: str, run: dpo_cache.TrainReport) -> None:
    plain = evaluate(cache, run=run.output, f_divergence="reverse_kl", beta=0.1)
    assert (plain.loss_settings["f_divergence"], plain.beta) == ("reverse_kl", 0.1)
    other = evaluate(cache, run=run.output, loss="nca_pair")  # an f-divergence means nothing to it
    assert (other.loss, other.beta, other.loss_settings["f_divergence"]) == (["nca_pair"], 0.3, "reverse_kl")
    reference = open_cache(cache).read_reference(open_cache(cache).pairs("heldout").reference_id)
    start = evaluate(cache, run=run.output, model=reference["provenance"]["model"])
    assert start.metrics["loss"] == pytest.approx((run.eval_before or {})["eval/loss"], rel=1e-5)


def test_a_setting_that_hangs_on_another_is_left_out_with_it(tmp_path: Path, cache: str) -> None:
    alpha = train(cache, tmp_path / "alpha", f_divergence="alpha_divergence", f_alpha=0.3, max_steps=1)
    taken = with_run({"run": alpha.output, "f_divergence": "forward_kl"})
    assert "f_alpha" not in taken and taken["f_divergence"] == "forward_kl"
    assert with_run({"run": alpha.output})["f_alpha"] == 0.3


def test_a_folder_that_is_no_run_is_refused(cache: str, run: dpo_cache.TrainReport, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=f"`run` {tmp_path}: not the folder of a training run"):
        evaluate(cache, run=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(OptionError, match="not the folder of a training run"):
        evaluate(cache, run=tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"loss": "newer", "resolved": {}}))
    with pytest.raises(OptionError, match=f"`run` {tmp_path}: it has no model yet"):
        evaluate(cache, run=tmp_path)
    with pytest.raises(OptionError, match="config.json: `loss` newer: expected one of"):
        evaluate(cache, run=tmp_path, model=run.model)
    with pytest.raises(OptionError, match="`model` is needed"):
        evaluate(cache)


def test_the_router_loss_of_a_run_is_left_out_with_a_remark(tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    cache = str(tmp_path / "cache")
    for name, rows in (("pairs", chat_rows(8)), ("heldout", chat_rows(8, seed=9))):
        dpo_cache.precompute(tmp_path / "model", write_rows(tmp_path / f"{name}.jsonl", rows), cache)
    trained = train(cache, tmp_path / "run", router_aux_loss_coef=0.5)
    remarks: list[str] = []
    report = evaluate(cache, run=tmp_path / "run", log=remarks.append)
    assert sum("0.5 times the router loss" in remark for remark in remarks) == 1
    expected = trained.eval_after or {}
    assert report.metrics["rewards/margins"] == pytest.approx(expected["eval/rewards/margins"], abs=1e-5)
    router = 0.5 * expected["eval/aux_loss"]
    assert report.metrics["loss"] == pytest.approx(expected["eval/loss"] - router, rel=1e-5)


def test_a_config_of_an_older_version_is_read(cache: str, tmp_path: Path) -> None:
    trained = train(cache, tmp_path / "run", loss="ipo")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    for name in ("f_divergence", "ld_alpha", "wpo", "cpo_alpha"):
        del config[name]
    path.write_text(json.dumps({**config, "loss": "ipo"}))
    assert evaluate(cache, run=tmp_path / "run").metrics == last_evaluation(trained)


def test_weights_of_pairs_do_not_depend_on_how_many_are_run_at_once(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(cache, tmp_path / "run", wpo="on")
    sizes: list[int] = []
    split = scoring.split_step

    def count(pairs: object, budget_tokens: int, count_tokens: object) -> object:
        groups = split(pairs, budget_tokens, count_tokens)
        sizes.append(len(groups))
        return groups

    monkeypatch.setattr(scoring, "split_step", count)
    whole = evaluate(cache, run=tmp_path / "run", budget_tokens="100000")
    split_up = evaluate(cache, run=tmp_path / "run", budget_tokens="100", attention="rows")
    assert sizes[0] == 1 < sizes[1]
    assert split_up.metrics == {name: pytest.approx(value, rel=1e-5) for name, value in whole.metrics.items()}


def test_pairs_with_only_sums_are_refused_where_tokens_are_weighted(
    cache: str, run: dpo_cache.TrainReport
) -> None:
    opened = open_cache(cache)
    pairs, manifest = list(opened.pairs("heldout")), opened.pairs("heldout").manifest
    writer = opened.write_pairs("sums", "train")
    sums = [
        dpo_cache.ScoredPair(entry.pair, only_sum(entry.ref_chosen), only_sum(entry.ref_rejected))
        for entry in pairs
    ]
    writer.add(sums)
    details = {key: value for key, value in manifest.items() if key not in ("num_pairs", "parts", "format")}
    writer.finish({**details, "name": "sums", "split": "train", "token_logps": False})
    given = {"model": run.model, "f_divergence": "reverse_kl", "ld_alpha": 0.5, "log": lambda _: None}
    with pytest.raises(
        NotInCacheError, match="sums/train holds only sums .*`ld_alpha` .*\nUse `ld_reference=False`"
    ):
        dpo_cache.evaluate(cache, "sums", **given)
    plain = dpo_cache.evaluate(cache, "sums", **given, ld_reference=False)
    assert plain.metrics == dpo_cache.evaluate(cache, "heldout", **given, ld_reference=False).metrics
