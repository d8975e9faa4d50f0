"""``allears serve``: wrong options in one line, and a real server that is asked, stopped, and ends in good order."""

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import asdict

import pytest
from tests.models.echo_nets import SMALL, make

from allears.cli.main import main
from allears.core.weights import save_weights


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save_weights(folder / "weights", make().state_dict(), {"model": "echo", "config": asdict(SMALL)})
    return folder


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--port", "70000"], "port: got 70000, wanted 0 to 65535"),
        (["--max-sessions", "0"], "max-sessions: got 0, wanted 1 or more"),
        (["--workers", "-1"], "workers: got -1, wanted 1 or more"),
        (["--max-minutes", "0"], "max-minutes: got 0, wanted more than 0"),
        (["--key", "nowhere.pem"], "key: given without a certificate; give both"),
        (["--certificate", "nowhere.pem"], "certificate, key: nowhere.pem is no file"),
        (["--engine", "tvm"], "--engine"),
    ],
)
def test_wrong_options_are_told_in_one_line(capsys, options, text):
    assert main(["serve", *options]) == 2
    told = capsys.readouterr().err
    assert text in told and told.count("\n") == 1


def test_missing_packages_and_weights_are_told(monkeypatch, capsys, tmp_path):
    assert main(["serve", "--model", str(tmp_path)]) == 2
    assert "neither shipped weights" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    assert "the server needs the package 'uvicorn'" in capsys.readouterr().err


def test_an_address_in_use_is_told(weights, capsys):
    pytest.importorskip("uvicorn")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--model", str(weights), "--port", str(port)]) == 2
    assert "Address already in use" in capsys.readouterr().err


def test_it_serves_until_it_is_told_to_stop(weights):
    pytest.importorskip("fastapi")
    websockets = pytest.importorskip("websockets.sync.client")
    options = ["--model", str(weights), "--port", "0", "--engine", "torch", "--max-sessions", "2", "--workers", "1"]
    command = [sys.executable, "-m", "allears", "serve", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        told = re.fullmatch(r"serving (?:.*) by pytorch on 1 cores, 2 sessions at once: (http://\S+\d)/\n", line)
        assert told, line
        with urllib.request.urlopen(f"{told[1]}/healthz", timeout=10) as answer:
            assert json.load(answer)["engine"] == "pytorch"
        with websockets.connect(f"{told[1].replace('http', 'ws')}/v1/echo?sample_rate_hz=16000") as stream:
            assert json.loads(stream.recv(timeout=10))["model"] == "weights"
            process.send_signal(signal.SIGTERM)
            messages = [stream.recv(timeout=10), stream.recv(timeout=10)]
        assert json.loads(messages[1])["message"] == "the server is stopping"
        assert process.wait(15) == 0 and process.stderr is not None and process.stderr.read() == ""
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_signal_that_stops_it_is_no_error(number):
    """uvicorn raises the signal again when it is done; the handlers before are there again afterwards."""
    from allears.serve.run import serve

    class Server:
        def run(self, sockets):
            signal.raise_signal(number)
            self.sockets = sockets

    before, server, listening = signal.getsignal(number), Server(), socket.create_server(("127.0.0.1", 0))
    serve(server, listening)
    assert server.sockets == [listening] and listening.fileno() == -1 and signal.getsignal(number) is before
