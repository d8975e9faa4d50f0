"""``allears serve``: live echo cancellation for many streams over WebSockets, with a web page to try it."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

logger = logging.getLogger(__name__)


@dataclass
class Serve:
    """Serve live echo cancellation: streams over WebSockets, a page to try it, /healthz and /metrics.

    It takes as many sessions as this machine keeps up with and refuses one more. Open the address that it prints. A
    browser gives a page the microphone only on this machine (localhost) or over https.
    """

    model: str | None = None
    """Weights: a shipped name or a folder of your own; the default is the shipped echo canceller."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for every one of this machine."""

    port: int = 8000
    """Port to listen on; 0 takes a free one."""

    max_sessions: int | None = None
    """Sessions at once; by default as many as real time allows, measured at the start."""

    max_minutes: float = 60.0
    """Longest session."""

    idle_s: float = 15.0
    """Longest time without a frame."""

    workers: int | None = None
    """Cores that compute; by default all."""

    engine: Literal["auto", "onnx", "torch"] = "auto"
    """What computes: onnx (onnxruntime), torch, or auto: onnx where its packages are installed."""

    drain_s: float = 10.0
    """Time that sessions get to finish when the server stops."""

    any_origin: bool = False
    """Take streams also from pages of other servers."""

    certificate: Path | None = None
    """Certificate file, for https."""

    key: Path | None = None
    """Key file of the certificate."""

    def run(self) -> int:
        if not 0 <= self.port < 65_536:
            raise ValueError(f"port: got {self.port}, wanted 0 to 65535")
        for name in ("max_sessions", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name.replace('_', '-')}: got {value}, wanted 1 or more")
        for name in ("max_minutes", "idle_s", "drain_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name.replace('_', '-')}: got {getattr(self, name):g}, wanted more than 0")
        if self.key is not None and self.certificate is None:
            raise ValueError("key: given without a certificate; give both")
        for path in (self.certificate, self.key):
            if path is not None and not path.is_file():
                raise ValueError(f"certificate, key: {path} is no file")

        from allears.core.errors import require

        for module in ("fastapi", "uvicorn", "websockets"):  # before the slow part
            require(module, "serve", "the server")

        import torch

        from allears.models.echo import EchoCanceller
        from allears.serve.engines import choose_engine, cores
        from allears.serve.hall import Hall, fitting
        from allears.serve.limits import Limits
        from allears.serve.run import listen, make_server, serve

        torch.set_num_threads(1)  # sessions share the cores, not the layers
        canceller = EchoCanceller.from_pretrained(*(() if self.model is None else (self.model,)), device="cpu")
        listening = listen(self.host, self.port)
        engine = choose_engine(canceller.net, self.engine, self.workers or cores())
        most = self.max_sessions or fitting(engine)
        hall = Hall(engine, most, Limits(session_s=60 * self.max_minutes, idle_s=self.idle_s), canceller.name)
        server = make_server(
            hall,
            drain_s=self.drain_s,
            any_origin=self.any_origin,
            certificate=None if self.certificate is None else str(self.certificate),
            key=None if self.key is None else str(self.key),
        )
        scheme = "http" if self.certificate is None else "https"
        host, port = listening.getsockname()[:2]
        shown = "localhost" if host in ("127.0.0.1", "0.0.0.0", "::1", "::") else host
        print(
            f"serving {canceller.name} by {engine.name} on {engine.workers} cores, {most} sessions at once: "
            f"{scheme}://{shown}:{port}/",
            flush=True,
        )
        serve(server, listening)
        return 0


COMMAND = Serve
