"""Imported sums that are well-formed and yet likely wrong: averages instead of sums, one completion with two
values.
"""

from __future__ import annotations

import numpy as np

from dpo_cache.store.format.keys import KEY_BYTES, key_array

LONG = 20  # tokens from which on a sum and an average differ clearly
SMALL_SUM = 10.0  # nats: sums of long answers are nearly never as small
SMALL_MEAN = 0.1  # nats a token: no reference is as sure of answers that others wrote
DISAGREEMENT = (0.5, 0.02)  # nats, and relative, that bfloat16 in batches of other shapes explains
ROWS_SHOWN = 3


class ValueFindings:
    """Keys, lengths and sums of every completion imported: 40 bytes each."""

    def __init__(self) -> None:
        self._keys, self._lengths = bytearray(), np.empty(0, np.int64)
        self._rows, self._sums = self._lengths.copy(), np.empty(0, np.float64)
        self._waiting: list[tuple[int, int, float]] = []

    def add(
        self, row: int, keys: tuple[bytes, bytes], lengths: tuple[int, int], sums: tuple[float, float]
    ) -> None:
        """Note the two completions of a pair."""
        for key, length, value in zip(keys, lengths, sums, strict=True):
            self._keys += key
            self._waiting.append((row, length, value))
        if len(self._waiting) >= 1 << 16:
            self._settle()

    def means(self) -> tuple[float, float]:
        """Nats a completion, and nats a token."""
        self._settle()
        return float(self._sums.mean()), float(self._sums.sum() / self._lengths.sum())

    def warnings(self) -> list[str]:
        """What is likely wrong, with figures and rows."""
        self._settle()
        return [text for text in (self._averages(), self._disagreements()) if text]

    def _settle(self) -> None:
        rows, lengths, sums = zip(*self._waiting, strict=True) if self._waiting else ((), (), ())
        self._rows = np.concatenate([self._rows, np.array(rows, np.int64)])
        self._lengths = np.concatenate([self._lengths, np.array(lengths, np.int64)])
        self._sums = np.concatenate([self._sums, np.array(sums, np.float64)])
        self._waiting = []

    def _averages(self) -> str | None:
        is_long = self._lengths >= LONG
        sizes, lengths = np.abs(self._sums[is_long]), self._lengths[is_long]
        if not len(sizes) or np.mean(sizes < SMALL_SUM) < 0.9 or np.median(sizes / lengths) >= SMALL_MEAN:
            return None
        return (
            f"these look like averages per token, not sums: of the {len(sizes)} answers of {LONG} tokens "
            "or more the median log-prob is "
            f"-{np.median(sizes):.3g} nats at a median length of {np.median(lengths):.0f} tokens, which "
            "would be "
            f"-{np.median(sizes / lengths):.2g} a token.\n"
            "If so, multiply each by its answer's number of tokens and import again."
        )

    def _disagreements(self) -> str | None:
        """Completions that are in several rows with values too far apart."""
        keys = key_array([bytes(self._keys)]) if self._keys else np.empty(0, f"S{KEY_BYTES}")
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        before, after = self._sums[order][:-1], self._sums[order][1:]
        absolute, relative = DISAGREEMENT
        places = np.flatnonzero(same & (np.abs(before - after) > absolute + relative * np.abs(before)))
        if not len(places):
            return None
        shown = "; ".join(
            f"rows {self._rows[order[place]]} and {self._rows[order[place + 1]]}: {before[place]:.4f} and "
            f"{after[place]:.4f}"
            for place in places[:ROWS_SHOWN]
        )
        return (
            f"{len(places)} repeated answers have values that differ by more than rounding ({shown}); "
            "one model gives one value."
        )
