"""What programs do while they load: torch, transformers and what they bring."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """For imports of torch and transformers. They make millions of objects of which none is garbage, and Python would
    look through them again and again: a sixth of the time. Afterwards it never looks at them again (`gc.freeze`)."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()
