"""nearest_code at the papers' codebooks, 16,384 vectors. Floor: 2 rows V d FLOP; bytes are negligible."""

import importlib.util

import pytest
import torch
from compare import side_by_side

from ddfast.ops import nearest_code

ROWS = 16384


def peers(x: torch.Tensor, codebook: torch.Tensor) -> dict:
    """Nearest-code searches of installed libraries (`pip install ".[peers]"`)."""
    found = {}
    if importlib.util.find_spec("faiss"):
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        index = faiss.IndexFlatL2(codebook.shape[1])
        index.add(codebook.numpy())
        found["faiss-cpu"] = lambda: torch.from_numpy(index.search(x.numpy(), 1)[1][:, 0])
    if importlib.util.find_spec("vector_quantize_pytorch"):
        from vector_quantize_pytorch import VectorQuantize

        quantizer = VectorQuantize(dim=codebook.shape[1], codebook_size=len(codebook)).eval()
        quantizer._codebook.embed.data.copy_(codebook[None])
        quantizer._codebook.initted.data.fill_(True)
        found["vector-quantize-pytorch"] = lambda: quantizer(x[None])[1][0]
    return found


@pytest.mark.parametrize(("num_codes", "dim"), [(16384, 8), (4096, 32)])
@torch.inference_mode()
def test_nearest_code(benchmark, num_codes, dim):
    x, codebook = torch.randn(ROWS, dim), torch.randn(num_codes, dim)

    def cdist():
        return torch.cdist(x, codebook).argmin(-1)

    compiled = torch.compile(lambda x, codebook: torch.cdist(x, codebook).argmin(-1))
    providers = {
        "ddfast": lambda: nearest_code(x, codebook),
        "torch.cdist().argmin()": cdist,
        "torch.compile": lambda: compiled(x, codebook),
        **peers(x, codebook),
    }
    ours = nearest_code(x, codebook)
    best = (x - codebook[ours]).square().sum(-1)
    for name, call in providers.items():
        other = (x - codebook[call()]).square().sum(-1)
        assert torch.allclose(best, other, rtol=1e-3, atol=1e-3), name
    side_by_side(benchmark, providers, rounds=5, gflop=2e-9 * ROWS * num_codes * dim)
