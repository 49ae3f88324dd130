"""The one exception for mistakes of the user.

The command line prints a ``UserError`` without a traceback and exits with 2; every other exception is a defect of ours
and keeps its traceback. A subclass of ``ValueError``, so that library users may catch the standard type. A hierarchy of
error classes was left out: nobody handles one mistake differently from another.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A setting, file or call that cannot work; the message names the value, the place and the remedy."""

    everywhere: bool = False
    """whether all ranks raise the same error at the same place: then one of them prints it"""


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message that refuses a name: the nearest known one, or all."""
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known: {', '.join(names)}"
