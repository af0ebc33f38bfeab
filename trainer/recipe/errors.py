"""The one exception that means "the user can mend this"."""

from __future__ import annotations

EXIT_STATUS = 2


class UserError(Exception):
    """Bad input, found before work starts. The message is one line: what, where, and what would be right.

    The command line prints it without a traceback and exits with status 2.
    """
