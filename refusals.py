"""The one exception for bad input, which models, utils and scripts share."""


class Refusal(ValueError):
    """Bad input: the message names the value and what was expected. A script prints it and exits with code 2."""
