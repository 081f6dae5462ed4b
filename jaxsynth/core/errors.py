"""Errors a user can act on: the command prints them as one line instead of a traceback."""


class UserError(Exception):
    """What a user did, or what their files hold, stops the run; the message says what to change."""


class UsageError(UserError):
    """The command line or the config is wrong, so nothing was started (exit code 2)."""
