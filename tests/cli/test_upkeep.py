"""The commands that keep a cache up, as a user sees them: exit codes, stdout, and what --json gives."""

import errno
import json
import os
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.store import Cache, open_cache
from tests.cli.test_commands import run  # noqa: F401  (a fixture)
from tests.store.caches import add_pairs, add_reference, add_scores, contents, make_cache
from tests.store.conftest import flip_file
from tests.store.refusing_disk import refuse


@pytest.fixture
def root(tmp_path: Path) -> Path:
    make_cache(tmp_path / "cache")
    return tmp_path / "cache"


def reference_of(root: Path) -> str:
    return Cache(root).references()[0]


def age(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, (0, path.stat().st_mtime - 2 * 86_400))


def test_ls_lists_references_and_pair_sets(run, root: Path) -> None:
    done = run("ls", root)
    lines = done.out.splitlines()
    assert (done.code, done.err) == (0, "")
    assert lines[0].split() == ["reference", "model", "dtype", "completions", "tokens", "size", "shards"]
    assert lines[1].split()[:4] == [reference_of(root)[:12], "example/tiny", "float32", "5"]
    assert lines[4].split()[:5] == [
        "demo/train",
        "2",
        reference_of(root)[:12],
        "example/pairs",
        "2025-01-01T00:00:00+00:00",
    ]
    assert lines[-1].startswith(f"{root} holds 1 reference, 1 pair set: ")
    assert lines[-1].endswith(f"Next: dpo-cache train --cache {root} --pairs demo/train --output RUN")


def test_ls_json_has_all_of_it(run, root: Path) -> None:
    listed = json.loads(run("ls", root, "--json").out)
    assert [entry["completions"] for entry in listed["references"]] == [5]
    assert [(entry["name"], entry["rows"], entry["source"]) for entry in listed["pair_sets"]] == [
        ("demo/train", 2, "example/pairs")
    ]
    assert listed["bytes"] == sum(len(content) for content in contents(root).values())


def test_ls_shows_one_in_full(run, root: Path) -> None:
    assert "tokenization.max_length" in run("ls", root, "demo/train").out
    assert "identity.weights" in run("ls", root, reference_of(root)[:8]).out
    done = run("ls", root, "nothing")
    assert (done.code, done.out) == (1, "") and done.err.startswith(
        f"error: {root}: neither a pair set nor a reference 'nothing'.\n"
    )


def test_ls_json_of_one_has_the_shape_of_the_whole(run, root: Path) -> None:
    whole = json.loads(run("ls", root, "--json").out)
    for name, kept in (("demo", "pair_sets"), (reference_of(root)[:8], "references")):
        one = json.loads(run("ls", root, name, "--json").out)
        assert one == {"cache": str(root), "references": [], "pair_sets": [], kept: whole[kept]}


def test_ls_marks_a_reference_that_was_imported(run, tmp_path: Path) -> None:
    cache = dpo_cache.open_cache(tmp_path / "cache", create=True)
    cache.publish_reference(
        {"imported": "a friend's", "dtype": None, "values": "0" * 64}, {"model": "/models/mine"}
    )
    assert "a friend's (imported)" in run("ls", tmp_path / "cache").out


@pytest.mark.parametrize(
    ("model", "shown"), [("\x1b[2Jgone", "\\x1b[2Jgone"), (["a"], "?"), (1.5, "?")], ids=repr
)
def test_ls_escapes_control_characters(run, tmp_path: Path, model: object, shown: str) -> None:
    cache = dpo_cache.open_cache(tmp_path / "cache", create=True)
    cache.publish_reference({"weights": "0" * 64}, {"model": model})
    done = run("ls", tmp_path / "cache")
    assert done.code == 0 and done.out.splitlines()[1].split()[1:3] == [shown, "?"]


