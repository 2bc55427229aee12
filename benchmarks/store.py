"""The store at scale: publishing, opening, looking up, fetching and streaming, each in a fresh process.

    python benchmarks/store.py [--folder FOLDER] [--only scores,pairs]

Writes caches of random scores into FOLDER (a temporary one, removed at the end; 6 GB at most at a time) and
prints a table. Memory is the peak above the process with its imports. Scores are those of a confident model:
`-exp(N(-2, 2.2))` nats.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from dpo_cache.store import ScoreIndex
from dpo_cache.store.cache import open_cache
from dpo_cache.store.folders.local import LocalFolder
from dpo_cache.store.format.pair_tables import PAIR_SCHEMA
from dpo_cache.store.format.parquet import name_by_content, write_parquet
from dpo_cache.store.format.shards import FLOAT_LIST, SHARD_SCHEMA, TOKEN_LIST
from dpo_cache.store.pairs import PART_PAIRS
from dpo_cache.store.upkeep.merge_shards import merge_shards, write_sorted_shards
from dpo_cache.types import Score

SIZES = [(100_000, 200), (1_000_000, 200), (10_000_000, 20)]  # completions, tokens each
NUM_SHARDS = 1000
NUM_PAIRS, PROMPT_TOKENS, COMPLETION_TOKENS = 1_000_000, 100, 150
PUBLISHED = 20_000  # completions of the publishing measurement, 1,000 per shard
SIDES = ("chosen", "rejected")


def random_keys(generator: np.random.Generator, count: int) -> np.ndarray:
    return np.frombuffer(generator.bytes(16 * count), "S16")


def random_logps(generator: np.random.Generator, count: int) -> np.ndarray:
    return -np.exp(generator.standard_normal(count, np.float32) * np.float32(2.2) - 2)


def lists(values: np.ndarray, length: int, kind: pa.ListType) -> pa.Array:
    """A list column whose lists all have this length."""
    return pa.ListArray.from_arrays(
        pa.array(np.arange(0, len(values) + 1, length, dtype=np.int32)), pa.array(values), type=kind
    )


def sums(values: np.ndarray, length: int) -> pa.Array:
    return pa.array(values.reshape(-1, length).sum(axis=1, dtype=np.float64))


def key_column(keys: np.ndarray) -> pa.Array:
    return pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())]
    )


# -- measurements, each in its own process -------------------------------------------------------------------


def make_scores(root: Path, count: int, length: int) -> dict[str, float]:
    """Write 1,000 small shards as the store does, but without a Python object for each score."""
    generator = np.random.default_rng(0)
    place = root / "scores"
    place.mkdir(parents=True)
    num_bytes = 0
    for _ in range(NUM_SHARDS):
        size = count // NUM_SHARDS
        values = random_logps(generator, size * length)
        columns = [
            key_column(random_keys(generator, size)),
            pa.array(np.full(size, length, np.uint32)),
            sums(values, length),
            lists(values, length, FLOAT_LIST),
        ]
        content = write_parquet(pa.table(columns, schema=SHARD_SCHEMA), row_group_size=2**20 // length * 4)
        (place / name_by_content(content)).write_bytes(content)
        num_bytes += len(content)
    return {"bytes_per_token": num_bytes / count / length}


def publish(root: Path, count: int, length: int) -> dict[str, float]:
    """Publish scores from Python objects, 1,000 per shard; each shard is synced to the disk."""
    del count
    generator = np.random.default_rng(1)
    index = ScoreIndex(LocalFolder(root), "scores")
    batches = [
        [(bytes(generator.bytes(16)), Score(row)) for row in random_logps(generator, 1000 * length).reshape(1000, length)]
        for _ in range(PUBLISHED // 1000)
    ]  # fmt: skip
    started = time.perf_counter()
    for batch in batches:
        index.publish(batch)
    return {"published_per_s": PUBLISHED / (time.perf_counter() - started)}


def compact(root: Path, count: int, length: int) -> dict[str, float]:
    """Merge all shards into few, and remove the old ones."""
    folder = LocalFolder(root)
    names = folder.names("scores")
    before, started = peak_bytes(), time.perf_counter()
    merged = list(
        write_sorted_shards(folder, "scores", merge_shards(folder, [f"scores/{name}" for name in names]))
    )
    elapsed_s = time.perf_counter() - started
    for name in names:
        (root / "scores" / name).unlink()
    num_bytes = sum(folder.files("scores").values())
    return {
        "shards": len(merged), "compact_s": elapsed_s, "compact_bytes": peak_bytes() - before,
        "bytes_per_token": num_bytes / count / length,
    }  # fmt: skip


def look_up(root: Path, count: int, length: int) -> dict[str, float]:
    """Open the index, look up a million random keys, half of which exist, and fetch 10,000 at random."""
    del count, length
    folder = LocalFolder(root)
    before, started = peak_bytes(), time.perf_counter()
    index = ScoreIndex(folder, "scores")
    opened = time.perf_counter()
    generator = np.random.default_rng(2)
    existing = _some_keys(folder, 500_000)
    wanted = generator.permutation(np.concatenate([existing, random_keys(generator, 500_000)]))
    ready = time.perf_counter()
    found = index.contains(wanted)
    looked = time.perf_counter()
    open_bytes = peak_bytes() - before
    assert found.sum() >= len(existing)
    wanted_few = generator.choice(existing, min(10_000, len(existing)), replace=False)
    fetching = time.perf_counter()
    index.fetch(wanted_few)
    fetched = time.perf_counter()
    return {
        "open_s": opened - started, "lookups_per_s": len(wanted) / (looked - ready), "open_and_look_up_bytes": open_bytes,
        "fetch_10000_s": fetched - fetching, "completions": len(index),
    }  # fmt: skip


def make_pairs(root: Path, count: int, length: int) -> dict[str, float]:
    """Write a pair set of random pairs, part by part."""
    del length
    generator = np.random.default_rng(3)
    cache = open_cache(root, create=True)
    writer = cache.write_pairs("bench", "train")
    for first in range(0, count, PART_PAIRS):
        writer.add_part(_random_part(generator, first, min(PART_PAIRS, count - first)))
    writer.finish({"name": "bench", "split": "train", "reference": "0" * 64, "pairs_digest": "0" * 64})
    return {"bytes_per_pair": sum(cache.folder.files("pairs").values()) / count}


def iterate(root: Path, count: int, length: int) -> dict[str, float]:
    """Iterate over all pairs and read their numbers."""
    del length
    pairs = open_cache(root).pairs("bench")
    next(iter(pairs))
    before, started = peak_bytes(), time.perf_counter()
    num_tokens = tenth_bytes = 0
    for number, scored in enumerate(pairs):
        num_tokens += (
            len(scored.pair.chosen.prompt_ids)
            + len(scored.ref_chosen.token_logps)
            + len(scored.ref_rejected.token_logps)
        )
        if number == count // 10:
            tenth_bytes = peak_bytes() - before
    elapsed_s = time.perf_counter() - started
    assert num_tokens == count * (PROMPT_TOKENS + 2 * COMPLETION_TOKENS)
    return {
        "pairs_per_s": count / elapsed_s,
        "iterate_bytes": peak_bytes() - before,
        "iterate_tenth_bytes": tenth_bytes,
    }


def _some_keys(folder: LocalFolder, count: int) -> np.ndarray:
    """Keys of the first shards."""
    from dpo_cache.store.format.shards import read_keys

    keys: list[np.ndarray] = []
    for name in folder.names("scores"):
        keys += read_keys(folder, f"scores/{name}")
        if sum(map(len, keys)) >= count:
            break
    return np.concatenate(keys)[:count]


def _random_part(generator: np.random.Generator, first: int, size: int) -> pa.Table:
    def ids(length: int) -> pa.Array:
        ranks = np.minimum(
            generator.pareto(0.7, size * length) * 8, 49_151
        )  # token frequencies follow a power law
        return lists((ranks.astype(np.uint32) * np.uint32(40_503)) % np.uint32(49_152), length, TOKEN_LIST)

    columns: dict[str, pa.Array] = {
        "row": pa.array(np.arange(first, first + size)), "prompt_ids": ids(PROMPT_TOKENS), "rejected_prompt_ids": pa.nulls(size, TOKEN_LIST),
    }  # fmt: skip
    for side in SIDES:
        values = random_logps(generator, size * COMPLETION_TOKENS)
        columns[f"{side}_ids"] = ids(COMPLETION_TOKENS)
        columns[f"{side}_key"] = key_column(random_keys(generator, size))
        columns[f"{side}_num_tokens"] = pa.array(np.full(size, COMPLETION_TOKENS, np.uint32))
        columns[f"ref_{side}_logps"] = sums(values, COMPLETION_TOKENS)
        columns[f"ref_{side}_token_logps"] = lists(values, COMPLETION_TOKENS, FLOAT_LIST)
    return pa.table([columns[name] for name in PAIR_SCHEMA.names], schema=PAIR_SCHEMA)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


MEASUREMENTS: dict[str, Callable[[Path, int, int], dict[str, float]]] = {
    function.__name__: function for function in (make_scores, publish, compact, look_up, make_pairs, iterate)
}


# -- the run -------------------------------------------------------------------------------------------------


def measure(name: str, root: Path, count: int, length: int) -> dict[str, float]:
    """Run one measurement in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name, str(root), str(count), str(length)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def score_rows(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    for count, length in SIZES:
        root = folder / f"{count}x{length}"
        published = measure("publish", folder / "published", count, length)
        shutil.rmtree(folder / "published")
        made = measure("make_scores", root, count, length)
        yield (
            f"{count:.0e} x {length}, {NUM_SHARDS} shards",
            {**published, **made, **measure("look_up", root, count, length)},
        )
        merged = measure("compact", root, count, length)
        yield f"{count:.0e} x {length}, compacted", {**merged, **measure("look_up", root, count, length)}
        shutil.rmtree(root)


def pair_rows(folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    root = folder / "pairs"
    made = measure("make_pairs", root, NUM_PAIRS, 0)
    yield (
        f"{NUM_PAIRS:.0e} pairs of {PROMPT_TOKENS + 2 * COMPLETION_TOKENS}",
        {**made, **measure("iterate", root, NUM_PAIRS, 0)},
    )
    shutil.rmtree(root)


COLUMNS = {
    "scores": {
        "published_per_s": ("published/s", "{:,.0f}", 1), "bytes_per_token": ("bytes/token", "{:.2f}", 1), "open_s": ("open s", "{:.2f}", 1),
        "lookups_per_s": ("look-ups/s", "{:,.0f}", 1), "open_and_look_up_bytes": ("memory GB", "{:.2f}", 1e-9),
        "fetch_10000_s": ("fetch 10,000 s", "{:.2f}", 1), "compact_s": ("compact s", "{:.1f}", 1), "compact_bytes": ("its memory GB", "{:.2f}", 1e-9),
        "shards": ("shards", "{:.0f}", 1),
    },
    "pairs": {
        "pairs_per_s": ("pairs/s", "{:,.0f}", 1), "iterate_tenth_bytes": ("memory after a tenth MB", "{:.0f}", 1e-6),
        "iterate_bytes": ("at the end MB", "{:.0f}", 1e-6), "bytes_per_pair": ("bytes/pair", "{:,.0f}", 1),
    },
}  # fmt: skip


def print_table(kind: str, rows: Iterator[tuple[str, dict[str, float]]]) -> None:
    columns = COLUMNS[kind]
    print(f"| {kind} | " + " | ".join(title for title, _, _ in columns.values()) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for label, found in rows:
        cells = [
            form.format(found[name] * scale) if name in found else ""
            for name, (_, form, scale) in columns.items()
        ]
        print(f"| {label} | " + " | ".join(cells) + " |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", default="scores,pairs")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for kind, rows in (("scores", score_rows), ("pairs", pair_rows)):
            if kind in options.only.split(","):
                print_table(kind, rows(Path(folder)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        _, _, name, root, count, length = sys.argv
        os.environ.setdefault("OMP_NUM_THREADS", "2")
        print(json.dumps(MEASUREMENTS[name](Path(root), int(count), int(length))))
    else:
        main()
