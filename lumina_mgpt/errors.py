"""The one exception that means: the user gave something that cannot work, and can mend it."""


class InputError(ValueError):
    """What a user can cause and mend: an option, a file, a folder, a missing device.

    The message names the option or file, the value got, the rule and a remedy, in one line. Entry points print it on
    stderr and exit with status 2; everything else that goes wrong is a bug and keeps its traceback.
    """
