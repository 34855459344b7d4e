"""Every error that Tripoise raises on purpose.

    MergeError                        anything below
    ├── RecipeError (ValueError)        what the user asked for is not meaningful
    ├── IncompatibleError (ValueError)  the checkpoints do not fit together
    ├── CheckpointError (ValueError)    a file or folder is missing, damaged or of the wrong kind
    │   └── StorageError                  object storage that kept failing; another attempt may succeed
    ├── NumericalError (ArithmeticError)  a tensor is not finite
    └── ProcessError (RuntimeError)     a process of ours was stopped at its time limit, or died

A message reads: subject, expectation, the value found, and a remedy that one can act on.
The command line prints it as one line; Prefect shows it as the state of the task run.
"""


class MergeError(Exception):
    """Base of all errors below."""


class RecipeError(MergeError, ValueError):
    """A recipe, suite or setting that has no meaning; nothing was read or written."""


class IncompatibleError(MergeError, ValueError):
    """Checkpoints whose tensors, shapes or vocabularies differ."""


class CheckpointError(MergeError, ValueError):
    """A checkpoint or artifact that is missing, incomplete, damaged or in a refused format."""


class StorageError(CheckpointError):
    """Object storage that could not be reached or kept failing; what it holds may be whole."""


class NumericalError(MergeError, ArithmeticError):
    """A tensor holds NaN or infinity, before or after merging."""


class ProcessError(MergeError, RuntimeError):
    """A child process that was stopped at its time limit, or died before it had an answer."""
