"""The one exception a user is meant to read."""


class UserError(Exception):
    """A mistake the user can mend; its text is one sentence naming what was found and expected.

    The entry points print it as ``error: <text>`` on stderr and exit with status 2.
    """
