"""The values of an import: their digest, their means, and signs that well-formed sums are likely wrong
(averages instead of sums, two values of one completion).
"""

from __future__ import annotations

import hashlib
import struct
from array import array

import numpy as np

from dpo_cache.store.format.keys import key_array
from dpo_cache.types import Pair, Score

LONG = 20  # tokens; from this length on, a sum and an average differ clearly
SMALL_SUM = 10.0  # nats: sums of long answers are rarely as small
SMALL_MEAN = 0.1  # nats a token: no reference is as sure of answers that others wrote
DISAGREEMENT = (0.5, 0.02)  # nats, and relative, that bfloat16 in batches of other shapes explains
ROWS_SHOWN = 3


class ImportedValues:
    """Keys, lengths and sums of every completion imported: 40 bytes each."""

    def __init__(self, *, has_token_logps: bool) -> None:
        self._has_token_logps = has_token_logps
        version = b"2" if has_token_logps else b"1"
        self._digest = hashlib.sha256(b"dpo-cache imported values/" + version)
        self._keys = bytearray()
        self._rows, self._lengths, self._sums = array("q"), array("q"), array("d")

    def add(self, row: int, pair: Pair, keys: tuple[bytes, bytes], scores: tuple[Score, Score]) -> None:
        """Add the two completions of a pair; `row` is its position in the data."""
        sums = [score.logps for score in scores]
        self._keys += b"".join(keys)
        self._rows.extend([row, row])
        self._lengths.extend([pair.chosen.num_tokens, pair.rejected.num_tokens])
        self._sums.extend(sums)
        self._digest.update(struct.pack("<q", pair.row) + b"".join(keys) + struct.pack("<dd", *sums))
        if self._has_token_logps:
            for score in scores:
                self._digest.update(score.token_logps.astype("<f4").tobytes())

    def hexdigest(self) -> str:
        """Sha256 over row number, completion keys, sums and log-probs of the tokens, if there are any, of all
        pairs.
        """
        return self._digest.hexdigest()

    def means(self) -> tuple[float, float]:
        """Nats a completion, and nats a token."""
        sums = np.asarray(self._sums)
        return float(sums.mean()), float(sums.sum() / np.asarray(self._lengths).sum())

    def warnings(self) -> list[str]:
        """Likely mistakes, with figures and rows."""
        return [text for text in (self._averages(), self._disagreements()) if text]

    def _averages(self) -> str | None:
        lengths = np.asarray(self._lengths)
        is_long = lengths >= LONG
        sizes, lengths = np.abs(np.asarray(self._sums)[is_long]), lengths[is_long]
        if not len(sizes) or np.mean(sizes < SMALL_SUM) < 0.9 or np.median(sizes / lengths) >= SMALL_MEAN:
            return None
        return (
            f"these look like averages per token, not sums: of the {len(sizes)} answers of {LONG} tokens "
            f"or more the median log-prob is -{np.median(sizes):.3g} nats at a median length of "
            f"{np.median(lengths):.0f} tokens, which would be -{np.median(sizes / lengths):.2g} a token.\n"
            "If so, multiply each by its answer's number of tokens and import again."
        )

    def _disagreements(self) -> str | None:
        """Completions that are in several rows with values too far apart."""
        keys = key_array([bytes(self._keys)])
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        sums, rows = np.asarray(self._sums)[order], np.asarray(self._rows)[order]
        before, after = sums[:-1], sums[1:]
        absolute, relative = DISAGREEMENT
        places = np.flatnonzero(same & (np.abs(before - after) > absolute + relative * np.abs(before)))
        if not len(places):
            return None
        shown = "; ".join(
            f"rows {rows[place]} and {rows[place + 1]}: {before[place]:.4f} and {after[place]:.4f}"
            for place in places[:ROWS_SHOWN]
        )
        return (
            f"{len(places)} repeated answers have values that differ by more than rounding ({shown}); "
            "one model gives one value."
        )
