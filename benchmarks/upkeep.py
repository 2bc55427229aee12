"""Whether upkeep of a cache takes time in proportion to its size: compact, verify, gc and opening, in CPU seconds.

    python benchmarks/upkeep.py [--folder FOLDER] [--only shards,files,large] [--largest 10_000_000]

Caches of random scores are written into FOLDER (a temporary one, removed at the end; 4 GB at most at a time, and
2 GB of temporary files). One completion is in two shards, and a fiftieth of them are in a pair set. Each operation
runs in a fresh process; memory is the peak above the process with its imports, and a temporary file counts as
disk. Rows that are marked as extrapolated are arithmetic, not measurements.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from store import key_column, lists, random_keys, random_logps, sums

from dpo_cache.store import Cache, completion_key, open_cache
from dpo_cache.store.format.pair_tables import PairsDigest
from dpo_cache.store.format.parquet import name_by_content, write_parquet
from dpo_cache.store.format.shards import FLOAT_LIST, SHARD_SCHEMA
from dpo_cache.store.upkeep.compact import compact_reference
from dpo_cache.store.upkeep.gc import find_garbage
from dpo_cache.store.upkeep.verify import verify_cache
from dpo_cache.types import Completion, Pair, Score, ScoredPair

PROMPT_TOKENS = 10  # of the pairs
SHARDS, SHARD_ROWS, LENGTH = (40, 80, 160), 5_000, 200  # completions of a shard, and tokens of a completion
LARGE, LARGE_ROWS, LARGE_LENGTH = (1_000_000, 10_000_000), 10_000, 20
REFERENCES = (50, 100, 200)  # each with 20 shards and a pair set
IN_PAIRS = 50  # one completion of so many is in the pair set
LOOK_UPS = 1_000_000

SOURCE = {"dataset": "benchmark", "format": "text", "created": "2026-01-01T00:00:00+00:00"}
TOKENIZATION = {"tokenizer": None, "chat_template": None, "max_length": 64, "truncation": "keep-start"}


def make_cache(root: Path, num_shards: int, shard_rows: int, length: int) -> None:
    """A cache of one reference, whose shards are written as the store does, but not synced one by one."""
    generator = np.random.default_rng(0)
    cache = open_cache(root, create=True)
    reference = cache.publish_reference({"weights": "a" * 64, "dtype": "float32"}, {"model": "benchmark"})
    writer, digest, row = cache.write_pairs("bench", "train"), PairsDigest(), 0
    place = root / f"references/{reference}/scores"
    place.mkdir(parents=True)
    first: tuple[np.ndarray, np.ndarray] | None = None
    for number in range(num_shards):
        values = random_logps(generator, shard_rows * length).reshape(shard_rows, length)
        keys = random_keys(generator, shard_rows).copy()
        pairs = _random_pairs(generator, values[: shard_rows // IN_PAIRS // 2 * 2], row)
        sides = [side for scored in pairs for side in (scored.pair.chosen, scored.pair.rejected)]
        of_sides = [completion_key(side) for side in sides]
        keys[: len(sides)] = of_sides
        for scored, chosen, rejected in zip(pairs, of_sides[::2], of_sides[1::2], strict=True):
            digest.add(scored.pair.row, chosen, rejected)
        writer.add(pairs)
        row += len(pairs)
        first = first or (keys[-1:].copy(), values[-1:].copy())
        if number == num_shards - 1:  # one completion is in two shards
            keys[-2:-1], values[-2:-1] = first
        content = _shard(keys, values)
        (place / name_by_content(content)).write_bytes(content)
    details = {"name": "bench", "split": "train", "reference": reference, "pairs_digest": digest.hexdigest()}
    writer.finish({**details, "source": SOURCE, "tokenization": TOKENIZATION})


def make_many_references(root: Path, count: int) -> None:
    """References with 20 shards and a pair set of 20 parts each."""
    generator = np.random.default_rng(1)
    cache = open_cache(root, create=True)
    for number in range(count):
        identity = {"weights": f"{number:064x}", "dtype": "float32"}
        reference = cache.publish_reference(identity, {"model": "benchmark"})
        place = root / f"references/{reference}/scores"
        place.mkdir(parents=True)
        for _ in range(20):
            content = _shard(random_keys(generator, 4), random_logps(generator, 80).reshape(4, 20))
            (place / name_by_content(content)).write_bytes(content)
        writer = cache.write_pairs(f"bench-{number}", "train")
        for part in range(20):
            writer.add(_random_pairs(generator, random_logps(generator, 80).reshape(4, 20), part))
            writer._write_part()  # a part of two pairs
        details = {
            "name": f"bench-{number}",
            "split": "train",
            "reference": reference,
            "pairs_digest": "0" * 64,
        }
        writer.finish({**details, "source": SOURCE, "tokenization": TOKENIZATION})


def _random_pairs(generator: np.random.Generator, values: np.ndarray, row: int) -> list[ScoredPair]:
    """Pairs of random tokens whose completions have these values, `[2 pairs, tokens]`."""
    ids = generator.integers(0, 50_000, (len(values), PROMPT_TOKENS + values.shape[1])).astype(np.uint32)
    prompts, completions = ids[::2, :PROMPT_TOKENS], ids[:, PROMPT_TOKENS:]
    return [
        ScoredPair(
            Pair(
                row + pair,
                Completion(prompt, completions[2 * pair]),
                Completion(prompt, completions[2 * pair + 1]),
            ),
            Score(values[2 * pair]),
            Score(values[2 * pair + 1]),
        )
        for pair, prompt in enumerate(prompts)
    ]


def _shard(keys: np.ndarray, values: np.ndarray) -> bytes:
    flat = np.ascontiguousarray(values).reshape(-1)
    columns = [
        key_column(np.ascontiguousarray(keys)),
        pa.array(np.full(len(keys), values.shape[1], np.uint32)),
        sums(flat, values.shape[1]),
        lists(flat, values.shape[1], FLOAT_LIST),
    ]
    return write_parquet(pa.table(columns, schema=SHARD_SCHEMA), row_group_size=2**20 // values.shape[1] * 4)


# -- operations, each measured in its own process -----------------------------------------------------------


def verify(cache: Cache) -> None:
    assert verify_cache(cache.folder.root).is_whole  # type: ignore[union-attr]


def gc(cache: Cache) -> None:
    """Find garbage, and completions that no pair set holds; nothing is removed."""
    assert find_garbage(cache, scores=True, grace_s=0)


def compact(cache: Cache) -> None:
    done = compact_reference(cache, cache.references()[0])
    assert done.duplicates == 1 and done.shards_after < done.shards_before


def compact_again(cache: Cache) -> None:
    done = compact_reference(cache, cache.references()[0])
    assert done.shards_before == done.shards_after


def open_index(cache: Cache) -> None:
    cache.scores(cache.references()[0])


def look_up(cache: Cache) -> None:
    """Open, and look up a million random keys at once."""
    index = cache.scores(cache.references()[0])
    assert not index.contains(random_keys(np.random.default_rng(2), LOOK_UPS)).any()


OPERATIONS: dict[str, Callable[[Cache], None]] = {
    operation.__name__: operation for operation in (verify, gc, compact, compact_again, open_index, look_up)
}


def measure(name: str, root: Path) -> tuple[float, float]:
    """CPU seconds and peak gigabytes of an operation in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--measure", name, str(root)], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return tuple(json.loads(done.stdout))


