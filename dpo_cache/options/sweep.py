"""Every option of `sweep`: a few only here, and the options of `train`, each with several values.

The options of `train` are read from `TrainOptions`, so a new option of `train` is also one of `sweep`.
"""

from __future__ import annotations

from dataclasses import Field, make_dataclass
from typing import Any, ClassVar

from dpo_cache.options.base import Options, cache_argument, flag_of, option, sections
from dpo_cache.options.train import TrainOptions

# Options of `train`: a sweep has another `resume`, no dry run, no config file, and a process a run
NOT_IN_A_SWEEP = ("resume", "dry_run", "config", "trl_config", "parallel", "launch")
PLACES = ("cache", "output")  # of the sweep as a whole
TYPE_NAMES = {bool: "bool", int: "int", float: "float", str: "str", tuple: "str"}


def swept_fields() -> list[Field[Any]]:
    """The options of `train` that a sweep takes values of, in the order of the help."""
    return [entry for entries in _sections().values() for entry in entries]


def type_of(entry: Field[Any]) -> type:
    """The type of one value of the option that is not None: bool, int, float, str or tuple."""
    name = entry.type.removesuffix(" | None").partition("[")[0]
    return {kind.__name__: kind for kind in TYPE_NAMES}[name]


def loss_settings() -> set[str]:
    """The options of the objective: the losses of runs that differ in them cannot be compared."""
    return {entry.name for entry in _sections()["Loss"]}


def shown_value(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, (tuple, list)):
        return "+".join(value) or "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def _sections() -> dict[str | None, list[Field[Any]]]:
    """The options of `train` that a sweep takes values of, by the title of their part of the help."""
    return {
        title: [entry for entry in entries if entry.name not in (*NOT_IN_A_SWEEP, *PLACES)]
        for title, entries in sections(TrainOptions).items()
    }


def _groups() -> dict[str, str]:
    """Parts of the help; a part whose first option is not in a sweep starts at its next one."""
    return {entries[0].name: title for title, entries in _sections().items() if title and entries}


def _with_several_values(entry: Field[Any]) -> tuple[str, Any, Any]:
    kind, default, choices = type_of(entry), entry.default, entry.metadata["choices"]
    if kind is bool:
        positive = flag_of(entry)
        taken = option(
            (),
            f"{entry.metadata['help']} Both flags: one run each.",
            flag=f"{positive}/--no-{positive.removeprefix('--')}",
            old=entry.metadata["old"],
        )
        return entry.name, tuple[bool, ...], taken
    tells_default = "Default:" in entry.metadata["help"] or default in (None, ())
    help = entry.metadata["help"] if tells_default else f"{entry.metadata['help']} Default: {default}."
    if kind is tuple:
        help = help.replace(
            "; repeated as NAME:WEIGHT it is a weighted sum", "; NAME:WEIGHT+NAME:WEIGHT is a weighted sum"
        )
        help = help.replace("; may be repeated", "; several are joined with +")
    metavar = f"{'|'.join(choices) or f'<{TYPE_NAMES[kind]}>'},..."
    taken = option((), help, flag=entry.metadata["flag"], metavar=metavar, old=entry.metadata["old"])
    return entry.name, tuple[str, ...], taken


def _fields() -> list[tuple[str, Any, Any]]:
    return [
        ("cache", str, cache_argument("Cache with the pair sets: a folder or an fsspec URL.")),
        (
            "output",
            str,
            option(
                None,
                "Folder of the sweep: sweep.json, table.md, table.csv, logs/, and a folder for each run.",
                required=True,
            ),
        ),
        ("jobs", int, option(1, "Runs at once. On a CPU they share its cores.")),
        (
            "resume",
            bool | str,
            option(
                False,
                "Continue the sweep in this folder, with the options of its sweep.json. Without a folder: "
                "continue the one in --output, never start one.",
                metavar="[SWEEP]",
                value_is_optional=True,
            ),
        ),
        (
            "plot",
            str | None,
            option(
                None,
                "Draw the accuracy on evaluation pairs over steps of every run into this file (.svg, .png, "
                ".pdf); needs matplotlib.",
            ),
        ),
        *(_with_several_values(entry) for entry in swept_fields()),
    ]


class SweepOptions(make_dataclass("_SweepFields", _fields(), bases=(Options,), frozen=True, kw_only=True)):  # type: ignore[misc]
    """Options of `dpo-cache sweep`; see `dpo_cache.sweep`. An option of `train` holds its values as given; ()
    is train's default.
    """

    groups: ClassVar[dict[str, str]] = _groups()

    def __post_init__(self) -> None:
        for entry in swept_fields():
            given = getattr(self, entry.name)
            if not isinstance(given, (tuple, list)):
                object.__setattr__(self, entry.name, (given,))
        super().__post_init__()

    def check(self) -> None:
        self._require(
            type(self.jobs) is int and self.jobs > 0, f"`jobs` {self.jobs}: expected a whole number above 0."
        )
