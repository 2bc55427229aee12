import pytest

import dpo_cache
from tests.conftest import chat_rows, write_rows


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory, model_folder: str) -> str:
    folder = tmp_path_factory.mktemp("trained")
    dpo_cache.precompute(
        model_folder, write_rows(folder / "pairs.jsonl", chat_rows(15)), str(folder / "cache")
    )
    dpo_cache.precompute(
        model_folder, write_rows(folder / "heldout.jsonl", chat_rows(6, seed=9)), str(folder / "cache")
    )
    return str(folder / "cache")
