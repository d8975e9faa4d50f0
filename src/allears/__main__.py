"""``python -m allears``: the same as the console script ``allears``."""

from allears.cli.main import entry

if __name__ == "__main__":
    entry()
