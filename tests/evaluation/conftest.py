from pathlib import Path

import pytest

import dpo_cache
from tests.conftest import chat_rows, write_rows


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    folder = tmp_path_factory.mktemp("evaluated")
    dpo_cache.precompute(model_folder, write_rows(folder / "pairs.jsonl", chat_rows(15)), folder / "cache")
    dpo_cache.precompute(
        model_folder, write_rows(folder / "heldout.jsonl", chat_rows(40, seed=9)), folder / "cache"
    )
    return str(folder / "cache")


@pytest.fixture(scope="module")
def trained(cache: str, tmp_path_factory: pytest.TempPathFactory) -> dpo_cache.TrainReport:
    """A policy that differs from the reference, and its training's report on the held-out pairs."""
    run = Path(tmp_path_factory.mktemp("runs"), "run")
    return dpo_cache.train(
        cache,
        run,
        pairs="pairs",
        eval_pairs="heldout",
        batch_size=4,
        lr=3e-3,
        beta=0.2,
        label_smoothing=0.1,
        log=lambda _: None,
    )
