"""Large tensors whose memory is used again: fresh pages from the operating system cost more than what fills them.

Memory returns to the pool when the last tensor over it dies, so any number of forward passes may await their backward.
"""

import ctypes
import math
import mmap
import weakref

import torch
from torch import Tensor

SMALLEST = 1 << 20  # bytes; below, torch's allocator is good enough

_free: list[mmap.mmap] = []


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor. Pages never written never become real, so generous sizes cost nothing."""
    bytes_needed = math.prod(shape) * dtype.itemsize
    if bytes_needed < SMALLEST or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(shape, dtype=dtype)
    block = _take(bytes_needed)
    view = (ctypes.c_char * bytes_needed).from_buffer(block)
    weakref.finalize(view, _free.append, block).atexit = False
    return torch.frombuffer(view, dtype=dtype).view(shape)


def _take(size: int) -> mmap.mmap:
    """The smallest free block that is large enough; if there is none, a new one in place of all that were too small."""
    fitting = [block for block in list(_free) if len(block) >= size]
    for block in sorted(fitting, key=len):
        try:
            _free.remove(block)
        except ValueError:  # another thread was faster
            continue
        return block
    _free.clear()
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        block.madvise(mmap.MADV_HUGEPAGE)
    return block
