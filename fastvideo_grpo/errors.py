"""Errors whose message is all the user needs."""


class UserError(Exception):
    """Something the user can repair; the message says what and how, and the command line prints it without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run. The message names each key, its value, what is allowed and a way out."""
