"""Compare dpo-cache's token ids with those of TRL 1.16, and the speed of tokenizing, in one process each.

    token_ids.py --tokenizer MODEL --data FILE... --trl-python PYTHON [--rows N]

Every row is read as text, as a conversation and as whole dialogues, with the given tokenizer and with two
that are trained here (byte-level BPE, and one with a space before the text and a BOS token as in
SentencePiece models), and truncated to a short maximum length from either end. The exit code is 1 if an id
differs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

LENGTHS = (1024, 96)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--rows", type=int, help="number of rows of each file; default: all")
    parser.add_argument("--trl-python", required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["HF_HOME"] = str(
            folder / "hf"
        )  # an empty cache: `datasets` must not reuse earlier results
        num_rows = write_rows(folder, arguments.data, arguments.rows)
        texts = [
            text
            for row in map(json.loads, (folder / "text.jsonl").read_text().splitlines())
            for text in row.values()
        ]
        for kind, tokenizer in make_tokenizers(arguments.tokenizer, texts).items():
            save_model(folder / kind, tokenizer)
        cases = [
            {
                "name": f"{kind}, {rows}, {truncation}, {length}",
                "model": kind,
                "rows": f"{rows}.jsonl",
                "max_length": length,
                "truncation": truncation,
            }
            for kind in ("given", "byte-level", "prefix-space")
            for rows in ("text", "conversation", "implicit")
            for truncation, length in (
                ("keep_start", LENGTHS[0]),
                ("keep_start", LENGTHS[1]),
                ("keep_end", LENGTHS[1]),
            )
        ]
        (folder / "cases.json").write_text(json.dumps(cases))
        script = str(Path(__file__).with_name("trl_side.py"))
        subprocess.run(
            [arguments.trl_python, script, "ids", "-", str(folder), str(folder / "trl.json")],
            check=True,
            stdout=sys.stderr,
        )
        theirs = json.loads((folder / "trl.json").read_text())
        print(f"{num_rows} rows")
        agreeing = [compare(folder, case, theirs[case["name"]]) for case in cases]
        return 0 if all(agreeing) else 1


def compare(folder: Path, case: dict[str, Any], theirs: dict[str, Any]) -> bool:
    """Print one case, and return whether all ids agree."""
    from dpo_cache import data
    from dpo_cache.types import Pair

    place = folder / "case.jsonl"
    with (folder / case["rows"]).open(encoding="utf-8") as lines:
        # `datasets` must not reuse the ids of another case
        marked = [json.dumps({**json.loads(line), "case": case["name"]}) + "\n" for line in lines]
    place.write_text("".join(marked), encoding="utf-8")
    (rows,) = data.read_dataset(str(place)).values()
    tokenizer = data.load_tokenizer(str(folder / case["model"]))
    data_format = data.detect_format(list(rows.column_names), next(iter(rows)))
    gc.freeze()  # keeps TRL's results out of garbage collection during the measurement
    started = time.perf_counter()
    tokenized = data.tokenize_rows(rows, data_format, tokenizer)
    elapsed_s = time.perf_counter() - started
    truncation = data.Truncation(case["max_length"], case["truncation"].replace("_", "-"))
    ours = {
        outcome.row: outcome.pair
        for outcome in data.make_pairs(tokenized, truncation)
        if isinstance(outcome.pair, Pair)
    }
    moved = sum(tokenized["moved_boundary"])
    wrong, kept = [], 0
    for row in theirs["rows"]:
        pair = ours.pop(row["index"], None)
        if pair is None:  # dpo-cache drops pairs without answer tokens or with equal answers; TRL keeps them
            continue
        kept += 1
        mine = [[side.sequence_ids.tolist(), len(side.prompt_ids)] for side in (pair.chosen, pair.rejected)]
        if not all(is_same(one, row[side]) for one, side in zip(mine, ("chosen", "rejected"), strict=True)):
            wrong.append(row["index"])
    ratio = theirs["elapsed_s"] / elapsed_s
    agrees = not wrong and not ours
    verdict = (
        "same ids"
        if agrees
        else f"{len(wrong)} rows DIFFER, first {wrong[:3]}; {len(ours)} only in dpo-cache"
    )
    print(
        f"  {case['name']:44} {kept:5} rows, {moved:4} moved: {verdict}; {ratio:.1f} times as fast "
        f"({elapsed_s:.2f} s)",
        flush=True,
    )
    return agrees


def is_same(mine: list[Any], theirs: list[Any]) -> bool:
    """Whether the ids and the prompt lengths agree. If keep-end leaves no prompt, dpo-cache counts the first
    token, which nothing predicts, as the prompt.
    """
    return mine[0] == theirs[0] and (mine[1] == theirs[1] or (theirs[1] == 0 and mine[1] == 1))


def write_rows(folder: Path, files: list[str], limit: int | None) -> int:
    """Write the rows in three formats: text.jsonl, conversation.jsonl, implicit.jsonl."""
    from rows import columns, parse_rows, read_rows, write_lines  # after HF_HOME is set

    examples = [example for file in files for example in parse_rows(read_rows(file, limit)).values()]
    texts, dialogues = [], []
    for example in examples:
        prompt, (chosen, rejected) = example.prompt, example.answers
        text = "\n".join(message["content"] for message in prompt)
        texts.append({"prompt": text, "chosen": chosen[0]["content"], "rejected": rejected[0]["content"]})
        dialogues.append({"chosen": prompt + chosen, "rejected": prompt + rejected})
    write_lines(texts, folder / "text.jsonl")
    write_lines(dialogues, folder / "implicit.jsonl")
    return write_lines(map(columns, examples), folder / "conversation.jsonl")


def make_tokenizers(given: str, texts: list[str]) -> dict[str, PreTrainedTokenizerBase]:
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    byte_level.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, initial_alphabet=alphabet, show_progress=False)
    )
    spaced = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    letters = [f"<0x{byte:02X}>" for byte in range(256)]
    words = [word for text in texts for word in text.split(" ")]
    spaced.train_from_iterator(
        words,
        trainers.BpeTrainer(vocab_size=2000, special_tokens=["<unk>", "<s>", *letters], show_progress=False),
    )
    spaced.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", spaced.token_to_id("<s>"))]
    )
    made = {
        "byte-level": PreTrainedTokenizerFast(
            tokenizer_object=byte_level, eos_token="<|im_end|>", pad_token="<|pad|>"
        ),
        "prefix-space": PreTrainedTokenizerFast(
            tokenizer_object=spaced,
            bos_token="<s>",
            unk_token="<unk>",
            eos_token="<|im_end|>",
            pad_token="<|pad|>",
        ),
    }
    for tokenizer in made.values():
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
        tokenizer.chat_template = TEMPLATE
    return {"given": AutoTokenizer.from_pretrained(given), **made}


def save_model(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save the tokenizer with the smallest model that TRL's trainer accepts."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    sys.exit(main())
