"""The one kind of error that is the user's to mend."""


class InputError(Exception):
    """Something the user gave is wrong.

    The message is one sentence that names the file, key or line and says what to do. Everything that catches it prints
    that sentence without a traceback and exits with a non-zero status.
    """
