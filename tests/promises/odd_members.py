"""Sealed documents with members of other kinds than expected, and the commands that read them."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from typer.testing import CliRunner

import dpo_cache
from dpo_cache.cli.app import app
from dpo_cache.errors import DpoCacheError
from dpo_cache.exchange import export_pairs
from dpo_cache.store import open_cache
from dpo_cache.store.format.documents import Document, digest_json, open_sealed, seal_document
from dpo_cache.store.upkeep.commands import precompute_line
from dpo_cache.store.upkeep.copy import copy_cache
from dpo_cache.store.upkeep.merge import merge_caches

MISSING = object()
VALUES = (
    MISSING,
    None,
    True,
    7,
    -1,
    1e308,
    10**30,
    "",
    "x",
    "a=b",
    "../..",
    [],
    ["x"],
    ["a=b"],
    [7],
    {},
    {"a": 1},
)

Path_ = tuple[str, ...]


def member_paths(document: Document, outer: Path_ = ()) -> Iterator[Path_]:
    """Every member, and the members of members."""
    for name, value in document.items():
        yield (*outer, name)
        if isinstance(value, dict):
            yield from member_paths(value, (*outer, name))


def mutations(document: Document) -> Iterator[tuple[str, Document]]:
    """The document with one other value in one place, and a name for each."""
    for path in member_paths(document):
        for value in VALUES:
            changed = copy.deepcopy(document)
            place = changed
            for name in path[:-1]:
                place = place[name]
            if value is MISSING:
                del place[path[-1]]
            else:
                place[path[-1]] = value
            yield f"{'.'.join(path)} = {'missing' if value is MISSING else repr(value)}", changed


def read(path: Path) -> Document:
    return open_sealed(path.read_bytes(), str(path))


def with_manifest(base: Path, folder: Path, manifest: Document) -> None:
    """A copy of the cache with another manifest."""
    _copy(base, folder)
    (path,) = folder.glob("pairs/pairs/train/manifest.json")
    path.write_bytes(seal_document(manifest))


def with_reference(base: Path, folder: Path, reference: Document) -> None:
    """A copy of the cache with another entry, under the id of its identity."""
    _copy(base, folder)
    (old,) = (folder / "references").iterdir()
    identity = reference.get("identity")
    new = old.with_name(digest_json(identity)) if isinstance(identity, dict) else old
    if new != old:
        old.rename(new)
        (path,) = folder.glob("pairs/pairs/train/manifest.json")
        path.write_bytes(seal_document({**read(path), "reference": new.name}))
    (new / "reference.json").write_bytes(seal_document(reference))


def commands(
    cache: str, other: str, model: str, dataset: str, scratch: Path
) -> dict[str, Callable[[], object]]:
    """What reads the documents of a cache; each raises what a user would get."""

    def line() -> None:
        opened = open_cache(cache)
        manifest = opened.pairs("pairs").manifest
        precompute_line(cache, manifest, opened.read_reference(manifest["reference"]))

    def fresh(name: str) -> str:
        shutil.rmtree(scratch / name, ignore_errors=True)
        return str(scratch / name)

    quiet: dict[str, Any] = {"log": lambda text: None}
    return {
        "ls": lambda: _invoke("ls", cache),
        "ls one": lambda: _invoke("ls", cache, "pairs"),
        "ls --json": lambda: _invoke("ls", cache, "--json"),
        "verify": lambda: _invoke("verify", cache),
        "gc": lambda: _invoke("gc", cache),
        "diff": lambda: _invoke("diff", cache, other),
        "rm": lambda: _invoke("rm", cache, "pairs", "pairs"),
        "merge": lambda: merge_caches([cache], fresh("merged")),
        "merge into": lambda: merge_caches([other], cache, prefer="dest"),
        "push": lambda: copy_cache(open_cache(cache), open_cache(fresh("pushed"), create=True)),
        "line": line,
        "export": lambda: export_pairs(cache, "pairs", scratch / "out.jsonl", overwrite=True, **quiet),
        "train": lambda: dpo_cache.train(
            cache,
            fresh("run"),
            pairs="pairs",
            model=model,
            dry_run=True,
            max_steps=1,
            step_zero="off",
            **quiet,
        ),
        "train, default start": lambda: dpo_cache.train(
            cache, fresh("run"), pairs="pairs", dry_run=True, max_steps=1, step_zero="off", **quiet
        ),
        "eval": lambda: dpo_cache.evaluate(cache, pairs="pairs", model=model, **quiet),
        "precompute": lambda: dpo_cache.precompute(model, dataset, cache, **quiet),
    }


def raw_errors(commands: dict[str, Callable[[], object]]) -> list[str]:
    """The commands that ended in an error that is not one for users."""
    raw = []
    for name, run in commands.items():
        try:
            run()
        except DpoCacheError:
            pass
        except Exception as error:
            raw.append(f"{name}: {type(error).__name__}: {str(error)[:120]}")
    return raw


def _invoke(*words: str) -> None:
    """Run a command line; its exit status does not matter."""
    done = CliRunner().invoke(app, list(words))
    if done.exception is not None and not isinstance(done.exception, (SystemExit, typer.Exit)):
        raise done.exception


def _copy(base: Path, folder: Path) -> None:
    """Only documents are changed, so all other files are linked."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(base, folder, copy_function=lambda one, new: shutil.copy(one, new) if one.endswith("json") else os.link(one, new))  # fmt: skip
