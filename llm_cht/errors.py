"""The one exception for mistakes of the user.

The command line prints a ``UserError`` without a traceback and exits with 2; every other exception is a defect of ours
and keeps its traceback. A subclass of ``ValueError``, so that library users may catch the standard type. A hierarchy of
error classes was left out: nobody handles one mistake differently from another.
"""


class UserError(ValueError):
    """A setting, file or call that cannot work; the message names the value, the place and the remedy."""

    everywhere: bool = False
    """whether all ranks raise the same error at the same place: then one of them prints it"""
