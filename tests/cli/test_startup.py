"""What is wrong with a command is found before torch, transformers or datasets is imported."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.store.caches import make_cache

# One process has imported the command line, and forks one more for each command.
RUN = """
import contextlib, importlib.util, io, json, os, sys, tempfile
import dpo_cache.planning.start
find_spec = importlib.util.find_spec
from dpo_cache.cli.app import main
for arguments in (["--help"], ["ls", "/proc/none"]):  # loads what all commands load
    sys.argv = ["dpo-cache", *arguments]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        with contextlib.suppress(SystemExit):
            main()
found = {}
for case, words in json.loads(sys.stdin.read()).items():
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as result:
        child = os.fork()
        if not child:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.argv, code = ["dpo-cache", *words], None
            absent = case.rpartition(" without ")[2]  # a package that is not installed
            importlib.util.find_spec = lambda name, *rest: None if name == absent else find_spec(name, *rest)
            try:
                main()
            except SystemExit as leaving:
                code = leaving.code
            sys.stdout.flush()
            heavy = sorted({"torch", "transformers", "datasets"} & set(sys.modules))
            json.dump([code, heavy], result)
            result.flush()
            os._exit(0)
        os.waitpid(child, 0)
        output.seek(0)
        result.seek(0)
        found[case] = [json.loads(result.read() or "null"), output.read()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache, files of every wrong kind, and a run that is finished."""
    root = tmp_path_factory.mktemp("startup")
    make_cache(root / "cache")
    (root / "notes").mkdir()
    (root / "notes" / "notes.txt").write_text("mine")
    (root / "empty.jsonl").write_text("")
    (root / "data.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (root / "data.xml").write_text("<a/>")
    (root / "model").mkdir()
    (root / "model" / "config.json").write_text("{}")
    (root / "broken").mkdir()
    (root / "broken" / "config.json").write_text("{not json")
    (root / "list.json").write_text("[1, 2]")
    (root / "object.json").write_text('{"r": 4}')
    (root / "home").mkdir()  # no tracker has a key there
    return root


PRECOMPUTE = [
    "precompute",
    "--model",
    "{root}/model",
    "--dataset",
    "{root}/data.jsonl",
    "--cache",
    "{root}/new",
]
PLAN = ["plan", "--model", "{root}/model"]
TRAIN = ["train", "{root}/cache", "--output", "{root}/run"]
EVAL = ["eval", "{root}/cache", "--model", "{root}/model"]
SWEEP = ["sweep", "{root}/cache", "--output", "{root}/sweep", "--beta", "0.1,0.2"]
IMPORT = ["import", "{root}/new", "{root}/data.jsonl", "--reference", "peer"]
NO_BITS = "needs bitsandbytes, which is not installed.\nRun `pip install 'dpo-cache[quantize]'`."
NO_KEY = (
    "--log-to wandb cannot be opened: No API key configured. Use `wandb login` to log in.\n"
    "Correct that, set WANDB_MODE=offline to log without an account, or leave it out."
)
NO_CACHE = "{root}/none: no dpo-cache here (no such folder)."
NO_MODEL = "{root}/none: no model can be loaded from it (no such folder)."
BROKEN = "{root}/broken: no model can be loaded from it (config.json is not JSON)."
NO_PAIRS = "{root}/cache: no pair set 'other'."
WRONG = {
    "precompute option": ([*PRECOMPUTE, "--budget-tokens", "lots"], 2, "--budget-tokens lots: expected"),
    "precompute model": ([*PRECOMPUTE, "--model", "{root}/none"], 1, NO_MODEL),
    "precompute model folder": (
        [*PRECOMPUTE, "--model", "{root}/notes"],
        1,
        "{root}/notes: no model can be loaded from it (no config.json in it).",
    ),
    "precompute dataset": (
        [*PRECOMPUTE, "--dataset", "{root}/none.jsonl"],
        1,
        "{root}/none.jsonl: no such file or folder.",
    ),
    "precompute empty": ([*PRECOMPUTE, "--dataset", "{root}/empty.jsonl"], 1, "{root}/empty.jsonl: the file is"),
    "precompute kind": ([*PRECOMPUTE, "--dataset", "{root}/data.xml"], 1, "{root}/data.xml: files of kind .xml"),
    "precompute cache": ([*PRECOMPUTE, "--cache", "{root}/notes"], 1, "{root}/notes: the folder holds other things"),
    "precompute config": ([*PRECOMPUTE, "--model", "{root}/broken"], 1, BROKEN),
    "precompute name": ([*PRECOMPUTE, "--name", "a/b/c"], 2, "'a/b/c' cannot name a pair set"),
    "precompute empty name": ([*PRECOMPUTE, "--name", ""], 2, "--name is empty.\nGive a value, or leave it out."),
    "precompute reference": (
        [*PRECOMPUTE, "--cache", "{root}/cache", "--expect-reference", "zz"], 1, "{root}/cache: no reference whose id"
    ),
    "precompute revision": (
        [*PRECOMPUTE, "--revision", "main"], 2, "--revision main: {root}/model is a local folder, and only models"
    ),
    "precompute tokenizer config": (
        [*PRECOMPUTE, "--tokenizer", "{root}/broken"],
        1,
        "{root}/broken: no tokenizer can be loaded from it (config.json is not JSON).\nGive a folder with a "
        "tokenizer, or a Hub id, as --tokenizer.",
    ),
    "precompute url": ([*PRECOMPUTE, "--cache", "file://cache"], 2, "file://cache: expected the URL of a folder of this"),
    "precompute mistyped url": ([*PRECOMPUTE, "--cache", "s3:/b/c"], 2, "s3:/b/c: neither a path nor a URL."),
    "precompute kind of url": ([*PRECOMPUTE, "--cache", "none://c"], 1, "none://c: no file system for this URL"),
    "precompute unusable url": ([*PRECOMPUTE, "--cache", "data://c"], 1, "cannot look for data://c/format.json: "),
    "precompute memory": ([*PRECOMPUTE, "--cache", "memory://c"], 2, "--cache memory://c: would be lost"),
    "import memory": (["import", "memory://c", "{root}/data.jsonl", "--reference", "peer"], 2, "memory://c: would be lost"),
    "train output url": (["train", "{root}/cache", "--output", "s3://b/run"], 2, "--output s3://b/run: expected a path"),
    "eval output url": ([*EVAL, "--output", "s3://b/out.jsonl"], 2, "--output s3://b/out.jsonl: expected a path"),
    "eval output place": ([*EVAL, "--output", "/proc/none/out.jsonl"], 1, "cannot write /proc/none/out.jsonl: No such"),
    "precompute place": (
        [*PRECOMPUTE, "--cache", "/proc/none"], 1, "cannot write /proc/none: No such file or directory.\n"
    ),
    "import place": (["import", "/proc/none", "{root}/data.jsonl", "--reference", "peer"], 1, "cannot write /proc/none"),
    "precompute tokenizer": ([*PRECOMPUTE, "--tokenizer", "./none"], 1, "./none: no tokenizer can be loaded"),
    "precompute template": ([*PRECOMPUTE, "--chat-template", "no.jinja"], 1, "--chat-template no.jinja: not readable"),
    "plan option": ([*PLAN, "--gpu", "nonsense"], 2, "--gpu nonsense: expected a size such as 24GiB or 24GB."),
    "plan both": (
        [*PLAN, "{root}/cache", "--dataset", "{root}/data.jsonl"], 2, "--dataset and --cache: the lengths are those of"
    ),
    "plan model": (["plan", "--model", "{root}/none"], 1, NO_MODEL),
    "plan model config": (["plan", "--model", "{root}/broken"], 1, BROKEN),
    "plan cache": ([*PLAN, "{root}/none"], 1, NO_CACHE),
    "plan pairs": ([*PLAN, "{root}/cache", "--pairs", "other"], 1, NO_PAIRS),
    "plan dataset": ([*PLAN, "--dataset", "{root}/none.jsonl"], 1, "{root}/none.jsonl: no such file or folder."),
    "plan place": ([*PLAN, "--place", "weights=moon"], 2, "--place weights=moon: not known."),
    "plan tokenizer": (
        [*PLAN, "--dataset", "{root}/data.jsonl", "--tokenizer", "./none"], 1, "./none: no tokenizer can be loaded"
    ),
    "train option": ([*TRAIN, "--beta", "0"], 2, "--beta 0.0: expected a number above 0."),
    "train no cache": (["train", "{root}/none", "--output", "{root}/run"], 1, NO_CACHE),
    "train not a cache": (["train", "{root}/notes", "--output", "{root}/run"], 1, "{root}/notes: no dpo-cache here"),
    "train model": ([*TRAIN, "--model", "{root}/none"], 1, NO_MODEL),
    "train pairs": ([*TRAIN, "--pairs", "other"], 1, NO_PAIRS),
    "train eval pairs": ([*TRAIN, "--eval-pairs", "other"], 1, NO_PAIRS),
    "train reference": ([*TRAIN, "--reference", "zz"], 1, "{root}/cache: no reference whose id starts with 'zz'."),
    "train output": (["train", "{root}/cache", "--output", "{root}/notes"], 1, "{root}/notes: not the folder of a run"),
    "train peft config": ([*TRAIN, "--peft-config", "none.json"], 2, "--peft-config none.json: no PEFT config"),
    "train peft list": ([*TRAIN, "--peft-config", "{root}/list.json"], 2, "(list.json is not a JSON object)"),
    "train peft type": ([*TRAIN, "--peft-config", "{root}/object.json"], 2, "can be read from it (no peft_type)"),
    "train model config": ([*TRAIN, "--model", "{root}/broken"], 1, BROKEN),
    "train resume nothing": (
        ["train", "--resume"], 2, "--resume without a folder continues the run in --output, which is not given.\n"
        "Give the folder of the run, as in `dpo-cache train --resume RUN`."
    ),
    "train config": (["train", "--config", "none.json"], 2, "--config none.json: not readable"),
    "train resume": (["train", "--resume", "{root}/notes"], 1, "{root}/notes: there is no run to resume"),
    "eval option": ([*EVAL, "--limit", "0"], 2, "--limit 0: expected"),
    "eval cache": (["eval", "{root}/none", "--model", "{root}/model"], 1, NO_CACHE),
    "eval model": (["eval", "{root}/cache", "--model", "{root}/none"], 1, NO_MODEL),
    "eval config": (["eval", "{root}/cache", "--model", "{root}/broken"], 1, BROKEN),
    "eval revision": ([*EVAL, "--revision", "main"], 2, "--revision main: {root}/model is a local folder"),
    "eval pairs": ([*EVAL, "--pairs", "other"], 1, NO_PAIRS),
    "eval output": ([*EVAL, "--output", "{root}/empty.jsonl"], 2, "{root}/empty.jsonl is there already."),
    "sweep option": ([*SWEEP, "--jobs", "0"], 2, "--jobs 0: expected a whole number above 0."),
    "sweep cache": (["sweep", "{root}/none", "--output", "{root}/sweep"], 1, NO_CACHE),
    "sweep model": ([*SWEEP, "--model", "{root}/none"], 1, NO_MODEL),
    "sweep pairs": ([*SWEEP, "--pairs", "other"], 1, NO_PAIRS),
    "sweep reference": ([*SWEEP, "--reference", "zz"], 1, "{root}/cache: no reference whose id starts with"),
    "sweep peft config": ([*SWEEP, "--peft-config", "{root}/list.json"], 2, "--peft-config {root}/list.json: no PEFT"),
    "sweep resume nothing": (
        ["sweep", "--resume"], 2, "--resume without a folder continues the sweep in --output, which is not given."
    ),
    "sweep output": (["sweep", "{root}/cache", "--output", "{root}/notes"], 1, "{root}/notes: not an empty folder"),
    "sweep resume": (["sweep", "--resume", "{root}/notes"], 1, "{root}/notes: there is no sweep to resume."),
    "export pairs": (["export", "{root}/cache", "other", "{root}/out.jsonl"], 1, NO_PAIRS),
    "export output": (
        ["export", "{root}/cache", "demo", "{root}/empty.jsonl"],
        2,
        "{root}/empty.jsonl is there already.",
    ),
    "import dataset": (["import", "{root}/new", "{root}/none.jsonl", "--reference", "peer"], 1, "{root}/none.jsonl: no"),
    "import model": ([*IMPORT, "--model", "{root}/none"], 1, NO_MODEL),
    "verify cache": (["verify", "{root}/none"], 1, NO_CACHE),
    "import name": ([*IMPORT, "--name", "a/b/c"], 2, "'a/b/c' cannot name a pair set"),
    "verify config": (["verify", "{root}/cache", "--rescore", "5", "--model", "{root}/broken"], 1, BROKEN),
    "verify revision": (
        ["verify", "{root}/cache", "--rescore", "5", "--model", "{root}/model", "--revision", "main"],
        2,
        "--revision main: {root}/model is a local folder",
    ),
    "verify model": (["verify", "{root}/cache", "--rescore", "5", "--model", "{root}/none"], 1, NO_MODEL),
    **{name: ([name, "{root}/none"], 1, NO_CACHE) for name in ("ls", "compact", "gc")},
    "rm": (["rm", "{root}/cache", "pairs", "other"], 1, NO_PAIRS),
    "merge": (["merge", "{root}/none", "{root}/new"], 1, NO_CACHE),
    "diff": (["diff", "{root}/cache", "{root}/none"], 1, NO_CACHE),
    "push": (["push", "{root}/none", "memory://cache"], 1, NO_CACHE),
    "precompute --quantize without bitsandbytes": ([*PRECOMPUTE, "--quantize", "4bit"], 1, f"--quantize 4bit {NO_BITS}"),
    "precompute --ray without ray": (
        [*PRECOMPUTE, "--ray", "local"], 2, "--ray needs Ray, which is not installed.\nInstall it with `pip install"
    ),
    "train --quantize without bitsandbytes": (
        [*TRAIN, "--lora-r", "4", "--quantize", "8bit"], 1, f"--quantize 8bit {NO_BITS}"
    ),
    "train --optimizer without bitsandbytes": (
        [*TRAIN, "--optimizer", "adamw-8bit"], 2, f"--optimizer adamw-8bit {NO_BITS}"
    ),
    "train --log-to without mlflow": (
        [*TRAIN, "--log-to", "mlflow"], 1, "--log-to mlflow needs mlflow-skinny.\nRun `pip install mlflow-skinny`."
    ),
    "train key": ([*TRAIN, "--log-to", "wandb"], 1, NO_KEY),
    "train dry key": ([*TRAIN, "--log-to", "wandb", "--dry-run"], 1, NO_KEY),
    "train place": (["train", "{root}/cache", "--output", "/proc/none/run"], 1, "cannot write /proc/none/run: No such"),
    "train file": (["train", "{root}/cache", "--output", "{root}/data.jsonl/run"], 1, "cannot write {root}/data.jsonl/run"),
    "train template": ([*TRAIN, "--chat-template", "no.jinja"], 1, "--chat-template no.jinja: not readable"),
    "sweep --quantize without bitsandbytes": (
        [*SWEEP, "--lora-r", "4", "--quantize", "4bit"], 1, f"--quantize 4bit {NO_BITS}"
    ),
    "sweep --optimizer without bitsandbytes": (
        [*SWEEP, "--optimizer", "adamw,adamw-8bit"], 2, f"--optimizer adamw-8bit {NO_BITS}"
    ),
    "sweep --log-to without trackio": (
        [*SWEEP, "--log-to", "trackio"], 1, "--log-to trackio needs trackio.\nRun `pip install trackio`."
    ),
    "sweep key": ([*SWEEP, "--log-to", "wandb"], 1, NO_KEY),
    "sweep template": ([*SWEEP, "--chat-template", "no.jinja"], 1, "--chat-template no.jinja: not readable"),
    "sweep --plot without matplotlib": (
        [*SWEEP, "--eval-fraction", "0.5", "--plot", "{root}/plot.svg"], 2, "--plot needs matplotlib.\nInstall it with"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def found(root: Path) -> dict[str, tuple[object, str]]:
    """Of each wrong command: its exit code and the heavy modules that it imported, and what it printed."""
    words = {
        case: [word.format(root=root) for word in arguments] for case, (arguments, _, _) in WRONG.items()
    }
    keys = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC")
    environment = {name: value for name, value in os.environ.items() if name not in keys}
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(words),
        capture_output=True,
        text=True,
        check=True,
        env={**environment, "HOME": str(root / "home"), "PYTHONPATH": str(Path.cwd())},
        cwd=root,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="commands are forked")
@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_found_before_torch_is_imported(
    root: Path, found: dict[str, tuple[object, str]], case: str
) -> None:
    _, code, message = WRONG[case]
    if message is NO_KEY and importlib.util.find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    result, output = found[case]
    assert result == [code, []], output
    assert message.format(root=root) in output, output
    assert not any((root / name).exists() for name in ("new", "run", "sweep"))
