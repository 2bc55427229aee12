"""Every option of the commands that check, clean up and copy caches."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dpo_cache.options.base import DEVICES, Options, cache_argument, option


@dataclass(frozen=True, kw_only=True)
class LsOptions(Options):
    """Options of `dpo-cache ls`."""

    cache: str = cache_argument("Cache: a folder or an fsspec URL.")
    name: str | None = option(
        None,
        "Show one in full: a pair set NAME/SPLIT, or the first characters of a reference's id.",
        positional="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """Options of `dpo-cache verify`."""

    cache: str = cache_argument("Cache: a folder or an fsspec URL.")
    repair: bool = option(
        False,
        "Move bad files to CACHE/.quarantine, and print the commands that score lost completions again.",
        flag="--repair",
    )
    subset: str | None = option(
        None,
        "Read only this share of the shards and parts, such as 10%; the next run reads others, until all are "
        "read.",
        metavar="PERCENT",
    )
    rescore: int | None = option(
        None,
        "Score N random completions of the pair sets again, with --model, and compare.",
        limit=(lambda value: value > 0, "a positive number of completions"),
    )
    model: str | None = option(
        None, "Model for --rescore: a local folder or a Hub id. It must be the reference."
    )
    revision: str | None = option(None, "Branch, tag or commit of a model from the Hub.")
    device: str = option(
        "auto", "Where --rescore computes. auto: CUDA, then MPS, then the CPU.", choices=DEVICES
    )
    trust_remote_code: bool = option(
        False, "Run Python code that comes with the model.", flag="--trust-remote-code"
    )

    def check(self) -> None:
        self._require(
            self.subset is None or parse_share(self.subset) is not None,
            f"`subset` {self.subset}: expected a percentage above 0% and up to 100%, such as 10%.",
        )
        self._require(
            (self.rescore is None) == (self.model is None), "`rescore` N and `model` MODEL go together."
        )
        for flag, is_given in (
            ("`revision`", self.revision is not None),
            ("`device`", self.device != "auto"),
            ("`trust_remote_code`", self.trust_remote_code),
        ):
            self._require(self.rescore is not None or not is_given, f"{flag} is used only by `rescore`.")


def parse_share(text: str) -> float | None:
    """`10%` as 0.1; None for anything but a percentage above 0 and at most 100."""
    number = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*%\s*", text)
    share = float(number[1]) / 100 if number else 0.0
    return share if 0 < share <= 1 else None


@dataclass(frozen=True, kw_only=True)
class CompactOptions(Options):
    """Options of `dpo-cache compact`."""

    cache: str = cache_argument("Cache: a folder or an fsspec URL.")
    reference: str | None = option(
        None, "Id (or its first characters) of the only reference to compact. Default: all."
    )


@dataclass(frozen=True, kw_only=True)
class GcOptions(Options):
    """Options of `dpo-cache gc`."""

    cache: str = cache_argument("Cache: a folder or an fsspec URL.")
    keep: tuple[str, ...] = option(
        (), "Reference to keep although no pair set was scored by it: its id, or a pair set; may be repeated."
    )
    scores: bool = option(
        False, "Also remove the scores of completions that are in no pair set.", flag="--scores"
    )
    grace: float = option(
        86_400.0,
        "Keep files written in the last N seconds, by default a day: a run may be about to use them.",
        limit=(lambda value: value >= 0, "0 or more seconds"),
    )
    yes: bool = option(False, "Remove the files. Without --yes they are only listed.", flag="--yes")


@dataclass(frozen=True, kw_only=True)
class MergeOptions(Options):
    """Options of `dpo-cache merge`."""

    sources: tuple[str, ...] = option(
        (), "Caches to take from: folders or fsspec URLs.", positional="SRC...", required=True
    )
    destination: str = option(
        None, "Cache to copy into; created if it does not exist.", positional="DEST", required=True
    )
    prefer: str | None = option(
        None,
        "For pair sets with the same name and other pairs, and for values that differ by more than rounding: "
        "keep DEST's, or take the last SRC's.",
        choices=("src", "dest"),
    )
    rename: bool = option(
        False,
        "Keep all of them, each under its name and the first characters of its digest.",
        flag="--rename",
    )

    def check(self) -> None:
        self._require(not (self.prefer and self.rename), "`prefer` and `rename`: give one of them.")


@dataclass(frozen=True, kw_only=True)
class DiffOptions(Options):
    """Options of `dpo-cache diff`."""

    a: str = option(None, "Cache: a folder or an fsspec URL.", positional="A", required=True)
    b: str = option(None, "The other cache.", positional="B", required=True)


@dataclass(frozen=True, kw_only=True)
class RmOptions(Options):
    """Options of `dpo-cache rm`."""

    cache: str = cache_argument("Cache: a folder or an fsspec URL.")
    kind: str = option(
        None, "Kind of entry to remove.", positional="KIND", choices=("reference", "pairs"), required=True
    )
    name: str = option(
        None,
        "First characters of the reference's id; or NAME (all its splits) or NAME/SPLIT.",
        positional="NAME",
        required=True,
    )
    with_pairs: bool = option(False, "Remove the reference's pair sets with it.", flag="--with-pairs")
    yes: bool = option(False, "Remove the files. Without --yes they are only listed.", flag="--yes")

    def check(self) -> None:
        self._require(
            self.kind == "reference" or not self.with_pairs,
            "`with_pairs` goes with `reference`: `pairs` are removed anyway.",
        )


@dataclass(frozen=True, kw_only=True)
class CopyOptions(Options):
    """Options of both `pull` and `push`."""

    pairs: tuple[str, ...] = option(
        (),
        "Copy this pair set, NAME or NAME/SPLIT, and its reference's entry; may be repeated. Default: "
        "everything.",
    )
    reference: tuple[str, ...] = option(
        (), "Copy the reference of this id (or its first characters) with its scores; may be repeated."
    )
    overwrite: bool = option(
        False,
        "Replace pair sets of the same name that hold other pairs or values at the target.",
        flag="--overwrite",
        old=("replace",),
    )

    def check(self) -> None:
        remote, local = (getattr(self, name) for name in ("remote", "local"))
        order = "The order is `dpo-cache pull REMOTE LOCAL`, `dpo-cache push LOCAL REMOTE`."
        is_folder = "://" not in local.removeprefix("file://")
        self._require(is_folder, f"LOCAL {local}: expected a folder.\n{order}")
        self._require(
            "://" in remote,
            f"REMOTE {remote}: expected a URL such as s3://bucket/cache.\n"
            "Between two folders use `dpo-cache merge`, or a URL such as file:///mnt/share/cache.",
        )


@dataclass(frozen=True, kw_only=True)
class PullOptions(CopyOptions):
    """Options of `dpo-cache pull`."""

    remote: str = option(
        None,
        "Cache to copy from: an fsspec URL such as s3://bucket/cache.",
        positional="REMOTE",
        required=True,
    )
    local: str = option(
        None, "Folder to copy into; created if it does not exist.", positional="LOCAL", required=True
    )


@dataclass(frozen=True, kw_only=True)
class PushOptions(CopyOptions):
    """Options of `dpo-cache push`."""

    local: str = option(None, "Folder of the cache to copy from.", positional="LOCAL", required=True)
    remote: str = option(
        None,
        "Cache to copy into: an fsspec URL such as s3://bucket/cache.",
        positional="REMOTE",
        required=True,
    )
