"""The command line as a user meets it: help without torch, one line an error, exit statuses."""

import errno
import importlib
import os
import signal
import subprocess
import sys
import time
import tomllib
import types
from dataclasses import dataclass
from pathlib import Path

import pytest

from allears.cli import main as cli
from allears.core.errors import AudioFileError, MissingDependencyError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def verb(monkeypatch):
    """Installs a verb ``doctor`` whose ``run`` is the function given; its only option is ``--number``."""

    def install(run):
        @dataclass
        class Command:
            """Do it."""

            number: int = 0
            """A number."""

            def run(self) -> int:
                return run(self)

        module = types.ModuleType("allears.cli.doctor")
        module.COMMAND = Command
        monkeypatch.setitem(sys.modules, "allears.cli.doctor", module)

    return install


def raising(error):
    def run(_):
        raise error

    return run


def error_line(capsys) -> str:
    text = capsys.readouterr().err
    assert text.startswith("allears: error: ") and text.count("\n") == 1, text
    return text


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["nonsense"], *([v, "--help"] for v in cli.VERBS)])
def test_help_and_errors_import_no_torch(arguments):
    code = (
        "import sys; from allears.cli.main import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'scipy', 'matplotlib', 'librosa'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_imports_no_verb_and_names_each():
    code = (
        "import sys; from allears.cli.main import main; main(['--help']);"
        "print([n for n in sys.modules if n.startswith('allears.cli.')], 'tyro' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "['allears.cli.main'] False"
    for name in cli.VERBS:
        assert f"\n  {name}" in done.stdout


@pytest.mark.parametrize("name", list(cli.VERBS))
def test_every_verb_has_a_command(name):
    module = importlib.import_module(f"allears.cli.{name.replace('-', '_')}")
    commands = list(module.COMMANDS.values()) if hasattr(module, "COMMANDS") else [module.COMMAND]
    assert commands and all(callable(command.run) for command in commands)


def test_module_and_console_script_are_the_same_entry():
    done = subprocess.run([sys.executable, "-m", "allears", "--version"], capture_output=True, text=True, check=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert done.stdout == f"allears {project['version']}\n"
    assert project["scripts"]["allears"] == "allears.cli.main:entry" and callable(cli.entry)


def test_unknown_verb_suggests_the_nearest(capsys):
    assert cli.main(["enhanse"]) == 2
    line = error_line(capsys)
    assert "unknown verb 'enhanse'" in line and "did you mean 'enhance'?" in line


def test_unknown_verb_far_from_all_suggests_none(capsys):
    assert cli.main(["zzz"]) == 2
    line = error_line(capsys)
    assert "did you mean" not in line and all(name in line for name in cli.VERBS)


def test_no_verb_shows_help_and_fails(capsys):
    assert cli.main([]) == 2
    assert "usage: allears VERB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("steps: got 0, wanted 1"), "steps: got 0, wanted 1"),
        (AudioFileError("a.wav: no audio"), "a.wav: no audio"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x.wav"), "No such file: x.wav"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (MissingDependencyError("install\nav"), "install av"),
        (RuntimeError("shape"), "unexpected RuntimeError: shape (a fault of allears; --debug shows where)"),
        (MemoryError(), "out of memory"),
    ],
)
def test_errors_are_one_line_and_status_2(verb, capsys, error, text):
    verb(raising(error))
    assert cli.main(["doctor"]) == 2
    assert error_line(capsys) == f"allears: error: {text}\n"


@pytest.mark.parametrize(
    "arguments", [["--debug", "doctor"], ["doctor", "--debug"], ["doctor", "--number=3", "--debug"]]
)
def test_debug_anywhere_shows_the_traceback(verb, capsys, arguments):
    verb(raising(ValueError("bad")))
    assert cli.main(arguments) == 2
    text = capsys.readouterr().err
    assert "Traceback (most recent call last)" in text and text.endswith("allears: error: bad\n")


def test_interrupt_gives_130(verb, capsys):
    verb(raising(KeyboardInterrupt()))
    assert cli.main(["doctor"]) == 130
    assert error_line(capsys) == "allears: error: interrupted\n"


def test_status_and_options_reach_the_command(verb):
    verb(lambda command: command.number)
    assert cli.main(["doctor", "--number", "5"]) == 5
    assert cli.main(["doctor"]) == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--nubmer", "3"], "Unrecognized options: --nubmer"),
        (["--number", "x"], "--number"),
        (["--number"], "--number"),
        (["stray"], "stray"),
    ],
)
def test_wrong_arguments_are_one_line(verb, capsys, arguments, text):
    verb(lambda _: 0)
    assert cli.main(["doctor", *arguments]) == 2
    line = error_line(capsys)
    assert text in line and line.endswith("(see: allears doctor --help)\n")
    assert not set(line) & set("│╭╮╰╯─")


def test_global_flags_stop_at_a_double_dash(verb):
    assert cli._take_global_flags(["enhance", "-v", "--", "--debug"]) == (["enhance", "--", "--debug"], False, True)


def test_info_is_logged_only_when_verbose(verb, capsys):
    import logging

    def run(_):
        logging.getLogger("allears.some.room").info("told")
        logging.getLogger("allears.some.room").warning("warned")
        return 0

    verb(run)
    assert cli.main(["doctor"]) == 0
    quiet = capsys.readouterr().err
    assert "warned" in quiet and "told" not in quiet
    assert cli.main(["doctor", "-v"]) == 0
    loud = capsys.readouterr().err
    assert loud.count("told") == 1 and loud.count("warned") == 1


def test_closed_pipe_is_no_error():
    command = f"{sys.executable} -m allears --help | head -c 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.stdout == "a"


def test_termination_cleans_up_and_gives_143(tmp_path):
    code = (
        "import sys, time, types\n"
        "from dataclasses import dataclass\n"
        "from allears.cli.main import entry\n"
        "@dataclass\n"
        "class Command:\n"
        "    def run(self):\n"
        "        try:\n"
        "            print('ready', flush=True); time.sleep(30)\n"
        "        finally:\n"
        "            print('cleaned', flush=True)\n"
        "module = types.ModuleType('allears.cli.doctor'); module.COMMAND = Command\n"
        "sys.modules['allears.cli.doctor'] = module; sys.argv = ['allears', 'doctor']; entry()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    begun = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    rest, _ = process.communicate(timeout=20)
    assert rest == "cleaned\n" and process.returncode == 143 and time.monotonic() - begun < 20
