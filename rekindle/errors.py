"""The one exception a user meets: something they can mend, told in one line."""


class UserError(Exception):
    """What is wrong, where, and what to do. The command line prints it and exits with status 2."""
