"""Which backends a test of an op goes through."""

from ddfast.ops import dispatch


def backends_of(op: str) -> list[str]:
    """The backends that can run an op here."""
    return sorted({"reference", *dispatch.KERNELS[op]} & {*dispatch.available()})
