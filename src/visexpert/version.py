"""The version, written down once: the build, the command line and every run read it here."""

__version__ = "0.2.0.dev0"
