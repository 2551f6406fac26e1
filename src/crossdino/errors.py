"""The one exception for mistakes that the user can mend.

The command line prints its message as a single line and exits with status 2; everything else is a bug of ours and
keeps its traceback. The message must name the offending file or value and the remedy.
"""


class InputError(ValueError):
    """Something the user gave us (a file, a value, a name) cannot be used; the message says what to do instead."""
