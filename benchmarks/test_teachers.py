"""VAR and LlamaGen with random weights: the teacher-forced pass, and loading a checkpoint.

`--peer-path var=CHECKOUT --peer-path llamagen=CHECKOUT` adds the official code: same run, same weights.
"""

import pytest
import torch
from compare import side_by_side
from peers import PEERS

import ddfast
from ddfast.models.attention import MaskedAttention, block_mask
from ddfast.models.converting import export_teacher
from ddfast.models.llamagen.network import LLAMAGEN_SIZES, LlamaGenTeacher
from ddfast.models.llamagen.tokenizer import LlamaGenTokenizer
from ddfast.models.loading import untrained_teacher
from ddfast.models.var.network import VARTeacher
from ddfast.recipes import get_recipe


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("recipe", ["var-d16", "llamagen-b"])
def test_teacher_forcing(benchmark, monkeypatch, peer_paths, recipe: str, batch: int):
    teacher = untrained_teacher(get_recipe(recipe))
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(teacher.num_classes, (batch,), generator=generator)
    codes = torch.randint(teacher.num_codes, (batch, teacher.num_tokens), generator=generator)

    def masked() -> torch.Tensor:
        with monkeypatch.context() as patch:
            mask = block_mask(teacher.groups)
            patch.setattr("ddfast.models.var.BlockCausalAttention", lambda groups: MaskedAttention(mask))
            return teacher.logits(labels, codes)

    providers = {"ddfast": lambda: teacher.logits(labels, codes)}
    if isinstance(teacher, VARTeacher):
        providers["ddfast, one masked call"] = masked
    family = recipe.split("-")[0]
    if family in peer_paths:
        official = PEERS[family](peer_paths[family], teacher)  # type: ignore[operator]
        providers["official code"] = lambda: official.logits(labels, codes)
    with torch.inference_mode():
        expected = providers["ddfast"]()
        for name, provider in providers.items():
            error = float((provider() - expected).abs().max())
            assert error < 1e-3, f"{name}: {error}"
        side_by_side(benchmark, providers, rounds=5)


def test_loading_llamagen_l(benchmark, tmp_path):
    """343 M parameters and their tokenizer, from the page cache, every weight read once."""
    weights, tokenizer = tmp_path / "c2i_L_256.pt", tmp_path / "vq_ds16_c2i.pt"
    export_teacher(untrained_teacher(get_recipe("llamagen-l")), weights, tokenizer)

    def touched(teacher: torch.nn.Module) -> float:
        return sum(float(parameter.detach().sum()) for parameter in teacher.parameters())

    def as_scripts_do() -> float:
        teacher = LlamaGenTeacher(LlamaGenTokenizer(), LLAMAGEN_SIZES["L"])
        whole = torch.load(weights, map_location="cpu", weights_only=True)["model"]
        vq = torch.load(tokenizer, map_location="cpu", weights_only=True)["model"]
        teacher.load_state_dict({**whole, **{f"tokenizer.{name}": value for name, value in vq.items()}})
        return touched(teacher)

    def ours() -> float:
        return touched(ddfast.load_teacher(weights, tokenizer))

    assert ours() == as_scripts_do()
    side_by_side(benchmark, {"ddfast": ours, "build, torch.load, load_state_dict": as_scripts_do}, rounds=3)
