"""Remove files while others write, so that no pair set is left without a file that its manifest names.

A writer publishes its manifest and then sees that each file is there which it names. Here a file is hidden
first, under the name `.<name>.going` in its own folder; then the manifests are read, and a file that one of
them names by now gets its name back. So one of the two notices the other, whatever the order of their steps.
A hidden file that a killed process left is treated the same by the next removal in its folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from dpo_cache.errors import StorageError, first_line
from dpo_cache.log import log_remark
from dpo_cache.store.folders.folder import Folder
from dpo_cache.store.upkeep.contents import classify
from dpo_cache.store.upkeep.named_files import NamedFiles, read_named_files, read_named_parts

HIDDEN = re.compile(r"((?:.*/)?)\.([^/]+)\.going")
REMOVAL_ORDER = ["manifest", "part", "shard", "unknown", "reference"]


@dataclass
class Removed:
    """The files that were removed, those that a manifest names by now, and those of other users that this
    one may not remove, with the reason.
    """

    files: list[str] = field(default_factory=list)
    needed: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    def log(self, place: Folder) -> None:
        """Log the files that stay."""
        if self.needed:
            log_remark(
                f"{place}: {len(self.needed)} files stay, because a pair set that was published meanwhile "
                f"needs them, such as {self.needed[0]}."
            )
        if self.refused:
            file, why = next(iter(self.refused.items()))
            log_remark(
                f"{place}: {len(self.refused)} files of other users stay, such as {file}: {why}\n"
                "Their owners can remove them with the same command."
            )


def removal_order(file: str) -> tuple[int, str]:
    """Sorts files so that an interrupted removal leaves a valid cache: manifests first, entries of references
    last.
    """
    return REMOVAL_ORDER.index(classify(file)[0]), file


def hidden_name(file: str) -> str:
    """The name of a file that is being removed."""
    place, slash, name = file.rpartition("/")
    return f"{place}{slash}.{name}.going"


def name_before_hiding(file: str) -> str | None:
    """The name of a hidden file before it was hidden; None for any other file."""
    found = HIDDEN.fullmatch(file)
    name = found[1] + found[2] if found else ""
    return name if classify(name)[0] in ("part", "shard", "reference") else None


def remove_unneeded(folder: Folder, files: Iterable[str], *, always: Iterable[str] = ()) -> Removed:
    """Remove these files, durably; parts, shards and entries of references that a manifest needs by then
    stay, except for those in `always`. Files of other users that this one may not remove are left.
    """
    removed = Removed()
    groups: dict[str, list[str]] = {}
    plain = {*always}
    for file in sorted(files, key=removal_order):
        if classify(file)[0] in ("part", "shard", "reference") and file not in plain:
            groups.setdefault(_owner(file), []).append(file)
        elif _is_allowed(removed, file, partial(folder.remove, file)):
            removed.files.append(file)
    for owner in sorted(groups):  # pair sets before references
        _remove_group(folder, owner, groups[owner], removed)
    return removed


def put_back_needed(folder: Folder, hidden: Iterable[str]) -> None:
    """Give files their names back that a killed process hid and a manifest needs; `hidden` are all files
    whose names start with a dot.
    """
    names = [name for file in hidden if (name := name_before_hiding(file))]
    if names:
        named = read_named_files(folder)
        for name in sorted(filter(named.may_need, names), key=removal_order, reverse=True):
            _is_allowed(Removed(), name, partial(_put_back, folder, name))


def _owner(file: str) -> str:
    kind, parts = classify(file)
    return f"pairs/{parts[0]}" if kind == "part" else f"references/{parts[0]}"


def _remove_group(folder: Folder, owner: str, files: Sequence[str], removed: Removed) -> None:
    """Hide the files of one pair set or reference, read the manifests, and remove what none needs."""
    hidden, left, going = _hidden_by_others(folder, owner), False, {*files}
    try:
        for file in files:
            if left and classify(file)[0] == "reference":
                continue  # an entry of scores that stay
            if _is_allowed(removed, file, partial(folder.move, file, hidden_name(file))):
                hidden.append(file)
            else:
                left = True
        named = _read_named(folder, owner)
    except BaseException:
        for file in reversed(hidden):
            _is_allowed(removed, file, partial(_put_back, folder, file))
        raise
    needed = {file for file in hidden if named.may_need(file)}
    for file in sorted(needed, key=removal_order, reverse=True):
        _is_allowed(removed, file, partial(_put_back, folder, file))
    for file in sorted({*hidden} - needed, key=removal_order):
        if _is_allowed(removed, file, partial(folder.remove, hidden_name(file))) and file in going:
            removed.files.append(file)
    removed.needed += sorted(needed & going)


def _read_named(folder: Folder, owner: str) -> NamedFiles:
    room, _, name = owner.partition("/")
    return read_named_parts(folder, name) if room == "pairs" else read_named_files(folder)


def _hidden_by_others(folder: Folder, owner: str) -> list[str]:
    """Names of files of this owner that were hidden by a process that is at work or was killed."""
    places = [owner] if owner.startswith("pairs/") else [f"{owner}/scores", owner]
    found = [name_before_hiding(f"{place}/{name}") for place in places for name in folder.hidden_names(place)]
    return [name for name in found if name]


def _put_back(folder: Folder, file: str) -> None:
    """Give a hidden file its name back, unless a writer has published it again."""
    if folder.exists(file):
        folder.remove(hidden_name(file))
    else:
        folder.move(hidden_name(file), file)


def _is_allowed(removed: Removed, file: str, act: Callable[[], object]) -> bool:
    """Do it; False, with the reason noted, where this user may not."""
    try:
        act()
    except StorageError as error:
        if not error.is_denied:
            raise
        removed.refused[file] = first_line(error)
        return False
    return True
