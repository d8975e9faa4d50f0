"""The mark by which compiled graphs take an answer as a constant."""

import subprocess
import sys

import torch

from allears.ops.constant import constant_in_graphs


def test_it_is_the_compilers_own_mark():
    def ours() -> int:
        return 1

    def theirs() -> int:
        return 1

    constant_in_graphs(ours)
    torch.compiler.assume_constant_result(theirs)
    assert vars(ours) == vars(theirs) and vars(ours)


def test_the_answer_is_kept():
    calls = []

    @constant_in_graphs
    def answer() -> int:
        calls.append(1)
        return 3

    compiled = torch.compile(lambda x: x * answer(), backend="eager", fullgraph=True)
    x = torch.ones(2)
    assert compiled(x).tolist() == compiled(x + 1).tolist() == [3.0, 3.0] or compiled(x + 1).tolist() == [6.0, 6.0]
    assert len(calls) <= 2


def test_models_start_without_the_compiler():
    code = "import sys, allears.models.enhance; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
