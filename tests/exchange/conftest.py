from collections.abc import Iterable
from pathlib import Path

import pytest

import dpo_cache
from dpo_cache.store import PairSet
from tests.conftest import chat_rows, write_rows

TEXT_ROWS = [
    {
        "prompt": f"Name colour {number}.",
        "chosen": f" Red{'.' * number}",
        "rejected": " Seven." if number != 3 else f" Red{'.' * number}",
    }
    for number in range(6)
]  # row 3 is dropped: chosen equals rejected
RANKED_ROWS = [
    {"prompt": "2+2?", "responses": [" 4.", " Four?", " 5."], "scores": [9, 6, 0]},
    {"prompt": "3?", "responses": [" 3", " x"], "ranks": [1, 2]},
]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> Path:
    """A cache with the pair sets chat, text, cut, right (keep-end) and ranked, and the files they were made
    of.
    """
    folder = tmp_path_factory.mktemp("source")
    for name, rows, options in (
        ("chat", chat_rows(), {}),
        ("text", TEXT_ROWS, {}),
        ("cut", chat_rows(), {"max_length": 30}),
        ("right", chat_rows(), {"max_length": 30, "truncation": "keep-end"}),
        ("ranked", RANKED_ROWS, {"ranked_pairs": "best"}),
    ):
        dpo_cache.precompute(
            model_folder, write_rows(folder / f"{name}.jsonl", rows), folder / "cache", **options
        )
    return folder


def pairs_of(cache: object, name: str) -> PairSet:
    return dpo_cache.open_cache(str(cache)).pairs(name)


def content(pairs: Iterable[dpo_cache.ScoredPair], *, token_logps: bool = True) -> list[tuple]:
    """Everything a pair set holds, comparable."""
    return [
        (
            scored.pair.row,
            *(
                (side.prompt_ids.tolist(), side.completion_ids.tolist())
                for side in (scored.pair.chosen, scored.pair.rejected)
            ),
            *(
                (score.logps, score.token_logps.tolist() if token_logps else [])
                for score in (scored.ref_chosen, scored.ref_rejected)
            ),
        )
        for scored in pairs
    ]
