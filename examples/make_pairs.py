"""Writes examples/data/train.jsonl and heldout.jsonl from the questions in facts.tsv.

A prompt is a question and a request for one of three forms. The chosen answer has that form; the rejected one
has another. A second pair turns this round: the same question, the same two answers, and a request for the
other form. So no property of an answer by itself, such as its length, says which one is chosen.
"""

import csv
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
REQUESTS = {
    "json": ('Answer as JSON with the key "answer".', 'Reply with a JSON object, key "answer".'),
    "words": ("Give only the answer, no sentence.", "Answer in as few words as possible."),
    "sentence": ("Answer in a normal sentence.", "Reply with one ordinary sentence."),
}
FORMS = list(itertools.combinations(REQUESTS, 2))


def answers(fact: dict[str, str]) -> dict[str, str]:
    """The answer to a question in each form."""
    return {
        "json": json.dumps({"answer": fact["answer"]}),
        "words": fact["answer"],
        "sentence": fact["sentence"],
    }


def pairs(facts: list[dict[str, str]]) -> Iterator[dict]:
    """Two pairs for each question, each the other one turned round."""
    for number, fact in enumerate(facts):
        forms, texts = FORMS[number % len(FORMS)], answers(fact)
        wording = number // len(FORMS) % 2
        for asked, other in (forms, forms[::-1]):
            yield {
                "prompt": message("user", f"{fact['question']} {REQUESTS[asked][wording]}"),
                "chosen": message("assistant", texts[asked]),
                "rejected": message("assistant", texts[other]),
            }


def message(role: str, content: str) -> list[dict[str, str]]:
    """A conversation of one message."""
    return [{"role": role, "content": content}]


def files() -> dict[str, str]:
    """The text of each file, by its name."""
    with (HERE / "facts.tsv").open(newline="", encoding="utf-8") as file:
        facts = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    written = {}
    for name in ("train", "heldout"):
        rows = list(pairs([fact for fact in facts if fact["set"] == name]))
        random.Random(0).shuffle(rows)
        written[f"{name}.jsonl"] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return written


if __name__ == "__main__":
    for name, text in files().items():
        (HERE / "data" / name).write_text(text, encoding="utf-8")
        print(f"examples/data/{name}: {len(text.splitlines())} pairs")
