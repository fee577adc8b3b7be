"""VAR: its networks, its tokenizer, its files."""

from ddfast.models.var.network import VARFlowNetwork, VARSizes, VARStudent, VARTeacher
from ddfast.models.var.tokenizer import VARTokenizer

__all__ = ["VARFlowNetwork", "VARSizes", "VARStudent", "VARTeacher", "VARTokenizer"]
