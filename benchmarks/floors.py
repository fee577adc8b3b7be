"""What an H200 needs at least: bytes that must move and operations that must be done, at its rates.

4.3e12 bytes/s was measured on one (copies; its data sheet says 4.8e12). The other rates are the data sheet's or follow
from it: 132 multiprocessors at 1.98 GHz with 16 exponentials and 128 float32 multiply-adds per clock each.
"""

RATES = {"bytes": 4.3e12, "bf16": 989e12, "tf32": 495e12, "flop": 67e12, "exp": 4.2e12}


def floors(
    *, num_bytes: float = 0, flop: float = 0, tf32: float = 0, bf16: float = 0, exponentials: float = 0
) -> dict[str, float]:
    """Seconds by what is counted, of those that are: bytes, float32, TF32 or bf16 operations, exponentials."""
    work = {"bytes": num_bytes, "bf16": bf16, "tf32": tf32, "flop": flop, "exp": exponentials}
    return {name: amount / RATES[name] for name, amount in work.items() if amount}
