"""What does not grow: memory with the rows, the time per row of a second run, and the memory of a very long
row.

    memory.py --model MODEL --data FILE [--only rows|second|long]

rows    300 against 3,000 short rows (FILE's, made distinct), and 3,000 in windows of 300: most memory above
        the loaded model
second  1,000 against 100,000 rows, on a tiny random model: time of a run that finds everything in the cache
long    one pair of 32,768 tokens on MODEL, its positions extended: memory beside what its path of keys and
        values takes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
        for case, run in (("rows", grow_rows), ("second", grow_second_run), ("long", run_long)):
            if arguments.only in (None, case):
                run(arguments.model, arguments.data, Path(name))


def grow_rows(model: str, data: str, folder: Path) -> None:
    for num_rows, *window in ((300,), (3000,), (3000, "--window", "300")):
        found = score(model, write(folder, distinct_rows(data, num_rows)), folder, *window)
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
        found = score(str(tiny), write(folder, rows), folder)
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
    found = score(str(long_model), write(folder, rows), folder, "--max-length", str(LONG))
    first, longest = found["first"], found["shapes"]["longest"]
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    path = 2 * 4 * longest * config.num_hidden_layers * config.num_key_value_heads * head_size
    above = first["peak_bytes"] - first["loaded_bytes"]
    logits = 4 * longest * config.vocab_size
    print(
        f"a row of {longest:,} tokens: {above / 1e9:.2f} GB above the loaded model, of which keys and "
        f"values of its path {path / 1e9:.2f} GB;\n"
        f"  its logits alone would take {logits / 1e9:.1f} GB; scored in {first['scoring_s']:.0f} s, "
        f"{first['model_tokens']:,} tokens",
        flush=True,
    )


def distinct_rows(data: str, num_rows: int) -> Iterator[dict[str, Any]]:
    """Rows of the file, again and again, each time with another number in the prompt."""
    from dpo_cache.data import detect_format, read_dataset
    from dpo_cache.data.formats import Example, parse_row

    rows = list(read_dataset(data)["train"])
    data_format = detect_format(list(rows[0]), rows[0])
    examples = [
        example for example in (parse_row(row, data_format) for row in rows) if isinstance(example, Example)
    ]
    examples = [example for example in examples if example.answers[0] != example.answers[1]]
    for number in range(num_rows):
        example = examples[number % len(examples)]
        prompt = [dict(message) for message in example.prompt]  # type: ignore[arg-type]
        prompt[-1]["content"] = f"{number}. {prompt[-1]['content']}"
        yield {"prompt": prompt, "chosen": example.answers[0], "rejected": example.answers[1]}


def write(folder: Path, rows: Any) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def score(model: str, rows: str, folder: Path, *options: str) -> dict[str, Any]:
    """What `our_side.py` writes of a first and a second run, in a process of its own."""
    out = folder / "out.json"
    command = [sys.executable, str(Path(__file__).with_name("our_side.py")), model, rows, str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    return json.loads(out.read_text())


if __name__ == "__main__":
    main()
