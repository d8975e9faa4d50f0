"""The command line ``allears``: finds the verb, imports that verb alone, and turns every error into one line.

Each verb is a module ``allears.cli.VERB`` that exposes either ``COMMAND`` (a dataclass) or ``COMMANDS`` (name to
dataclass, for a verb with sub-verbs). tyro fills the dataclass from the arguments, and its ``run() -> int`` does the
work and gives the exit status. A verb module imports torch and the models inside ``run``, so that its ``--help`` is
quick.
"""

import contextlib
import difflib
import io
import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from allears import __version__

VERBS = {
    "enhance": "clean recorded speech: files, folders or globs in, the same files without the noise out",
    "separate": "part the talkers of a recording: files, folders or globs in, one file per talker out",
    "cancel-echo": "take a loudspeaker's echo out of a microphone's recording: files, folders or globs in pairs",
    "video": "make a short video of what a sentence says, in a small world of things that move",
    "eval": "score audio files, or a model on a test set",
    "train": "train a model from a recipe",
    "data": "prepare the corpora and inspect their manifests",
    "serve": "cancel echo live: a server for many streams, and a web page to try it",
    "bench": "measure kernels and networks on this machine, beside the other packages installed",
    "doctor": "show what this machine has, and which kernels and models can run on it",
}
"""Every verb with its summary. A static table, so that ``allears --help`` imports none of them."""

OK, FAILED, INTERRUPTED = 0, 2, 130


class _StderrHandler(logging.Handler):
    """Looks ``sys.stderr`` up for every record, so that a log line does not tear a progress bar that redirects it."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


def entry() -> NoReturn:
    """The console script: run :func:`main` on the process's arguments and exit with its status."""
    logging.captureWarnings(True)
    with contextlib.suppress(ValueError, OSError, AttributeError):  # not the main thread, or no such signal here
        signal.signal(signal.SIGTERM, _terminate)
    raise SystemExit(main())


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit status.

    Args:
        argv: the arguments after the program's name; ``None`` takes the process's own.

    Returns:
        0 when all went well, 2 after an error (one line on stderr), 130 when interrupted.
    """
    arguments, debug, verbose = _take_global_flags(list(sys.argv[1:] if argv is None else argv))
    _set_up_logging(verbose)
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        _report("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as in `allears --help | head -1`
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        if debug:
            traceback.print_exc()
        _report(describe(error))
        return FAILED


def describe(error: BaseException) -> str:
    """An exception as one line for a user."""
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.strerror}: {error.filename}"
    elif isinstance(error, (ValueError, OSError, ImportError)):
        text = str(error) or type(error).__name__
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        text = f"out of memory: {error}" if str(error) else "out of memory"
    else:
        text = f"unexpected {type(error).__name__}: {error} (a fault of allears; --debug shows where)"
    return " ".join(text.split())


def _report(message: str) -> None:
    print(f"allears: error: {message}", file=sys.stderr)


def _terminate(signum: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + signum)


def _take_global_flags(arguments: list[str]) -> tuple[list[str], bool, bool]:
    """Take ``--debug`` and ``-v`` out of the arguments, wherever they stand before a ``--``."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    head, tail = arguments[:end], arguments[end:]
    rest = [word for word in head if word not in ("--debug", "-v", "--verbose")]
    return [*rest, *tail], "--debug" in head, "-v" in head or "--verbose" in head


def _set_up_logging(verbose: bool) -> None:
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _StderrHandler)]
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("%(name)s: %(levelname)s: %(message)s"))
    root.addHandler(handler)
    logging.getLogger("allears").setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbose else logging.ERROR)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return OK if arguments else FAILED
    if arguments[0] in ("--version", "-V"):
        print(f"allears {__version__}")
        return OK
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        raise ValueError(_unknown(verb))
    return _parse(verb, rest)


def _parse(verb: str, arguments: list[str]) -> int:
    import tyro

    module = import_module(f"allears.cli.{verb.replace('-', '_')}")
    prog, config = f"allears {verb}", (tyro.conf.FlagCreatePairsOff,)
    spoken = io.StringIO()
    try:
        with contextlib.redirect_stderr(spoken):
            if hasattr(module, "COMMANDS"):
                command = tyro.extras.subcommand_cli_from_dict(
                    module.COMMANDS, prog=prog, args=arguments, description=VERBS[verb].capitalize(), config=config
                )
            else:
                command = tyro.cli(module.COMMAND, prog=prog, args=arguments, config=config)
    except SystemExit as stop:
        if not stop.code:
            return OK  # --help
        raise ValueError(f"{_flatten(spoken.getvalue())} (see: {prog} --help)") from None
    return int(command.run() or 0)


def _flatten(box: str) -> str:
    """The parser's framed message as one line: the frame, the help texts and the hint to ``--help`` are left out."""
    blocks: list[list[str]] = [[]]
    for raw in box.splitlines():
        inside = raw.strip().strip("│")
        line = inside.strip()
        if not line.strip("─╭╮╰╯ "):
            blocks.append([])
        elif not line.startswith(("╭", "╰")) and len(inside) - len(inside.lstrip()) < 8:
            blocks[-1].append(line)
    told = [" ".join(lines) for lines in blocks if lines and not lines[0].startswith("For full helptext")]
    return "; ".join(told) or "the arguments make no sense"


def _unknown(verb: str) -> str:
    known = ", ".join(VERBS)
    if verb.startswith("-"):
        return f"unknown option {verb!r} before the verb; verbs are {known} (see: allears --help)"
    near = difflib.get_close_matches(verb, VERBS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown verb {verb!r}; {hint}verbs are {known} (see: allears --help)"


def _help() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {name:<{width}}  {summary}" for name, summary in VERBS.items())
    return f"""allears {__version__}: clean, separate and generate sound on one attention engine

usage: allears VERB [arguments]
       allears VERB --help

verbs:
{verbs}

anywhere:
  -v, --verbose  say what is being done
  --debug        show the traceback of an error
  --version      print the version"""
