import sys
import types

import pytest
import torch

from ddfast.errors import DDFastError
from ddfast.models.captions import encode_captions, left_padded, load_captions, random_captions, save_captions
from ddfast.models.checkpoint import save_tensors


def test_valid_tokens_move_to_the_end_in_their_order():
    features = torch.arange(1.0, 13).view(3, 4, 1)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    moved, kept = left_padded(features, mask)
    assert moved[..., 0].tolist() == [[0, 0, 1, 2], [5, 6, 7, 8], [0, 0, 0, 0]]
    assert kept.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]
    again = left_padded(moved, kept)
    assert torch.equal(again[0], moved)


def test_without_transformers_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DDFastError, match=r"needs transformers; pip install 'ddfast\[text\]'"):
        encode_captions(["a cat"])


class FakeTokenizer:
    """One token per word, padded on the right as T5's."""

    def __call__(self, texts, *, max_length, **settings):
        assert settings == {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        rows = [[len(word) for word in text.split()][:max_length] for text in texts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class FakeEncoder(torch.nn.Module):
    def forward(self, input_ids, attention_mask):
        hidden = torch.stack((input_ids.float(), attention_mask.float() + 1), dim=-1)
        return types.SimpleNamespace(last_hidden_state=hidden)


def test_captions_are_encoded_and_padded_on_the_left(monkeypatch):
    fake = types.ModuleType("transformers")
    fake.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda model: FakeTokenizer())
    fake.T5EncoderModel = types.SimpleNamespace(from_pretrained=lambda model, torch_dtype: FakeEncoder())
    monkeypatch.setitem(sys.modules, "transformers", fake)
    features, mask = encode_captions(["a small cat", "dog", "one two three four five six"], length=4, batch_size=2)
    assert features.shape == (3, 4, 2)
    assert mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert features[..., 0].tolist() == [[0, 1, 5, 3], [0, 0, 0, 3], [3, 3, 5, 4]]
    with pytest.raises(DDFastError, match="captions: got none"):
        encode_captions([])


def test_a_real_t5_encoder(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    encoder = transformers.T5EncoderModel(config).eval()
    encoder.save_pretrained(tmp_path)
    loaded = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
    ids = torch.tensor([[3, 4, 0, 0]])
    mask = (ids > 0).long()
    hidden = loaded(input_ids=ids, attention_mask=mask).last_hidden_state
    moved, kept = left_padded(hidden, mask)
    assert torch.equal(moved[0, 2:], hidden[0, :2])
    assert kept.tolist() == [[0, 0, 1, 1]]


def test_files(tmp_path):
    features, mask = random_captions(5, 8, 6)
    save_captions(tmp_path / "captions.safetensors", features, mask, ["a"] * 5)
    loaded = load_captions(tmp_path / "captions.safetensors")
    assert torch.equal(loaded[0], features)
    assert torch.equal(loaded[1], mask)
    save_tensors(tmp_path / "bad.safetensors", {"features": features, "mask": mask[:4]}, {})
    with pytest.raises(DDFastError, match=r"bad\.safetensors: got features \[5, 8, 6\] .* mask \[4, 8\], expected"):
        load_captions(tmp_path / "bad.safetensors")
    save_tensors(tmp_path / "bad.safetensors", {"emb": features}, {})
    with pytest.raises(DDFastError, match="got emb, expected features and mask"):
        load_captions(tmp_path / "bad.safetensors")


def test_stand_ins_are_padded_on_the_left():
    features, mask = random_captions(20, 12, 3)
    assert torch.equal(left_padded(features, mask)[0], features)
    lengths = mask.sum(1)
    assert 3 <= lengths.min() < lengths.max() <= 12
    assert torch.equal(random_captions(20, 12, 3)[0], features)