def run_operation(name: str, root: Path) -> None:
    cache = open_cache(root)
    before, started = peak_bytes(), resource.getrusage(resource.RUSAGE_SELF)
    OPERATIONS[name](cache)
    ended = resource.getrusage(resource.RUSAGE_SELF)
    seconds = ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime
    print(json.dumps([seconds, (peak_bytes() - before) / 1e9]))


def peak_bytes() -> int:
    """Since this program began; `ru_maxrss` would count the process that started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


# -- tables --------------------------------------------------------------------------------------------------


def shard_rows(folder: Path) -> Iterator[list[str]]:
    """CPU seconds by the number of shards; the issue is whether they double with it."""
    for num_shards in SHARDS:
        root = folder / "shards"
        make_cache(root, num_shards, SHARD_ROWS, LENGTH)
        seconds = [measure(name, root)[0] for name in ("verify", "gc", "compact")]
        yield [f"{num_shards} shards of {SHARD_ROWS} x {LENGTH}", *(f"{value:.2f}" for value in seconds)]
        shutil.rmtree(root)


def file_rows(folder: Path) -> Iterator[list[str]]:
    """CPU seconds of gc by the number of references, each with 20 shards and a pair set of 20 parts."""
    for count in REFERENCES:
        root = folder / "files"
        make_many_references(root, count)
        yield [f"{count} references, {40 * count:,} files", f"{measure('gc', root)[0]:.2f}"]
        shutil.rmtree(root)


def large_rows(folder: Path, largest: int) -> Iterator[list[str]]:
    """CPU seconds and gigabytes, before and after the cache is compacted; extrapolated to ten times the last."""
    names = (
        "verify",
        "gc",
        "open_index",
        "look_up",
        "compact",
        "compact_again",
        "open_index",
        "look_up",
        "verify",
    )
    found: list[tuple[float, float]] = []
    size = 0
    for size in (size for size in LARGE if size <= largest):
        root = folder / "large"
        make_cache(root, size // LARGE_ROWS, LARGE_ROWS, LARGE_LENGTH)
        found = [measure(name, root) for name in names]
        yield [
            f"{size:.0e} x {LARGE_LENGTH}",
            *(f"{seconds:.2f} s, {memory:.2f} GB" for seconds, memory in found),
        ]
        shutil.rmtree(root)
    yield [
        f"{10 * size:.0e} x {LARGE_LENGTH}, extrapolated",
        *(f"{10 * seconds:.0f} s" for seconds, _ in found),
    ]


TABLES: dict[str, tuple[Sequence[str], Callable[..., Iterator[list[str]]]]] = {
    "shards": (("CPU s", "verify", "gc --scores", "compact"), shard_rows),
    "files": (("CPU s", "gc --scores"), file_rows),
    "large": (
        (
            "CPU s, memory", "verify", "gc --scores", "open", "open, 1e6 look-ups", "compact", "compact again",
            "open, compacted", "open, 1e6 look-ups, compacted", "verify, compacted",
        ),
        large_rows,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--only", default="shards,files,large")
    parser.add_argument("--largest", type=int, default=LARGE[-1])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for name in options.only.split(","):
            columns, rows = TABLES[name]
            print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
            for cells in rows(Path(folder), *([options.largest] if name == "large" else [])):
                print(f"| {' | '.join(cells)} |", flush=True)
            print()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        run_operation(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
