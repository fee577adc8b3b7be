"""The one learning-rate schedule."""

import math


def warmup_cosine(step: int, *, total: int, warmup: int) -> float:
    """Factor on the learning rate of step `step`: linear warm-up, then cosine decay to 0 at `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
