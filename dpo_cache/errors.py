"""Every error that a user can cause, as one tree.

    DpoCacheError
    ├── OptionError            an option's value makes no sense                    (also a ValueError)
    │   └── UnknownOptionError     a keyword that is no option                     (also a TypeError)
    ├── ShapeError             tensors given to a loss do not match                (also a ValueError)
    ├── DataError              the data set cannot be read as preferences
    ├── ModelError             the model or its tokenizer cannot be used
    ├── CacheError             the cache cannot be used
    │   ├── FormatError        the folder is not a cache
    │   │   └── NewerFormatError   made by a newer dpo-cache
    │   ├── CorruptShardError  bytes on disk are not the bytes that were written
    │   ├── NotInCacheError    the cache lacks the reference, pair set or score
    │   └── StorageError       the file system refused: full, read-only, gone
    │       └── MissingFileError   a file that was listed or named does not exist (any more)
    └── TrainingError          the run cannot start or continue
        ├── StepZeroError      the policy that starts as the reference does not repeat its log-probs
        └── OtherRankError     another process of the run failed, and reports why

Every message names the place, what was expected, what was found, and what to do next. Names from files that
others made may be in it, so characters that could steer a terminal are escaped in every message.
"""

from collections.abc import Sequence


class DpoCacheError(Exception):
    """Base of every error that this package raises on purpose."""

    rank: int | None = None  # in a run on several devices: the process that reports it

    def __init__(self, message: object = "") -> None:
        super().__init__(printable_lines(str(message)))


class OptionError(DpoCacheError, ValueError):
    """The value of an option, or of two options together, makes no sense."""


class UnknownOptionError(OptionError, TypeError):
    """A keyword argument is not an option of the function."""


class ShapeError(DpoCacheError, ValueError):
    """Tensors that must have one shape do not; broadcasting them would give wrong numbers."""


class DataError(DpoCacheError):
    """The data set is missing, empty, of no known format, or has unusable rows."""


class ModelError(DpoCacheError):
    """The model or tokenizer is missing, or is of a kind that has no completion log-probs."""


class CacheError(DpoCacheError):
    """The cache cannot be used as it is."""


class FormatError(CacheError):
    """The folder is not a dpo-cache, or is written in another format."""


class NewerFormatError(FormatError):
    """The cache was written in a newer format than this dpo-cache reads."""


class CorruptShardError(CacheError):
    """The bytes of a file in the cache are not those that were written."""


class NotInCacheError(CacheError):
    """The cache does not have this reference, pair set or score."""


class StorageError(CacheError):
    """The file system refused to read or write."""

    @property
    def is_denied(self) -> bool:
        """Return whether this user lacks the permission, as for a file of another user."""
        return isinstance(self.__cause__, PermissionError)


class MissingFileError(StorageError):
    """A file of the cache does not exist; another process may have removed it since it was listed."""


class TrainingError(DpoCacheError):
    """A training run cannot start or continue."""


class StepZeroError(TrainingError):
    """The policy should start as the reference, but its log-probs differ from the cached ones."""


class OtherRankError(TrainingError):
    """Another process of a run on several devices failed, and reports why; this one ends, too."""

    def __init__(self, message: object = "", code: int = 1) -> None:
        super().__init__(message)
        self.code = code  # with which the command line ends


def shown_rows(rows: Sequence[object], *, most: int = 8, count: int | None = None) -> str:
    """Row numbers for a message, `0, 3, 4, …`: the first `most` of them, and whether there are more.

    `count` is how many rows there are in all, if `rows` are only the first of them.
    """
    is_cut = (len(rows) if count is None else count) > min(len(rows), most)
    return ", ".join(map(str, rows[:most])) + (", …" if is_cut else "")


def shown_bytes(num_bytes: float) -> str:
    """A number of bytes with a unit in which it has one to three digits before the point: `12.3 kB`."""
    for unit, digits in (("B", 0), ("kB", 1), ("MB", 1), ("GB", 2)):
        if round(num_bytes, digits) < 1000:
            return f"{num_bytes:.{digits}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.2f} TB"


def kind_of(value: object) -> str:
    """The class of a value with its article, `an int`, `a Linear`, for a message."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeioAEIO' else 'a'} {name}"


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or the error's type where the message is empty.

    A line that ends with a colon announces the next one, which is added: `Validation error for field 'n':`.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    end = next((place for place, line in enumerate(lines) if not line.endswith(":")), len(lines) - 1)
    return " ".join(lines[: end + 1])


def printable(text: object) -> str:
    """The text on one line, with all that is no visible character escaped, such as `\\x1b` and `\\n`.

    Every name or text that comes from a file passes through here or `printable_lines` on its way to a
    terminal: escape sequences, line breaks and reversed writing in it have no effect.
    """
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text)
    )


def printable_lines(text: str) -> str:
    """The same of a text of several lines: its line feeds stay."""
    return text if text.isprintable() else "\n".join(map(printable, text.split("\n")))
