"""The one exception that speaks to users."""


class UserError(Exception):
    """Something the user can mend: one line that says what is wrong, where, and what to do.

    The command line prints it without a traceback and exits with code 2.
    """
