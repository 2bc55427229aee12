"""What a user sees: exit codes, exact error texts, results on stdout, remarks on stderr."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest

from dpo_cache.cli import app as app_module
from dpo_cache.data.refusals import ACCEPTED
from dpo_cache.losses.table import LOSSES
from tests import programs
from tests.conftest import chat_rows, make_llama, make_tokenizer, write_rows
from tests.waiting import wait_until


class Done:
    def __init__(self, code: int, out: str, err: str):
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Run the command line in this process."""

    def invoke(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["dpo-cache", *map(str, arguments)])
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as leaving:
            app_module.main()
        signal.signal(signal.SIGTERM, before)
        out, err = capsys.readouterr()
        return Done(int(leaving.value.code or 0), out, err)

    return invoke


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def precompute(run, model: object, data: object, cache: Path, *more: object) -> Done:
    return run("precompute", "--model", model, "--dataset", data, "--cache", cache, *more)


def test_precompute_then_train(run, model_folder: str, data_file: str, cache: Path, tmp_path: Path) -> None:
    first = precompute(run, model_folder, data_file, cache)
    assert first.code == 0
    report = first.out.partition("attention: ")[2].splitlines()[1:]
    labels = [re.split(r"(?<=\S)  +", line[2:])[0] for line in report if line.startswith("  ")][:-1]
    assert labels == [
        "pairs kept", "completions", "  distinct", "  already cached", "  scored now", "tokens run", "time", "peak memory",
    ]  # fmt: skip
    for line in ("pairs kept        12", "    already cached  0", "    scored now      20"):
        assert line in first.out
    assert f"dpo-cache train --cache {cache} --pairs pairs/train --output RUN" in first.out
    second = precompute(run, model_folder, data_file, cache)
    assert (
        "everything was cached, no model was loaded" in second.out and "    scored now      0" in second.out
    )
    details = precompute(run, model_folder, data_file, cache, "--verbose").out
    for line in ("rows read           12", "rows dropped        0", "    distinct          20"):
        assert line in details
    trained = run(
        "train",
        "--cache",
        cache,
        "--output",
        tmp_path / "run",
        "--batch-size",
        4,
        "--eval-fraction",
        0.3,
        "--lr",
        1e-3,
    )
    assert trained.code == 0
    assert "step zero: largest gap" in trained.err
    assert "held out, before" in trained.out and "held out, after" in trained.out
    assert f'AutoModelForCausalLM.from_pretrained("{tmp_path}/run/model")' in trained.out.splitlines()[-1]


def test_json_is_all_of_stdout(run, model_folder: str, data_file: str, cache: Path, tmp_path: Path) -> None:
    report = json.loads(precompute(run, model_folder, data_file, cache, "--json").out)
    assert (report["scored_now"], report["pair_sets"], report["dropped"]) == (20, ["pairs/train"], {})
    trained = json.loads(
        run("train", "--cache", cache, "--output", tmp_path / "run", "--max-steps", 1, "--json").out
    )
    assert trained["finished"] is True and trained["num_steps"] == 1


WRONG_DATA = {
    "missing": (None, "error: {path}: no such file or folder.\n"),
    "empty": ("", "error: {path}: the file is empty.\n"),
    "columns": (
        '{"question": "a", "answer": "b"}\n',
        "error: {path}: split train is not preference data: found the columns question, answer; accepted "
        "are\n"
        f"{ACCEPTED}\n"
        "Name the columns that correspond with --map, for example --map prompt=question, or rename them.\n",
    ),
    "empty field": (
        '{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": "", "rejected": "c"}\n',
        "error: {path}: split train: 1 row cannot be used (format text):\n"
        "  `chosen` is empty: 1 row, line 2\n"
        "Correct or remove them and run again.\n",
    ),
}


@pytest.mark.parametrize("case", WRONG_DATA)
def test_wrong_data_gets_one_clear_error(
    run, case: str, model_folder: str, tmp_path: Path, cache: Path
) -> None:
    content, message = WRONG_DATA[case]
    path = tmp_path / "data.jsonl"
    if content is not None:
        path.write_text(content)
    done = precompute(run, model_folder, path, cache)
    assert (done.code, done.err, done.out) == (1, message.format(path=path), "")
    assert not cache.exists()


