"""One line for each pair, in the order of the pair set, as JSON lines or Parquet:

row                                       int64, row number in the source of the data
prompt_tokens                             int64, tokens of the chosen answer's prompt
chosen_tokens, rejected_tokens            int64
policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps   float64, sums in nats
chosen_reward, rejected_reward, margin    float64, as in the report
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import pyarrow as pa

from dpo_cache.evaluation.report import Rewards
from dpo_cache.evaluation.scoring import PairColumns
from dpo_cache.files.rows import open_output
from dpo_cache.options.evaluate import EvalOptions

BATCH_PAIRS = 2048  # pairs written at once
COUNTS = ("row", "prompt_tokens", "chosen_tokens", "rejected_tokens")
NAMES = (*(entry.name for entry in fields(PairColumns)), "chosen_reward", "rejected_reward", "margin")
SCHEMA = pa.schema(
    [pa.field(name, pa.int64() if name in COUNTS else pa.float64(), nullable=False) for name in NAMES]
)


@contextmanager
def open_pair_lines(options: EvalOptions) -> Iterator[Callable[[PairColumns, Rewards], None]]:
    """Yield a function that writes the pairs to `output`, if that is given.

    The file is opened before the scoring, so that a path that cannot be written raises an error at once. It
    exists when the block ends, and not at all if the block raises. Raises `OptionError` or `StorageError`.
    """
    if not options.output or not options.output_format:
        yield lambda *_: None
        return
    with open_output(
        options.output, options.output_format, SCHEMA, overwrite=options.overwrite
    ) as write_rows:

        def write(columns: PairColumns, rewards: Rewards) -> None:
            values: dict[str, np.ndarray] = {
                **vars(columns),
                "chosen_reward": rewards.chosen,
                "rejected_reward": rewards.rejected,
                "margin": rewards.margins,
            }
            table = pa.table(values, schema=SCHEMA)
            for start in range(0, len(table), BATCH_PAIRS):
                write_rows(table.slice(start, BATCH_PAIRS).to_pylist())

        yield write
