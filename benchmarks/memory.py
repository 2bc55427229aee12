"""Memory of scoring for more rows and for a very long row, and the time per row of a second run.

    memory.py --model MODEL --data FILE [--only rows|second|long]

rows    300 and 3,000 short rows (FILE's, made distinct), and 3,000 in windows of 300: peak memory above the
        loaded model
second  1,000 and 100,000 rows, on a tiny random model: time of a run that finds everything in the cache
long    one pair of 32,768 tokens on MODEL with more positions: peak memory compared with its keys and values
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from rows import columns, parse_rows, read_rows, run, write_lines
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

LONG = 32_768


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--only", choices=("rows", "second", "long"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        for case, measure in (("rows", grow_rows), ("second", grow_second_run), ("long", run_long)):
            if arguments.only in (None, case):
                measure(arguments.model, arguments.data, Path(name))


def grow_rows(model: str, data: str, folder: Path) -> None:
    for num_rows, *window in ((300,), (3000,), (3000, "--window", "300")):
        found = score(model, distinct_rows(data, num_rows), folder, *window)
        first = found["first"]
        above = first["peak_bytes"] - first["loaded_bytes"]
        print(
            f"{num_rows:>7,} rows {' '.join(window)}: {above / 1e6:.0f} MB above the loaded model "
            f"({first['peak_bytes'] / 1e9:.2f} GB in all)",
            flush=True,
        )


def grow_second_run(model: str, _: str, folder: Path) -> None:
    tiny = folder / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tiny)
    tokenizer.save_pretrained(tiny)
    for num_rows in (1000, 100_000):
        rows = [
            {
                "prompt": f"Is {row} even?",
                "chosen": " Yes." if row % 2 == 0 else " No.",
                "rejected": f" I like {row}.",
            }
            for row in range(num_rows)
        ]
        found = score(str(tiny), rows, folder)
        seconds = found["second"]["elapsed_s"]
        print(
            f"{num_rows:>7,} rows: second run {seconds:.2f} s, {seconds / num_rows * 1e6:.0f} µs a row",
            flush=True,
        )


def run_long(model: str, _: str, folder: Path) -> None:
    config = AutoConfig.from_pretrained(model)
    config.max_position_embeddings = LONG
    long_model = folder / "long"
    AutoModelForCausalLM.from_pretrained(model, config=config).save_pretrained(long_model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.save_pretrained(long_model)
    words = " ".join(f"{number} is followed by {number + 1}," for number in range(LONG // 4))
    ids = tokenizer(words)["input_ids"][: LONG - 40]
    rows = [
        {
            "prompt": tokenizer.decode(ids),
            "chosen": " and so on, without an end.",
            "rejected": " and there it ends.",
        }
    ]
    found = score(str(long_model), rows, folder, "--max-length", str(LONG))
    first, longest = found["first"], found["shapes"]["longest"]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    path = 2 * 4 * longest * config.num_hidden_layers * config.num_key_value_heads * head_size
    above = first["peak_bytes"] - first["loaded_bytes"]
    logits = 4 * longest * config.vocab_size
    print(
        f"a row of {longest:,} tokens: {above / 1e9:.2f} GB above the loaded model, of which keys and "
        f"values of its path {path / 1e9:.2f} GB;\n"
        f"  its logits would take {logits / 1e9:.1f} GB; scored in {first['scoring_s']:.0f} s, "
        f"{first['model_tokens']:,} tokens",
        flush=True,
    )


def distinct_rows(data: str, num_rows: int) -> Iterator[dict[str, Any]]:
    """Yield rows of the file repeatedly, each with a different number in its prompt."""
    examples = islice(cycle(parse_rows(read_rows(data)).values()), num_rows)
    for number, row in enumerate(map(columns, examples)):
        *earlier, last = row["prompt"]
        yield {**row, "prompt": [*earlier, {**last, "content": f"{number}. {last['content']}"}]}


def score(model: str, rows: Iterable[dict[str, Any]], folder: Path, *options: str) -> dict[str, Any]:
    """The JSON of `our_side.py` about a first and a second run over the rows."""
    path = folder / "rows.jsonl"
    write_lines(rows, path)
    return run(sys.executable, "our_side.py", [model, str(path)], folder / "out.json", list(options))


if __name__ == "__main__":
    main()
