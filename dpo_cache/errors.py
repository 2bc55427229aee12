"""Everything a user can cause, as one tree.

    DpoCacheError
    ├── OptionError            an option's value makes no sense                    (also a ValueError)
    ├── ShapeError             tensors given to a loss do not match                (also a ValueError)
    ├── DataError              the data set cannot be read as preferences
    ├── ModelError             the model or its tokenizer cannot be used
    ├── CacheError             the cache cannot be used
    │   ├── FormatError        not a cache at all
    │   │   └── NewerFormatError   made by a newer dpo-cache
    │   ├── CorruptShardError  bytes on disk are not the bytes that were written
    │   ├── NotInCacheError    the reference, pair set or score asked for is not there
    │   └── StorageError       the file system refused: full, read-only, gone
    │       └── MissingFileError  a file that was listed or named is not there, or not any more
    └── TrainingError          the run cannot start or go on
        └── StepZeroError      the policy that starts as the reference does not repeat its log-probs

Every message says where, what was expected, what was found, and what to do next.
"""


class DpoCacheError(Exception):
    """Base of every error this package raises on purpose."""


class OptionError(DpoCacheError, ValueError):
    """An option's value makes no sense, alone or beside another one."""


class ShapeError(DpoCacheError, ValueError):
    """Tensors that must have one shape do not; broadcasting them would give wrong numbers."""


class DataError(DpoCacheError):
    """The data set is missing, empty, of no known format, or has unusable rows."""


class ModelError(DpoCacheError):
    """The model or tokenizer is missing, or is of a kind that has no completion log-probs."""


class CacheError(DpoCacheError):
    """The cache cannot be used as asked."""


class FormatError(CacheError):
    """The folder is no dpo-cache, or one written in another format."""


class NewerFormatError(FormatError):
    """The cache was written in a newer format than this dpo-cache reads."""


class CorruptShardError(CacheError):
    """A file in the cache is not what was written there."""


class NotInCacheError(CacheError):
    """The reference, pair set or score asked for is not in this cache."""


class StorageError(CacheError):
    """The file system refused to read or write."""


class MissingFileError(StorageError):
    """A file of the cache is not there; another process may have removed it since it was listed."""


class TrainingError(DpoCacheError):
    """A training run cannot start or go on."""


class StepZeroError(TrainingError):
    """The policy should start as the reference, but its log-probs differ from the cached ones."""


def first_line(error: BaseException) -> str:
    """What another library's error says, in one line; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
