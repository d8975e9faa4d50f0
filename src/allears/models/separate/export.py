"""The separator as an ONNX file, and whether it gives what PyTorch gives.

PyTorch's exporter of traced graphs is used, which needs the package ``onnx`` alone; the file runs by onnxruntime on any
number of samples. Complex numbers, which ONNX lacks, do not occur: TF-Locoformer's transforms are products with
matrices. Shapes: S samples, J talkers.
"""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from allears.audio.stft_matrix import MatrixStft
from allears.core.errors import require
from allears.models.separate.locoformer import Locoformer
from allears.models.separate.model import SeparateNet, export_state
from allears.models.separate.sepreformer import Separation

INPUT, OUTPUT = "mixture", "talkers"
"""Names in the file: (1, S) and (1, J, S), float32, at the rate of the network."""

_OPSET = 17  # the first with layer norm


def export_onnx(net: SeparateNet, path: str | Path, seconds: float = 1.0) -> Path:
    """Write ``net`` as an ONNX file of one input (1, S) and one output (1, J, S); S is at least 1, or of a SepReformer
    at least the encoder's kernel.

    Args:
        net: a TF-Locoformer or an FLA-SepReformer, trained or not; it stays as it is.
        path: where to; a file there is replaced when the new one is complete.
        seconds: length of the input that is traced; the file does not depend on it.

    Raises:
        ValueError: a SepReformer with softmax attention, or a length that is too short.
        MissingDependencyError: the package ``onnx`` is not installed.
    """
    size = net.config.sepreformer
    if size is not None and net.config.attention != "fla":
        raise ValueError(
            f"net: attention {net.config.attention!r} given, of a SepReformer, whose graph then depends on the length; "
            f"only 'fla' is exported"
        )
    samples = round(seconds * net.config.sample_rate_hz)
    if samples < (size.kernel if size is not None else 1):
        raise ValueError(f"seconds: {seconds} given, less than a frame; at least 0.01 is wanted")
    require("onnx", "onnx", "writing an ONNX file")
    plain = SeparateNet(net.config)
    plain.load_state_dict({name: value.detach().cpu() for name, value in export_state(net).items()})
    if isinstance(plain.core, Locoformer):
        plain.add_module("core", _RealLocoformer(plain.core))
    mixture = 0.1 * torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    with warnings.catch_warnings(), torch.no_grad(), _Reshaped():
        warnings.simplefilter("ignore")  # of the tracer: which of Python's values stay as they are
        torch.onnx.export(
            plain.eval(),
            (mixture,),
            str(partial),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {1: "samples"}, OUTPUT: {2: "samples"}},
            opset_version=_OPSET,
            dynamo=False,
        )
    os.replace(partial, path)
    return path


class _RealLocoformer(nn.Module):
    """A TF-Locoformer in real numbers; of what it makes the samples alone are given."""

    def __init__(self, net: Locoformer) -> None:
        super().__init__()
        self.net, self.stft = net, MatrixStft(net.stft)

    def forward(self, mixture: Tensor) -> Separation:
        y, _ = self.net.spectra(self.stft(mixture))
        out = self.stft.inverse(y.flatten(0, 1), mixture.shape[1])
        return Separation(out.reshape(-1, self.net.talkers, out.shape[1]), [], out, out)


class _Reshaped(TorchFunctionMode):
    """``unflatten`` as ``reshape``: of the former the exporter loses which sizes depend on the input, and writes down
    those of the traced example."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.unflatten:
            return func(*args, **(kwargs or {}))
        x, dim, sizes = args
        dim %= x.dim()
        return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])


def check_onnx(net: SeparateNet, path: str | Path, lengths: Sequence[int]) -> float:
    """The largest difference between ``net`` and the file at ``path``, over the largest sample of the outputs, on
    normal noise of each of ``lengths`` samples.

    Raises:
        MissingDependencyError: onnxruntime is not installed.
    """
    runtime = require("onnxruntime", "onnx", "running an ONNX file")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    device, worst = next(net.parameters()).device, 0.0
    for length in lengths:
        mixture = 0.1 * torch.randn(1, length, generator=torch.Generator().manual_seed(length))
        with torch.inference_mode():
            wanted = net(mixture.to(device)).cpu()
        got = torch.from_numpy(session.run([OUTPUT], {INPUT: mixture.numpy()})[0])
        if got.shape != wanted.shape:
            raise ValueError(
                f"path: {path} gives {tuple(got.shape)} for {length} samples, wanted {tuple(wanted.shape)}"
            )
        worst = max(worst, float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-12)))
    return worst