@pytest.mark.parametrize("arguments", [("ls",), ("verify",), ("compact",), ("gc",)])
def test_a_command_to_be_copied_is_quoted(run, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    root = tmp_path / "my cache"
    make_cache(root)
    assert f"'{root}'" in run(*arguments, root).out.splitlines()[-1].partition("Next: dpo-cache ")[2]


def test_ls_marks_what_is_damaged_and_lists_the_rest(run, root: Path) -> None:
    flip_file(root / "pairs/demo/train/manifest.json", 30)
    done = run("ls", root)
    assert done.code == 0 and "example/tiny" in done.out
    assert done.err.startswith(f"damaged: {root}/pairs/demo/train/manifest.json: ")
    assert done.out.splitlines()[-1].endswith(f"Next: dpo-cache verify {root}")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_ls_tells_what_it_may_not_read(run, root: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    refuse(monkeypatch, number, lambda file: file.name == "manifest.json")
    done = run("ls", root)
    assert done.code == 0 and done.err.startswith(f"unreadable: cannot read {root}/pairs/demo/train/manifest")
    assert " unreadable" in done.out and "damaged" not in done.out + done.err
    assert json.loads(run("ls", root, "--json").out)["pair_sets"][0]["damage"] == []


def test_ls_of_an_empty_cache_and_of_none(run, tmp_path: Path) -> None:
    dpo_cache.open_cache(tmp_path / "empty", create=True).publish_format()
    assert run("ls", tmp_path / "empty").out.startswith(f"{tmp_path}/empty holds 0 references, 0 pair sets: ")
    assert run("ls", tmp_path / "none").code == 1


def test_verify_exits_with_1_if_anything_is_damaged(run, root: Path) -> None:
    done = run("verify", root)
    assert (done.code, done.err) == (0, "") and done.out.splitlines()[0] == f"{root}: whole"
    shard = next(root.rglob("scores/*.parquet"))
    flip_file(shard, 40)
    done = run("verify", root)
    assert done.code == 1
    for text in (
        shard.relative_to(root).as_posix() + ": damaged",
        "expected the bytes that were published",
        "found    its bytes hash to",
    ):
        assert text in done.out
    assert done.out.splitlines()[-1] == f"Nothing was changed. Next: dpo-cache verify {root} --repair"
    found = json.loads(run("verify", root, "--json").out)
    assert (found["whole"], found["problems"][0]["kind"]) == (False, "damaged")


def test_verify_repair_prints_the_moved_files_and_the_next_commands(run, root: Path) -> None:
    part = next(root.glob("pairs/demo/train/*.parquet"))
    flip_file(part, 40)
    done = run("verify", root, "--repair")
    assert done.code == 1  # damage was found
    assert f"moved aside: pairs/demo/train/{part.name}\n  to .quarantine/" in done.out
    assert done.out.splitlines()[-2] == "no completion is to be scored again. Next:"
    assert "--repair" not in done.out
    assert done.out.splitlines()[-1].startswith(
        "  dpo-cache precompute --model example/tiny --dataset example/pairs --cache "
    )


def test_verify_of_a_share_says_what_it_read(run, root: Path) -> None:
    done = run("verify", root, "--subset", "10%")
    assert done.code == 0 and "whole, as far as it was read" in done.out.splitlines()[0]
    assert "about 10% of all; the next run reads others" in done.out
    assert done.out.splitlines()[-1].startswith(f"Every file that was read of {root} is what was written.")
    assert json.loads(run("verify", root, "--subset", "50%", "--json").out)["subset"] == 0.5
    refused = run("verify", root, "--subset", "10")
    assert refused.code == 2 and refused.err.startswith("error: --subset 10: expected a percentage above 0%")


def test_verify_says_of_what_cannot_be_read_that_it_may_be_whole(
    run, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = min(root.rglob("scores/*.parquet"))
    refuse(monkeypatch, errno.EIO, lambda path: path == shard)
    done = run("verify", root)
    assert done.code == 1 and done.out.splitlines()[0] == f"{root}: not all of it could be read"
    assert f"{shard.name}: unreadable" in done.out and "Input/output error" in done.out
    assert done.out.splitlines()[-1].startswith("Nothing is known to be damaged.")
    repaired = run("verify", root, "--repair")
    assert repaired.code == 1 and "Files that could not be read were not moved." in repaired.out
    assert "moved aside" not in repaired.out and shard.exists()


def test_verify_rescore(run, model_folder: str, data_file: str, tmp_path: Path) -> None:
    dpo_cache.precompute(model_folder, data_file, tmp_path / "cache")
    done = run("verify", tmp_path / "cache", "--rescore", 5, "--model", model_folder)
    assert done.code == 0 and "the live model agrees" in done.out and "(allowed 0.001)" in done.out
    assert (
        json.loads(run("verify", tmp_path / "cache", "--rescore", 5, "--model", model_folder, "--json").out)[
            "rescored"
        ][0]["completions"]
        == 5
    )
    assert run("verify", tmp_path / "cache", "--rescore", 5).code == 2


def test_verify_prints_its_report_before_a_rescoring_error(
    run, model_folder: str, data_file: str, tmp_path: Path
) -> None:
    root = tmp_path / "cache"
    dpo_cache.precompute(model_folder, data_file, root)
    part = next(root.glob("pairs/*/*/*.parquet"))
    flip_file(part, 40)
    rescore = ("--rescore", 5, "--model", model_folder)
    done = run("verify", root, *rescore)
    assert done.code == 1 and f"{part.name}: damaged" in done.out and done.err.startswith("error: ")
    done = run("verify", root, "--repair", *rescore)
    assert (
        done.code == 1
        and f"moved aside: pairs/pairs/train/{part.name}" in done.out
        and done.err.startswith("error: ")
    )
    assert "dpo-cache precompute --model" in done.out


@pytest.mark.parametrize("ignored", [("--revision", "main"), ("--device", "cpu"), ("--trust-remote-code",)])
def test_verify_refuses_what_only_a_rescoring_uses(run, root: Path, ignored: tuple[str, ...]) -> None:
    done = run("verify", root, *ignored)
    assert (done.code, done.err) == (2, f"error: {ignored[0]} is used only by --rescore.\n")


def test_compact(run, root: Path) -> None:
    done = run("compact", root)
    assert done.code == 0 and "2 -> 1" in done.out
    assert done.out.splitlines()[-1] == f"{root}: 1 of 1 references compacted. Next: dpo-cache ls {root}"
    again = run("compact", root, "--reference", reference_of(root)[:6], "--json")
    assert json.loads(again.out)["references"][0]["shards_after"] == 1
    assert (
        run("compact", root).out.splitlines()[-1]
        == f"{root}: nothing to do, all is compact. Next: dpo-cache ls {root}"
    )


def test_gc_shows_first_and_drops_with_yes(run, root: Path) -> None:
    lonely = add_reference(Cache(root), "b")
    add_scores(Cache(root), lonely, range(3))
    shown = run("gc", root).out.splitlines()
    assert shown[0].split() == ["recent,", "stays", "size", "why"] and lonely in shown[1]
    assert shown[-2].startswith("2 files, ") and shown[-2].endswith(
        "that nothing needs are younger than 24 h 0 min: a run may be about to use them."
    )
    assert shown[-1] == f"{root}: nothing to drop that is older than 24 h 0 min. Next: dpo-cache ls {root}"
    age(root)
    before = contents(root)
    shown = run("gc", root)
    assert shown.code == 0 and f"references/{lonely}/reference.json" in shown.out
    assert shown.out.splitlines()[-1].endswith(
        "can be removed. Nothing was removed. Next: the same command with --yes"
    )
    assert contents(root) == before
    assert json.loads(run("gc", root, "--keep", lonely[:8], "--json").out)["garbage"] == []
    assert run("gc", root, "--yes").out.splitlines()[-1].startswith(f"{root}: 2 files, ")
    assert Cache(root).references() != [] and lonely not in Cache(root).references()


def test_gc_drops_unused_scores_and_young_files_only_with_their_options(run, root: Path) -> None:
    assert json.loads(run("gc", root, "--grace", 0, "--json").out)["garbage"] == []
    assert json.loads(run("gc", root, "--scores", "--json").out)["garbage"] == []  # all is young
    done = run("gc", root, "--scores", "--grace", 0, "--yes")
    assert done.code == 0 and "no pair set holds 1 of its 3 completions (the rest is kept)" in done.out
    assert len(Cache(root).scores(reference_of(root))) == 4


def test_merge_prefers_or_renames(run, root: Path, tmp_path: Path) -> None:
    make_cache(tmp_path / "other", pairs=((2, 4),))
    refused = run("merge", tmp_path / "other", root)
    assert refused.code == 1 and refused.err.startswith(
        "error: one pair set has another content in another cache; nothing was copied:\n"
    )
    assert len(Cache(root).pairs("demo")) == 2
    assert (
        "other of that name left out  demo/train"
        in run("merge", tmp_path / "other", root, "--prefer", "dest").out
    )
    assert run("merge", tmp_path / "other", root, "--rename").code == 0 and len(Cache(root).pair_sets()) == 2
    assert (
        run("merge", tmp_path / "other", root, "--prefer", "src").code == 0
        and len(Cache(root).pairs("demo/train")) == 1
    )


def test_merge_names_values_that_disagree(run, tmp_path: Path) -> None:
    for name, shift in (("a", 0.0), ("b", 0.5)):
        cache = open_cache(tmp_path / name, create=True)
        add_scores(cache, add_reference(cache), [1, 2], shift=shift)
    refused = run("merge", tmp_path / "b", tmp_path / "a")
    assert refused.code == 1 and refused.err.splitlines()[2] == (
        "Keep the destination's values with --prefer dest, or the last source's with --prefer src; "
        "`dpo-cache verify CACHE --rescore N --model MODEL` shows which are right."
    )
    merged = run("merge", tmp_path / "b", tmp_path / "a", "--prefer", "src")
    reference = Cache(tmp_path / "a").references()[0][:12]
    assert f"  other values left out  of 2 completions of reference {reference}\n" in merged.out


def test_merge_and_diff(run, root: Path, tmp_path: Path) -> None:
    other = make_cache(tmp_path / "other", shards=((5, 6),), pairs=())
    add_pairs(other, reference_of(root), [(5, 6)], name="more")
    merged = run("merge", root, tmp_path / "other", tmp_path / "all")
    assert merged.code == 0 and "demo/train, more/train" in merged.out
    assert (
        merged.out.splitlines()[-1] == f"{tmp_path}/all holds all of them. Next: dpo-cache ls {tmp_path}/all"
    )
    same = run("merge", tmp_path / "other", root, tmp_path / "all", "--json")
    assert json.loads(same.out)["copied_files"] == 0
    differ = run("diff", root, tmp_path / "all")
    assert differ.code == 1
    assert f"only in B ({tmp_path}/all): pair set more/train" in differ.out
    assert (
        f"reference {reference_of(root)[:12]}: 0 completions only in A, 2 only in B, 5 in both" in differ.out
    )
    equal = run("diff", root, root)
    assert (equal.code, equal.out) == (0, f"{root} and {root} hold the same.\n")
    assert json.loads(run("diff", root, root, "--json").out)["equal"] is True
    assert run("diff", root, tmp_path / "none").code == 1


def test_merge_needs_a_source_and_one_choice(run, root: Path, tmp_path: Path) -> None:
    assert run("merge", root).code == 2
    done = run("merge", root, tmp_path / "all", "--prefer", "src", "--rename")
    assert (done.code, done.err) == (2, "error: --prefer and --rename: give one of them.\n")


def test_rm_shows_first_and_removes_with_yes(run, root: Path) -> None:
    before = contents(root)
    shown = run("rm", root, "pairs", "demo")
    assert shown.code == 0 and shown.out.splitlines()[-1].endswith(
        "would be removed. Nothing was removed. Next: the same command with --yes"
    )
    assert contents(root) == before
    refused = run("rm", root, "reference", reference_of(root)[:8], "--yes")
    assert refused.code == 1 and "has pair sets: demo/train.\n" in refused.err and contents(root) == before
    assert run("rm", root, "pairs", "demo/train", "--yes").code == 0 and Cache(root).pair_sets() == []
    assert (
        json.loads(run("rm", root, "reference", reference_of(root)[:8], "--yes", "--json").out)["removed"]
        is True
    )
    assert list(contents(root)) == ["format.json"]
    assert run("rm", root, "everything", "x").code == 2
    assert (
        run("rm", root, "pairs", "demo", "--with-pairs").err
        == "error: --with-pairs goes with reference: pairs are removed anyway.\n"
    )
