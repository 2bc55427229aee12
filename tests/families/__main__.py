"""Run families and write expected.json and docs/families.md; see the difference before you commit it.

python -m tests.families              all families and variants
python -m tests.families mamba2 opt   these only
"""

from __future__ import annotations

import sys
import time
import warnings

import transformers as hf

import tests.conftest  # noqa: F401  environment of all tests
from tests.families.check import check_family
from tests.families.table import DOCS, EXPECTED, count_runs, entry_of, page, read_expected, write_expected
from tests.families.tiny import CASES


def main(families: list[str]) -> int:
    warnings.simplefilter("ignore")
    hf.utils.logging.set_verbosity_error()
    entries = read_expected()[1] if EXPECTED.exists() and families else {}
    num_wrong = 0
    for family in families or CASES:
        start = time.process_time()
        outcome = check_family(family)
        entries[family] = entry_of(outcome)
        num_wrong += bool(outcome.wrong)
        seconds = time.process_time() - start
        print(
            f"{family:26} {outcome.run:18} gap {outcome.gap:.1e}, gradient {outcome.gradient_gap:.1e}, {seconds:.1f} s  {outcome.reason}"
        )
        for line in [*outcome.wrong, *dict.fromkeys(outcome.remarks)]:
            print(f"    {'WRONG ' if line in outcome.wrong else ''}{line}", flush=True)
    write_expected(entries)
    DOCS.write_text(page(*read_expected()))
    print(f"{dict(count_runs(entries))}; {num_wrong} wrong")
    return int(num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
