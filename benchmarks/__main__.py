"""``python -m benchmarks CASE``: run a benchmark and write ``benchmarks/results/NAME.json``."""

import logging
import sys

import tyro

from benchmarks.registry import CASES, load_all


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    load_all()
    command = tyro.extras.subcommand_cli_from_dict(
        CASES, prog="python -m benchmarks", description=__doc__, config=(tyro.conf.FlagCreatePairsOff,)
    )
    try:
        return command.run()
    except (ValueError, ImportError, OSError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
