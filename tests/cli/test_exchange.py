"""`export` and `import` as a user sees them."""

import json
from pathlib import Path

import pytest

from tests.cli.test_commands import precompute, run  # noqa: F401  (a fixture)


@pytest.fixture
def cache(run, model_folder: str, data_file: str, tmp_path: Path) -> Path:
    precompute(run, model_folder, data_file, tmp_path / "cache")
    return tmp_path / "cache"


def test_export_then_import_then_train(run, cache: Path, tmp_path: Path, model_folder: str) -> None:
    out, other = tmp_path / "out.parquet", tmp_path / "other"
    exported = run("export", cache, "pairs", out)
    assert exported.code == 0
    assert exported.out.splitlines() == [
        "pairs/train: exported as parquet",
        "  pairs    12",
        "  columns  prompt, chosen, rejected, row, prompt_ids, chosen_ids, rejected_ids,",
        "           ref_chosen_logps, ref_rejected_logps",
        f"  written  {out.stat().st_size / 1000:.1f} kB",
        f'The rows are in {out}. Next: datasets.load_dataset("parquet", data_files="{out}")',
    ]
    assert exported.err == ""
    more = run("export", cache, "pairs", out, "--overwrite", "--verbose")
    left_out = [line for line in more.out.splitlines() if line.startswith("Left out: ")]
    assert left_out[0] == "Left out: the log-prob of each token (--token-logps adds it)."
    imported = run("import", other, out, "--reference", "peer", "--name", "p", "--model", model_folder)
    assert (
        imported.code == 0
        and "p/train: imported as ids, reference " in imported.out
        and "(peer)" in imported.out
    )
    assert imported.out.splitlines()[-1] == f"  dpo-cache train --cache {other} --pairs p/train --output RUN"
    trained = run("train", "--cache", other, "--output", tmp_path / "run", "--max-steps", 1)
    assert (
        trained.code == 0
        and "the policy starts as the model of the imported reference 'peer'." in trained.err
    )


def test_json_is_all_of_stdout(run, cache: Path, tmp_path: Path) -> None:
    report = json.loads(run("export", cache, "pairs", tmp_path / "out", "--token-logps", "--json").out)
    assert (report["format"], report["num_pairs"], report["has_text"]) == ("datasets", 12, True)
    report = json.loads(
        run("import", tmp_path / "other", tmp_path / "out", "--reference", "peer", "--json").out
    )
    assert (report["pair_sets"], report["has_token_logps"], report["start_from"]) == (
        ["out/train"],
        True,
        None,
    )


def test_another_pair_set_is_replaced_only_with_overwrite(run, cache: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run("export", cache, "pairs", tmp_path / f"{name}.jsonl")
    words = ("import", tmp_path / "other", "--reference", "peer", "--name", "p", "--dataset")
    assert run(*words, tmp_path / "one.jsonl").code == 0
    refused = run(*words, tmp_path / "two.jsonl", "--dtype", "float16")
    assert (refused.code, refused.out) == (1, "")
    assert refused.err.splitlines()[-4:] == [
        f"error: {tmp_path}/other: there is another pair set p/train, of 12 pairs; it and the new one differ in",
        f"  source: {tmp_path}/one.jsonl and {tmp_path}/two.jsonl",
        "  dtype: none and float16",
        "Give the new one another --name, or replace the other one with --overwrite.",
    ]
    for flag in ("--overwrite", "--replace"):
        assert run(*words, tmp_path / "two.jsonl", "--dtype", "float16", flag).code == 0


def test_mistakes_give_one_error(run, cache: Path, tmp_path: Path, data_file: str) -> None:
    (tmp_path / "out.jsonl").write_text("mine")
    there = run("export", cache, "pairs", tmp_path / "out.jsonl")
    assert (there.code, there.err.splitlines()) == (
        2,
        [
            f"error: {tmp_path}/out.jsonl is there already.",
            "Choose another output, or replace it with --overwrite.",
        ],
    )
    assert (tmp_path / "out.jsonl").read_text() == "mine"
    missing = run("import", tmp_path / "other", data_file, "--reference", "peer")
    assert missing.code == 1
    assert missing.err == (
        f"error: {data_file}: split train has no column ref_chosen_logps or ref_rejected_logps, but "
        "prompt, chosen, rejected.\n"
        "Name the columns that hold sums of log-probs with --map, for example --map "
        "ref_chosen_logps=COLUMN.\n"
    )
    twice = run(
        "import",
        tmp_path / "other",
        data_file,
        "--reference",
        "peer",
        "--map",
        "prompt=a",
        "--map",
        "prompt=b",
    )
    assert (twice.code, twice.err) == (
        2,
        "error: --map prompt=b: prompt is a already.\nGive each name one column.\n",
    )
