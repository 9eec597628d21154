"""Elementary functions of vectors on CPUs."""

from __future__ import annotations

import torch

FUNCTIONS = ("cos", "sin", "exp", "log", "sqrt")
"""Of PyTorch's, which are MKL's on a CPU. Angles and scores take all but `exp` and `log`, methods of others those."""


def settle_vector_math() -> None:
    """Calls each elementary function once for one element, in one thread; to be called before a model is built.

    MKL chooses its code for such a function when it is called first. Where several threads do so at once, one of them
    may run code of low accuracy (errors of 1e-4 in a table of cosines, in up to one process of ten:
    https://github.com/pytorch/pytorch/issues/188792), and tables that are kept would keep it.
    """
    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for name in FUNCTIONS:
            getattr(one, name)()