def test_conversations_need_a_chat_template(run, data_file: str, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "plain"
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    make_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    done = precompute(run, folder, data_file, cache)
    assert done.code == 1
    assert done.err == (
        f"error: the data holds conversations, but the tokenizer {folder} has no chat template.\n"
        "Give one with --chat-template FILE (Jinja), or a tokenizer that has one with --tokenizer.\n"
    )
    template = tmp_path / "template.jinja"
    template.write_text(make_tokenizer().chat_template)
    assert precompute(run, folder, data_file, cache, "--chat-template", template).code == 0


def test_a_model_without_a_causal_head_is_refused(run, data_file: str, tmp_path: Path, cache: Path) -> None:
    from transformers import LlamaModel

    folder = tmp_path / "headless"
    LlamaModel(make_llama().config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    done = precompute(run, folder, data_file, cache)
    assert done.code == 1
    assert done.err == (
        f"error: {folder}: its architecture is LlamaModel, which has no causal LM head.\n"
        "Give a model whose architecture ends in ForCausalLM or LMHeadModel.\n"
    )


def test_a_missing_model_is_an_error(run, data_file: str, tmp_path: Path, cache: Path) -> None:
    done = precompute(run, tmp_path / "nowhere", data_file, cache)
    assert done.code == 1
    assert done.err.startswith(f"error: {tmp_path}/nowhere: no model can be loaded from it")
    assert done.err.endswith("Give a local folder with config.json, or a Hub id.\n")


def test_pickled_weights_are_not_read(run, data_file: str, tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "pickled"
    make_llama().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    done = precompute(run, folder, data_file, cache)
    assert (
        done.code == 1
        and "no safetensors weights.\nPickled checkpoints (.bin) can run code and are not read" in done.err
    )


def test_a_cache_of_a_newer_format_is_refused(
    run, model_folder: str, data_file: str, cache: Path, tmp_path: Path
) -> None:
    cache.mkdir()
    (cache / "format.json").write_text('{"format": "dpo-cache", "version": 2}')
    expected = (
        f"error: {cache}: made by a newer dpo-cache (cache format 2, this one reads 1).\n"
        "Run `pip install --upgrade dpo-cache`, or choose another --cache.\n"
    )
    assert precompute(run, model_folder, data_file, cache).err == expected
    assert run("train", "--cache", cache, "--output", tmp_path / "run").err == expected


def test_a_run_folder_in_use_is_refused(
    run, model_folder: str, data_file: str, cache: Path, tmp_path: Path
) -> None:
    precompute(run, model_folder, data_file, cache)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes").write_text("mine")
    done = run("train", "--cache", cache, "--output", tmp_path / "run")
    assert (done.code, done.err) == (
        1,
        f"error: {tmp_path}/run: not the folder of a run; it holds notes.\nChoose another --output.\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--beta", "0"], "error: --beta 0.0: expected a number above 0.\n"),
        (["train", "--label-smoothing", "0.7"], "error: --label-smoothing 0.7: expected 0 to 0.5.\n"),
        (
            ["train", "--loss", "ipo", "--label-smoothing", "0.1"],
            "error: --label-smoothing 0.1 has no meaning under --loss ipo.\n"
            "Leave it out; it is used by sigmoid, exo_pair, robust, aot, aot_unpaired, simpo, cpo.\n",
        ),
        (
            ["train", "--loss", "best"],
            f"error: --loss best: expected one of {', '.join(LOSSES)}; sigmoid is DPO.\n",
        ),
        (
            ["train", "--budget-tokens", "lots"],
            "error: --budget-tokens lots: expected auto or a positive number.\n",
        ),
    ],
)
def test_usage_errors_exit_with_2(
    run, arguments: list[str], message: str, cache: Path, tmp_path: Path
) -> None:
    done = run(*arguments, "--cache", cache, "--output", tmp_path / "run")
    assert (done.code, done.err, done.out) == (2, message, "")


def test_unknown_options_and_missing_ones_exit_with_2(run, cache: Path) -> None:
    assert run("train", "--cache", cache, "--colour", "red").code == 2
    assert run("train", "--cache", cache).code == 2
    assert run("rescore").code == 2
    assert run().code in (0, 2)


def test_ctrl_c_while_training_saves_and_resumes(model_folder: str, tmp_path: Path, run, cache: Path) -> None:
    precompute(run, model_folder, write_rows(tmp_path / "pairs.jsonl", chat_rows(20)), cache)
    command = [
        "train",
        "--cache",
        str(cache),
        "--output",
        str(tmp_path / "run"),
        "--batch-size",
        "2",
        "--epochs",
        "6",
    ]
    program = programs.start(*command)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(
        lambda: program.has_ended() or (metrics.exists() and metrics.read_text().count("\n") >= 3),
        "three lines of metrics.jsonl",
    )
    program.send_signal(signal.SIGINT)
    done = program.wait()
    assert done.code == 130, done.err
    assert "stopping after this step, then saving" in done.err
    steps = metrics.read_text().count("\n")
    assert re.findall(r"step-(\d+)", str(sorted((tmp_path / "run" / "checkpoints").iterdir()))) == [
        f"{steps:06d}"
    ]
    assert run(*command, "--resume").code == 0
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(range(1, 61))
