"""`dpo-cache train`: what it prints, and how its options come together."""

import json
import shlex
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.lm import policy
from dpo_cache.training.gradient_check import GradientCheck
from tests.cli.test_commands import run  # noqa: F401  (a fixture)
from tests.conftest import chat_rows, write_rows

COMMON = ("--batch-size", 4, "--lr", 1e-3, "--pairs", "pairs", "--max-steps", 2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    for name, rows in (("pairs", chat_rows(12)), ("heldout", chat_rows(6, seed=9))):
        dpo_cache.precompute(model_folder, write_rows(folder / f"{name}.jsonl", rows), folder / "cache")
    return folder / "cache"


def test_a_dry_run_prints_the_plan_and_writes_nothing(run, cache: Path, tmp_path: Path) -> None:
    done = run("train", "--cache", cache, "--output", tmp_path / "run", *COMMON, "--lora-r", 2, "--dry-run")
    assert done.code == 0, done.err
    lines = {line[2:].split("  ")[0]: line.split("  ")[-1].strip() for line in done.out.splitlines()[1:-1]}
    assert done.out.startswith(f"{tmp_path}/run: a dry run\n")
    assert "less memory" in done.out and "--memory small; `dpo-cache plan` predicts how much less" in done.out
    assert done.out.endswith("Nothing was written. Next: the same command without --dry-run.\n")
    assert lines["pairs"] == "pairs/train, 12" and lines["steps"] == "2" and lines["precision"] == "fp32"
    assert (
        lines["parameters trained"] == "1,856 of 34,272"
        and {"time of the run", "memory of the run", "disk of the run"} <= {*lines}
        and lines["a step on the longest pairs"].endswith("for 4 pairs")
    )
    assert not (tmp_path / "run").exists()


def test_a_config_fills_in_what_is_not_given(run, cache: Path, tmp_path: Path) -> None:
    first = run(
        "train",
        "--cache",
        cache,
        "--output",
        tmp_path / "one",
        *COMMON,
        "--loss",
        "ipo",
        "--beta",
        0.3,
        "--lora-r",
        2,
    )
    assert first.code == 0, first.err
    config = tmp_path / "one" / "config.json"
    assert run("train", "--config", config, "--output", tmp_path / "two", "--beta", 0.1).code == 0
    found = json.loads((tmp_path / "two" / "config.json").read_text())
    assert (found["loss"], found["beta"], found["lora_r"], found["max_steps"]) == (["ipo"], 0.1, 2, 2)
    assert found["output"] == str(tmp_path / "two") and found["config"] == str(config)
    lacking = run("train", "--config", config)
    assert (lacking.code, lacking.err) == (2, "error: --output is needed.\n")


def test_the_report_names_the_next_commands(run, cache: Path, tmp_path: Path) -> None:
    done = run(
        "train",
        "--cache",
        cache,
        "--output",
        tmp_path / "run",
        *COMMON,
        "--eval-pairs",
        "heldout",
        "--lora-r",
        2,
    )
    assert done.out.splitlines()[-2:] == [
        f"  dpo-cache eval --cache {cache} --pairs heldout/train --model {tmp_path}/run/model --loss sigmoid "
        "--beta 0.1",
        f'  AutoModelForCausalLM.from_pretrained("{tmp_path}/run/model")',
    ]
    assert (
        run("eval", "--cache", cache, "--pairs", "heldout/train", "--model", tmp_path / "run/model").code == 0
    )


def test_the_suggested_eval_repeats_the_losses_of_the_run(run, cache: Path, tmp_path: Path) -> None:
    losses = ("--loss", "ipo:0.8", "--loss", "sft:0.2", "--beta", 0.3, "--ld-alpha", 0.5, "--no-ld-reference")
    more = ("--eval-pairs", "heldout", *losses)
    done = run("train", "--cache", cache, "--output", tmp_path / "run", *COMMON, *more)
    suggested = shlex.split(done.out.splitlines()[-2])
    assert suggested[:2] == ["dpo-cache", "eval"] and suggested[-9:] == [*map(str, losses)]
    (tmp_path / "run").rename(tmp_path / "moved")  # without its config.json, too
    (tmp_path / "moved" / "model").rename(tmp_path / "model")
    suggested[suggested.index("--model") + 1] = str(tmp_path / "model")
    report = json.loads(run(*suggested[1:], "--json").out)
    lines = map(json.loads, (tmp_path / "moved" / "metrics.jsonl").read_text().splitlines())
    assert report["metrics"]["loss"] == pytest.approx([*lines][-1]["eval/loss"], rel=1e-4)


def test_pairs_are_called_held_out_only_if_the_run_trains_on_none_of_them(
    run, cache: Path, tmp_path: Path
) -> None:
    found = {}
    for name, more in {
        "others": ("--eval-pairs", "heldout"),
        "same": ("--eval-pairs", "pairs"),
        "share": ("--eval-fraction", 0.4),
    }.items():
        output = tmp_path / name
        done = run("train", "--cache", cache, "--output", output, *COMMON, *more)
        assert done.code == 0, done.err
        after = next(line for line in done.out.splitlines() if ", after  " in line)
        card = (output / "model" / "README.md").read_text()
        found[name] = (after.split(",")[0].strip(), "| held out, after |" in card, "not held out" in done.err)
        assert ("The held-out pairs are a share of pairs/train." in done.out) == (name == "share")
        assert ("  dpo-cache eval " in done.out) == (name != "share")
    assert found == {
        "others": ("held out", True, False),
        "same": ("evaluation", False, True),
        "share": ("held out", True, False),
    }


def test_progress_shows_loss_margin_accuracy_speed_memory_and_time(
    run, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cache.progress.QUIET_SECONDS", 0.0)
    done = run("train", "--cache", cache, "--output", tmp_path / "run", *COMMON)
    lines = [line for line in done.err.splitlines() if line.startswith("training  step")]
    assert len(lines) == 2
    for word in ("step 1/2", "loss 0.6931", "accuracy", "margin +0.0000", "pairs/s", "GB", "left"):
        assert word in lines[0] or word in lines[0].replace("MB", "GB"), (word, lines[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora-alpha", "4"], "error: --lora-alpha 4.0 is used only with --lora-r.\n"),
        (["--lora-r", "2", "--peft-config", "x.json"], "error: --lora-r and --peft-config: give one of "
            "them.\n"),
        (
            ["--eval-every", "often", "--eval-pairs", "heldout"],
            "error: --eval-every often: expected a number of steps above 0, or of epochs as in 0.5epochs.\n",
        ),
        (["--eval-every", "2"], "error: --eval-every 2: there is nothing to evaluate on.\n"
            "Give --eval-pairs or --eval-fraction.\n"),
        (["--sample", "2"], "error: --sample 2: there is nothing to evaluate on.\n"
            "Give --eval-pairs or --eval-fraction.\n"),
        (["--patience", "2", "--eval-pairs", "heldout"], "error: --patience 2: set how often to evaluate with "
            "--eval-every.\n"),
        (["--log-to", "paper"], "error: --log-to paper: expected one of tensorboard, wandb, trackio, "
            "mlflow.\n"),
        (["--log-names", "original"], "error: --log-names original is used only with --log-to.\n"),
        (["--dry-run", "--resume"], "error: --dry-run and --resume: a dry run starts at the beginning.\n"
            "Give one of them.\n"),
        (["--rounding", "nearest"], "error: --rounding nearest is used only with --precision bf16, which "
            "updates in bf16.\n"),
        (["--keep", "0"], "error: --keep 0: expected a number above 0.\n"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_usage_errors(
    run, cache: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    done = run("train", "--cache", cache, "--output", tmp_path / "run", *options)
    assert (done.code, done.err, done.out) == (2, message, "")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--save-every", 1],
            "interrupted: {run}/checkpoints/step-000001 has the last state that was saved. Next: "
            "dpo-cache train --resume {run}\n",
        ),
        (
            [],
            "interrupted: before the first checkpoint, so nothing is kept. Next: the same command; "
            "--save-every N saves earlier.\n",
        ),
    ],
)
def test_a_run_that_is_stopped_at_once_names_its_last_checkpoint(
    run, cache, tmp_path, monkeypatch, options, expected
) -> None:
    forward, calls = policy.completion_logps, []

    def stop(*arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(*arguments, **more)

    monkeypatch.setattr(policy, "completion_logps", stop)
    monkeypatch.setattr(GradientCheck, "problem", lambda *_: "")  # it runs a pair, too
    done = run(
        "train", "--cache", cache, "--output", tmp_path / "run", *COMMON, "--step-zero", "off", *options
    )
    assert (done.code, done.out) == (130, "")
    assert done.err.endswith(expected.format(run=tmp_path / "run")) and "error" not in done.err
