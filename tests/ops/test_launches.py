import torch

from allears.ops.launches import Kept, Known


class Kernel:
    """Stands for a Triton kernel: what was launched through its dispatcher, and what as it was compiled."""

    arg_names = ("x", "y", "n", "WIDTH")

    def __init__(self, interpreted=False):
        self.interpreted, self.dispatched, self.direct = interpreted, [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.dispatched.append((grid, arguments, constants))
            return None if self.interpreted else Compiled(self.direct)

        return launch


class Compiled:
    def __init__(self, ran):
        self.ran = ran

    def __getitem__(self, grid):
        return lambda *arguments: self.ran.append((grid, arguments))


def test_a_kernel_is_dispatched_once_for_what_it_is_compiled_for():
    kernel, x = Kernel(), torch.zeros(9)
    known = Known(kernel)
    for n in (5, 7):
        known((n, 1, 1), (x, None, n), {"WIDTH": 4}, num_warps=2)
    assert kernel.dispatched == [((5, 1, 1), (x, None, 5), {"WIDTH": 4, "num_warps": 2})]
    assert kernel.direct == [((7, 1, 1), (x, None, 7, 4))]
    others = (
        ((x.half(), None, 5), {"WIDTH": 4}, None, 2),  # another type
        ((x[1:], None, 5), {"WIDTH": 4}, None, 2),  # not aligned
        ((x, x, 5), {"WIDTH": 4}, None, 2),
        ((x, None, 5), {"WIDTH": 8}, None, 2),
        ((x, None, 5), {"WIDTH": 4}, 5, 2),
        ((x, None, 5), {"WIDTH": 4}, None, 4),
    )
    for arguments, constants, key, warps in others:
        known((1, 1, 1), arguments, constants, key, num_warps=warps)
    assert len(kernel.dispatched) == 1 + len(others) and len(kernel.direct) == 1


def test_the_interpreter_is_asked_each_time():
    kernel = Kernel(interpreted=True)
    known = Known(kernel)
    for _ in range(2):
        known((1, 1, 1), (torch.zeros(1), None, 1), {"WIDTH": 4})
    assert len(kernel.dispatched) == 2


def test_kept_things_have_one_holder_and_are_forgotten_beyond_the_most():
    kept, made = Kept(most=2), []

    def make():
        made.append(object())
        return made[-1]

    first = kept.take("a", make)
    assert kept.take("a", make) is not first and len(made) == 2  # the first is in use
    kept.give("a", first)
    assert kept.take("a", make) is first and len(made) == 2
    kept.give("a", first)
    kept.give("b", make())
    kept.give("c", make())  # a third key: all others go
    assert kept.take("c", make) is made[3] and kept.take("a", make) is not first
