"""The one error of the configuration, apart from the model so that the command line can know it cheaply."""


class ConfigError(Exception):
    """A configuration that cannot be used; the text names the source, the key, the value and what would be right.

    Values of secret keys never stand in the text.
    """
