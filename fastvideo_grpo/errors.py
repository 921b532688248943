"""Errors whose message is all the user needs, and any error in a line."""


class UserError(Exception):
    """Something the user can repair; the message says what and how, and the command line prints it without a traceback."""


class ConfigError(UserError, ValueError):
    """A configuration that cannot run. The message names each key, its value, what is allowed and a way out."""


class Escape(RuntimeError):
    """What was raised for others to end by (SystemExit, KeyboardInterrupt, GeneratorExit and the like), as an error: whoever
    waits for an answer is not to end by it. Its message is that of :func:`one_line`."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(one_line(error))
        self.__cause__ = error


def one_line(error: BaseException) -> str:
    """``TYPE: message`` of anything that was raised, in one line that every terminal and file takes.

    What others raise may have no message that can be had; then its type stands alone.
    """
    kind = type(error).__name__
    try:
        message = " ".join(line.strip() for line in str(error).splitlines())
    except BaseException as second:  # its own __str__ may raise anything, too
        return f"{kind}, whose message cannot be read ({type(second).__name__})"
    message = message[:2000].encode("utf-8", "backslashreplace").decode()  # lone surrogates cannot be written
    if isinstance(error, Escape):
        return message
    return f"{kind}: {message}" if message else kind
