"""The version of csdraft, as it is written beside everything that is saved."""

__version__ = "0.1.0"
