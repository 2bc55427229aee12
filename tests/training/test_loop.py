import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_cache
from dpo_cache.errors import ModelError, NotInCacheError, OptionError, StepZeroError, TrainingError
from dpo_cache.store import open_cache
from dpo_cache.training import folder as folder_module
from tests.conftest import chat_rows, make_llama, make_tokenizer, naive_token_logps, write_rows

FAST = {"batch_size": 4, "lr": 1e-3, "say": lambda text: None}
KEYS = {
    "step", "epoch", "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen",
    "logps/rejected", "grad_norm", "lr", "num_pairs", "num_tokens", "pairs_per_s", "peak_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    folder = tmp_path_factory.mktemp("trained")
    dpo_cache.precompute(model_folder, write_rows(folder / "pairs.jsonl", chat_rows(15)), str(folder / "cache"))
    dpo_cache.precompute(model_folder, write_rows(folder / "heldout.jsonl", chat_rows(6, seed=9)), str(folder / "cache"))
    return str(folder / "cache")


def train(cache: str, output: Path, **options: object) -> dpo_cache.TrainReport:
    return dpo_cache.train(cache, str(output), **{"pairs": "pairs", **FAST, **options})


def metrics(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def comparable(output: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in ("pairs_per_s", "peak_bytes")} for line in metrics(output)]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


def test_a_run_holds_config_metrics_and_a_model_that_loads(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", eval_pairs="heldout")
    assert report.finished and report.num_steps == 4 and report.num_pairs == 15
    lines = metrics(tmp_path / "run")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(set(line) == KEYS for line in steps)
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 4]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["batch_size"] == 4 and config["resolved"]["num_pairs"] == 15
    tokenizer = AutoTokenizer.from_pretrained(report.model)
    assert tokenizer.chat_template == make_tokenizer().chat_template
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["config.json", "metrics.jsonl", "model"]
    trained = weights(report.model)
    assert any(not torch.equal(value, trained[name]) for name, value in make_llama().state_dict().items())


def test_at_step_zero_every_reward_is_zero_and_every_loss_ln_2(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", eval_pairs="heldout", max_steps=1)
    assert report.step_zero_gap is not None and report.step_zero_gap < 1e-4
    for line, prefix in ((report.eval_before, "eval/"), (report.first, "")):
        assert line is not None
        assert line[f"{prefix}loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
        assert abs(line[f"{prefix}rewards/chosen"]) < 1e-5 and abs(line[f"{prefix}rewards/rejected"]) < 1e-5


def test_metrics_are_what_a_naive_loop_computes(cache: str, tmp_path: Path) -> None:
    train(cache, tmp_path / "run", shuffle=False, lr_schedule="constant", warmup_ratio=0.0, max_steps=2, batch_size=5, max_grad_norm=0.5)
    model = make_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    pairs = list(open_cache(cache).pairs("pairs"))
    for line, batch in zip(metrics(tmp_path / "run"), (pairs[:5], pairs[5:10]), strict=True):
        sums = []
        for completion in [entry.pair.chosen for entry in batch] + [entry.pair.rejected for entry in batch]:
            ids = torch.from_numpy(completion.sequence_ids.astype("int64"))[None]
            logps = model(input_ids=ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
            sums.append(logps[len(completion.prompt_ids) - 1 :].double().sum())
        reference = [entry.ref_chosen.logps for entry in batch] + [entry.ref_rejected.logps for entry in batch]
        chosen, rejected = torch.stack(sums).chunk(2)
        ref_chosen, ref_rejected = torch.tensor(reference, dtype=torch.float64).chunk(2)
        losses, chosen_rewards, rejected_rewards = dpo_cache.preference_loss(chosen, rejected, ref_chosen, ref_rejected, 0.1)
        losses.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        assert line["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        assert line["rewards/margins"] == pytest.approx((chosen_rewards - rejected_rewards).mean().item(), abs=1e-4)
        assert line["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)


@pytest.mark.parametrize("options", [{"micro_tokens": "1"}, {"micro_tokens": "60"}, {"gradient_checkpointing": True}])
def test_how_a_step_is_run_changes_nothing_beyond_rounding(cache: str, tmp_path: Path, options: dict) -> None:
    train(cache, tmp_path / "whole", batch_size=8, micro_tokens="100000", max_steps=2, lr=1e-4)
    train(cache, tmp_path / "split", batch_size=8, max_steps=2, lr=1e-4, **options)
    for one, other in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "split"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 5, 7])
def test_resumed_equals_uninterrupted_bit_for_bit(cache: str, tmp_path: Path, stop_after: int) -> None:
    options = {"epochs": 2.0, "eval_pairs": "heldout", "eval_every": 2, "weight_decay": 0.1}
    train(cache, tmp_path / "whole", **options)
    steps_seen: list[int] = []

    def note(line: dict) -> None:
        steps_seen.append(line["step"])

    stopped = train(cache, tmp_path / "cut", on_metrics=note, should_stop=lambda: steps_seen[-1] >= stop_after, **options)
    assert not stopped.finished and stopped.num_steps == stop_after
    resumed = train(cache, tmp_path / "cut", resume=True, **options)
    assert resumed.finished and resumed.step_zero_gap is None
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    one, other = weights(tmp_path / "whole" / "model"), weights(tmp_path / "cut" / "model")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_lines_written_past_the_checkpoint_are_dropped_on_resume(cache: str, tmp_path: Path) -> None:
    train(cache, tmp_path / "whole")

    def crash(line: dict) -> None:
        if line["step"] == 3:
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        train(cache, tmp_path / "cut", save_every=2, on_metrics=crash)
    with open(tmp_path / "cut" / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    train(cache, tmp_path / "cut", save_every=2, resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")


def test_only_the_last_checkpoint_is_kept(cache: str, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def look(line: dict) -> None:
        seen.append(sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("*")))

    train(cache, tmp_path / "run", save_every=1, on_metrics=look)
    assert seen == [[], ["step-000001"], ["step-000002"], ["step-000003"]]


def test_resuming_with_other_options_names_them(cache: str, tmp_path: Path) -> None:
    train(cache, tmp_path / "run", should_stop=lambda: True)
    with pytest.raises(TrainingError, match=r"this run was started otherwise:\n  beta: 0.1 before, 0.5 now"):
        train(cache, tmp_path / "run", resume=True, beta=0.5)


def test_training_order_depends_on_the_seed_alone(cache: str, tmp_path: Path) -> None:
    losses = []
    for name, seed, global_seed in (("a", 1, 0), ("b", 1, 99), ("c", 2, 0)):
        torch.manual_seed(global_seed)
        train(cache, tmp_path / name, seed=seed, max_steps=2)
        losses.append([line["logps/chosen"] for line in metrics(tmp_path / name)])
    assert losses[0] == losses[1] != losses[2]


def test_a_fraction_is_held_out_by_prompt(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", eval_fraction=0.3)
    assert report.eval_before is not None and report.eval_before["eval/num_pairs"] + report.num_pairs == 15


def test_neither_data_set_nor_reference_is_needed_given_a_model(model_folder: str, tmp_path: Path) -> None:
    folder, data = tmp_path / "reference", write_rows(tmp_path / "pairs.jsonl", chat_rows(6))
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    dpo_cache.precompute(str(folder), data, str(tmp_path / "cache"))
    folder.rename(tmp_path / "gone")
    Path(data).unlink()
    with pytest.raises(ModelError, match="is gone.\nSay where the policy starts from with --model"):
        train(str(tmp_path / "cache"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert train(str(tmp_path / "cache"), tmp_path / "run", model=model_folder).finished


def test_a_stale_cache_is_caught_at_step_zero_before_any_update(model_folder: str, tmp_path: Path) -> None:
    cache = open_cache(tmp_path / "cache", create=True)
    dpo_cache.precompute(model_folder, write_rows(tmp_path / "pairs.jsonl", chat_rows(6)), str(tmp_path / "cache"))
    pairs = list(cache.pairs("pairs"))
    spoiled = dpo_cache.Score(pairs[2].ref_rejected.token_logps + 0.01)
    pairs[2] = dpo_cache.ScoredPair(pairs[2].pair, pairs[2].ref_chosen, spoiled)
    manifest = cache.pairs("pairs").manifest
    writer = cache.write_pairs("pairs", "train")
    writer.add(pairs)
    writer.finish({key: value for key, value in manifest.items() if key not in ("num_pairs", "parts", "format")})
    with pytest.raises(StepZeroError, match="the policy is the reference, but its log-prob of a completion is"):
        train(str(tmp_path / "cache"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_another_policy_than_the_reference_is_said_not_refused(cache: str, tmp_path: Path) -> None:
    other, remarks = tmp_path / "other", []
    make_llama(seed=3).save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    report = train(cache, tmp_path / "run", model=str(other), max_steps=1, say=remarks.append)
    assert report.step_zero_gap is not None and report.step_zero_gap > 1
    assert any("the policy is another model than the reference" in remark for remark in remarks)


def test_a_loss_that_is_not_finite_stops_and_names_the_rows(cache: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"(?s)weights were not updated.*Rows of the data in this step"):
        train(cache, tmp_path / "run", lr=1e30, lr_schedule="constant", warmup_ratio=0.0, max_grad_norm=0)


def test_bf16_mixed_runs_and_is_close(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", precision="bf16-mixed", max_steps=1, batch_size=2)
    assert report.first is not None and report.first["loss"] == pytest.approx(0.693, abs=0.1)
    assert next(iter(weights(report.model).values())).dtype == torch.float32


def test_folders_that_do_not_fit_are_refused(cache: str, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(TrainingError, match="not an empty folder.\nGo on with --resume, or choose another --output"):
        train(cache, tmp_path / "full")
    with pytest.raises(TrainingError, match="no checkpoint to resume from"):
        train(cache, tmp_path / "absent", resume=True)
    train(cache, tmp_path / "done", max_steps=1)
    with pytest.raises(TrainingError, match="this run is finished"):
        train(cache, tmp_path / "done", max_steps=1, resume=True)


def test_pair_sets_and_references_that_do_not_fit_are_refused(cache: str, model_folder: str, tmp_path: Path) -> None:
    with pytest.raises(NotInCacheError, match=r"no pair set 'absent'.\nIt holds: heldout/train, pairs/train"):
        train(cache, tmp_path / "run", pairs="absent")
    with pytest.raises(NotInCacheError, match="several pair sets to train on.\nSay which with --pairs: heldout/train, pairs/train"):
        train(cache, tmp_path / "run", pairs=None)
    with pytest.raises(NotInCacheError, match="no reference whose id starts with 'ffff'"):
        train(cache, tmp_path / "run", reference="ffff")
    dpo_cache.precompute(model_folder, write_rows(tmp_path / "bf16.jsonl", chat_rows(2)), cache, dtype="bfloat16")
    with pytest.raises(TrainingError, match="was scored by reference"):
        train(cache, tmp_path / "run", eval_pairs="bf16")
    with pytest.raises(TrainingError, match="was scored by reference"):
        train(cache, tmp_path / "run", reference=open_cache(cache).pairs("bf16").reference_id)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0}, {"beta": -1.0}, {"label_smoothing": 0.6}, {"label_smoothing": -0.1}, {"label_smoothing": 0.1, "loss": "ipo"},
        {"loss": "hinge"}, {"batch_size": 0}, {"epochs": 0.0}, {"lr": 0.0}, {"warmup_ratio": 2.0}, {"micro_tokens": "0"},
        {"eval_fraction": 1.0}, {"eval_fraction": 0.5, "eval_pairs": "heldout"}, {"max_grad_norm": -1.0},
    ],
)  # fmt: skip
def test_options_without_sense_are_refused(cache: str, tmp_path: Path, options: dict) -> None:
    with pytest.raises(OptionError):
        train(cache, tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_found_before_training(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(TrainingError, match="are needed for the model and its checkpoints"):
        train(cache, tmp_path / "run")


def test_the_trained_model_prefers_the_chosen_answers(cache: str, tmp_path: Path) -> None:
    report = train(cache, tmp_path / "run", epochs=6.0, lr=2e-3)
    model, reference = AutoModelForCausalLM.from_pretrained(report.model), make_llama()
    wins = 0
    pairs = list(open_cache(cache).pairs("pairs"))
    for entry in pairs:
        gains = [
            float((naive_token_logps(model, side) - naive_token_logps(reference, side)).sum()) for side in (entry.pair.chosen, entry.pair.rejected)
        ]
        wins += gains[0] > gains[1]
    assert wins >= 0.8 * len(pairs)
