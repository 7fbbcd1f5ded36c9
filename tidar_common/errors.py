"""The one exception type that stands for a mistake the user can mend."""


class UserError(ValueError):
    """A bad config value or input file.

    Its text is one line that names the key or the file and says what to do about it.
    Command-line entry points print that line on stderr and leave with exit code 2;
    every other exception is a fault of this project and keeps its traceback.
    """
