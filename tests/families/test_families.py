"""Every family of transformers' causal LMs, and of its models of images and text, is exact in each way that it
is run, or refused with a true reason.
"""

from importlib.util import find_spec

import pytest
import transformers as hf

from tests.families.check import check_family
from tests.families.table import DOCS, count_runs, entry_of, page, read_expected, release
from tests.families.tiny import CASES, FAMILIES
from tests.rotation import NUM_PARTS, VARIABLE, is_in_part

# of images and text, one of them more
WITH_IMAGES = (
    "gemma3",
    "gemma3n",
    "gemma4",
    "llama4",
    "mistral3",
    "mllama",
    "qwen2_5_vl",
    "qwen3_5",
    "qwen3_vl",
)


def is_due(family: str) -> bool:
    return is_in_part(family, CASES) or (family in WITH_IMAGES and is_in_part(family, WITH_IMAGES))


PARAMETERS = [pytest.param(family, marks=() if is_due(family) else pytest.mark.slow) for family in CASES]


@pytest.mark.filterwarnings("ignore")  # of transformers and PEFT, about their own code
@pytest.mark.parametrize("family", PARAMETERS)
def test_a_family_is_exact_or_refused(family: str) -> None:
    hf.utils.logging.set_verbosity_error()
    outcome = check_family(family)
    assert not outcome.wrong
    version, entries = read_expected()
    expected = entries[family] if version == release() else entry_of(outcome)
    is_present = any(name in expected["reason"] and find_spec(name) for name in ("timm", "scipy"))
    assert is_present or entry_of(outcome) == expected, "python -m tests.families writes what is expected"


def test_the_page_shows_what_is_expected() -> None:
    version, expected = read_expected()
    assert DOCS.read_text() == page(version, expected)
    if version == release():
        assert expected.keys() == set(CASES)


def test_no_family_leaves_the_forest() -> None:
    """The least that earlier versions ran: 99 families by forest, 63 by rows, 1 row at a time."""
    expected = read_expected()[1]
    counts = count_runs({family: expected[family] for family in FAMILIES if family in expected})
    assert counts["forest"] >= 99
    assert counts["forest"] + counts["rows"] + counts["one row at a time"] >= 163


def test_nearly_all_families_run_layer_by_layer() -> None:
    """Others have a reason."""
    entries = [entry for entry in read_expected()[1].values() if entry["run"] not in ("refused", "not built")]
    reasons = [entry["layer_major"] for entry in entries]
    assert all(reason == "yes" or reason.startswith("no: ") for reason in reasons)
    assert reasons.count("yes") >= 261


def test_all_parts_together_are_all_families(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    for day in range(738_000, 738_000 + NUM_PARTS):
        monkeypatch.setenv(VARIABLE, str(day))
        seen += [family for family in CASES if is_in_part(family, CASES)]
    assert sorted(seen) == sorted(CASES)
