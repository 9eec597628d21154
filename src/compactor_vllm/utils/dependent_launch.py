"""Programmatic dependent launch: a kernel is there before the one in front of it has drained.

A decode step is a chain of some three hundred short kernels, and each begins by filling the GPU: launch, first
instructions, first loads of the constants. On compute capability 9.0 and newer a kernel may do so while its
predecessor is still running, and waits for it (`gdc_wait`) before it touches anything that another kernel writes. A
kernel that takes part, compiled with DEPENDENT,

* calls `gdc_launch_dependents` where its successor may start to come in, however early: it will wait, too;
* calls `gdc_wait` before it reads what is not constant, and before it writes anything. As all that take part do, what
  is in front of its predecessor has ended by then as well. Constant are weights, and what is `settled`: written by a
  kernel behind which, and in front of this one, another kernel ran that does not take part.

Kernels that do not take part, cuBLAS's for example, are waited for wholly, and wait wholly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from compactor_vllm.utils.capability import capability_of

ENABLED = True
"""Whether kernels are launched so where they can be."""

MAX_ROWS = 16
"""With more rows of a step the products are cuBLAS's, which do not take part."""


def dependent_launch(rows: int, x: Tensor) -> dict[str, Any]:
    """Arguments of a launch: the constant DEPENDENT of the kernel, and the launch's attribute.

    Args:
        rows: sequences, or tokens, of the step.
        x: what the kernel works on; in float32 no kernel takes part.
    """
    if ENABLED and rows <= MAX_ROWS and x.dtype.itemsize == 2 and capability_of(x.device) >= (9, 0):
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}
