import sys
import types

import pytest
import torch
from official import llamagen_teacher_like
from safetensors.torch import save_file

from ddfast.errors import DDFastError
from ddfast.models.checkpoint import load_tensors
from ddfast.models.llamagen.captions import (
    CaptionEncoder,
    EncodedOnDemand,
    captions_for,
    encode_captions,
    give_captions,
    left_padded,
    load_captions,
    random_captions,
    save_captions,
)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_valid_tokens_move_to_the_end_in_order(dtype):
    lengths = [0, 1, 3, 7, 64]
    features = torch.randn(len(lengths), 64, 3)
    mask = (torch.arange(64) < torch.tensor(lengths)[:, None]).to(dtype)
    features[mask == 0] = float("nan")
    moved, moved_mask = left_padded(features, mask)
    assert moved_mask.dtype == dtype
    for row, count in enumerate(lengths):
        start = 64 - count
        assert moved_mask[row].tolist() == [0] * start + [1] * count
        assert torch.equal(moved[row, start:], features[row, :count])
        assert not moved[row, :start].any()
    again, again_mask = left_padded(moved, moved_mask)
    assert torch.equal(again, moved)
    assert torch.equal(again_mask, moved_mask)


def test_tokens_with_holes_between_them_close_up():
    features = torch.arange(1.0, 6)[None, :, None]
    moved, mask = left_padded(features, torch.tensor([[1, 0, 1, 0, 1]]))
    assert moved.flatten().tolist() == [0, 0, 1, 3, 5]
    assert mask.tolist() == [[0, 0, 1, 1, 1]]


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"mask: got \[2, 5\], expected \[2, 4\]"):
        left_padded(torch.zeros(2, 4, 3), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"features: got \[2, 4\]"):
        left_padded(torch.zeros(2, 4), torch.ones(2, 4))


def test_random_captions_are_reproducible_padded_and_varied():
    features, mask = random_captions(200, 40, 64, seed=1)
    assert features.shape == (200, 40, 64)
    assert (features.dtype, mask.dtype) == (torch.float32, torch.int64)
    assert all(map(torch.equal, (features, mask), random_captions(200, 40, 64, seed=1)))
    assert not torch.equal(features, random_captions(200, 40, 64, seed=2)[0])
    assert all(map(torch.equal, (features, mask), left_padded(features, mask)))
    lengths = mask.sum(1)
    assert 10 <= lengths.min() < 15
    assert 35 < lengths.max() <= 40
    assert abs(features[mask == 1].norm(dim=-1).mean() - 1) < 0.05
    assert random_captions(3, 1, 2)[1].tolist() == [[1]] * 3


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_saved_captions_come_back_with_their_texts(tmp_path, dtype):
    features, mask = random_captions(2, 6, 4)
    path = tmp_path / "captions.safetensors"
    save_captions(path, features, mask.to(dtype), ["a cat", "ein Hündchen"])
    loaded, loaded_mask = load_captions(path)
    assert torch.equal(loaded, features)
    assert loaded_mask.dtype == dtype
    assert torch.equal(loaded_mask, mask.to(dtype))
    assert load_tensors(path)[1] == {"captions": ["a cat", "ein Hündchen"]}
    save_captions(path, features, mask)
    assert load_tensors(path)[1] == {}


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    features, mask = random_captions(2, 6, 4)
    path = tmp_path / "captions.safetensors"
    with pytest.raises(ValueError, match="captions: got 1 texts, expected 2"):
        save_captions(path, features, mask, ["a cat"])
    with pytest.raises(ValueError, match=r"features: got torch\.float64"):
        save_captions(path, features.double(), mask)
    assert not path.exists()


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"features": torch.zeros(2, 3, 4)}, "got features, expected features, mask"),
        ({"a": torch.zeros(1), "mask": torch.ones(2, 3).long()}, "got a, mask, expected features, mask"),
        ({"features": torch.zeros(2, 3, 4).half(), "mask": torch.ones(2, 3).long()}, "features: got torch.float16"),
        ({"features": torch.zeros(2, 3, 4), "mask": torch.ones(2, 3)}, "mask: got torch.float32"),
        ({"features": torch.zeros(2, 3), "mask": torch.ones(2, 3).long()}, "features: got [2, 3]"),
        ({"features": torch.zeros(2, 3, 4), "mask": torch.ones(2, 3, 1).long()}, "mask: got [2, 3, 1]"),
        ({"features": torch.zeros(2, 3, 4), "mask": torch.ones(2, 4).long()}, "mask: got [2, 4], expected [2, 3]"),
    ],
)
def test_files_that_hold_something_else_are_refused(tmp_path, tensors, problem):
    path = tmp_path / "captions.safetensors"
    save_file(tensors, path)
    with pytest.raises(DDFastError) as caught:
        load_captions(path)
    message = str(caught.value)
    assert str(path) in message
    assert problem in message
    assert "\n" not in message


def test_missing_and_foreign_files_are_refused(tmp_path):
    with pytest.raises(DDFastError, match="no checkpoint at"):
        load_captions(tmp_path / "captions.safetensors")
    path = tmp_path / "captions.npy"
    path.write_bytes(b"\x93NUMPY" + bytes(100))
    with pytest.raises(DDFastError, match="is a NumPy array, not a checkpoint"):
        load_captions(path)


def test_without_transformers_encoding_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DDFastError) as caught:
        encode_captions(["a cat"])
    assert str(caught.value) == (
        "captions: the T5 encoder needs transformers; pip install 'ddfast[text]', or give precomputed features"
    )


def test_bad_arguments_are_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="captions: got none"):
        encode_captions([])
    with pytest.raises(ValueError, match="batch_size: got 0"):
        encode_captions(["a cat"], batch_size=0)


class LetterTokenizer:
    """A token per letter and an end token (1), padded on the right like T5's."""

    def __call__(self, texts, *, padding, max_length, truncation, add_special_tokens, **others):
        assert (padding, truncation, add_special_tokens) == ("max_length", True, True)
        assert others == {"return_attention_mask": True, "return_tensors": "pt"}
        ids = torch.zeros(len(texts), max_length, dtype=torch.int64)
        for row, text in zip(ids, texts, strict=True):
            letters = [*[2 + ord(letter) % 30 for letter in text][: max_length - 1], 1]
            row[: len(letters)] = torch.tensor(letters)
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}


@pytest.fixture
def tiny_t5(monkeypatch):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    encoder = transformers.T5EncoderModel(config)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: LetterTokenizer())
    monkeypatch.setattr(transformers.T5EncoderModel, "from_pretrained", lambda name: encoder)
    return encoder


def test_encoding_gives_left_padded_features_whatever_the_batch(tiny_t5):
    texts = ["a cat", "", "two dogs on a lawn", "x"]
    features, mask = encode_captions(texts, length=12, batch_size=3)
    assert features.shape == (4, 12, 16)
    assert (features.dtype, mask.dtype) == (torch.float32, torch.int64)
    assert not features.requires_grad
    assert mask.sum(1).tolist() == [6, 1, 12, 2]
    assert all(map(torch.equal, (features, mask), left_padded(features, mask)))
    # T5's positions are relative and padding is masked: a caption alone, without padding, has the same features.
    alone = tiny_t5(
        input_ids=LetterTokenizer()(
            texts[:1],
            padding="max_length",
            max_length=6,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )["input_ids"]
    ).last_hidden_state
    torch.testing.assert_close(features[0, 6:], alone[0])
    singly, _ = encode_captions(texts, length=12, batch_size=1)
    torch.testing.assert_close(singly, features)


def test_a_half_precision_encoder_still_gives_float32(tiny_t5):
    features, _ = encode_captions(["a cat"], length=12, dtype=torch.bfloat16)
    assert features.dtype == torch.float32
    assert torch.equal(features, features.bfloat16().float())


def test_a_model_that_cannot_be_loaded_is_one_line(tiny_t5, monkeypatch):
    def refuse(name):
        raise OSError(f"{name} is not a local folder\nand more lines")

    monkeypatch.setattr(sys.modules["transformers"].T5EncoderModel, "from_pretrained", refuse)
    with pytest.raises(DDFastError) as caught:
        encode_captions(["a cat"], model="no/such")
    assert str(caught.value) == "captions: cannot load the T5 encoder no/such: no/such is not a local folder"


class WordTokenizer:
    """One token per word, its length as id, padded on the right as T5's."""

    def __call__(self, texts, *, max_length, **settings):
        assert settings["padding"] == "max_length"
        assert settings["truncation"]
        rows = [[len(word) for word in text.split()][:max_length] for text in texts]
        ids = torch.tensor([row + [0] * (max_length - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class IdEncoder(torch.nn.Module):
    def forward(self, input_ids, attention_mask):
        hidden = torch.stack((input_ids.float(), attention_mask.float() + 1), dim=-1)
        return types.SimpleNamespace(last_hidden_state=hidden)


@pytest.fixture
def stand_in(monkeypatch):
    library = types.ModuleType("transformers")
    library.AutoTokenizer = types.SimpleNamespace(from_pretrained=lambda model: WordTokenizer())
    library.T5EncoderModel = types.SimpleNamespace(from_pretrained=lambda model: IdEncoder())
    monkeypatch.setitem(sys.modules, "transformers", library)


def test_encoding_without_the_library_itself(stand_in):
    features, mask = encode_captions(["a small cat", "dog", "one two three four five six"], length=4, batch_size=2)
    assert mask.tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]
    assert features[..., 0].tolist() == [[0, 1, 5, 3], [0, 0, 0, 3], [3, 3, 5, 4]]


def test_on_demand_each_caption_of_a_batch_is_encoded_once(stand_in):
    texts = ["a", "two dogs", "three small cats"]
    asked = []
    encoder = CaptionEncoder(length=4)
    many = EncodedOnDemand(texts, lambda asked_for: asked.append(asked_for) or encoder(asked_for))
    features, mask = many.encoded(torch.tensor([2, 0, 2]))
    assert (len(many), asked) == (3, [["a", "three small cats"]])
    expected = encode_captions(texts, length=4)
    assert all(torch.equal(made, whole[[2, 0, 2]]) for made, whole in zip((features, mask), expected, strict=True))
    assert [len(part) for part in many.encoded(torch.empty(0, dtype=torch.int64))] == [0, 0]


def test_many_texts_are_not_encoded_before_a_batch_asks_for_them(stand_in, monkeypatch, tmp_path):
    monkeypatch.setattr("ddfast.models.llamagen.captions._HELD", 3)
    teacher = llamagen_teacher_like(model_type="t2i", cls_token_num=4, caption_dim=2)
    path = tmp_path / "captions.txt"
    path.write_text("a\nsmall cat\ntwo big dogs\n")
    give_captions(teacher, path)
    assert isinstance(teacher.captions, tuple)
    path.write_text("a\nsmall cat\ntwo big dogs\nx\n")
    give_captions(teacher, path)
    assert isinstance(teacher.captions, EncodedOnDemand)
    assert teacher.num_conditions == 4
    index = torch.tensor([3, 1, 1])
    expected = captions_for(teacher, path)
    made = teacher.condition_of(index)
    assert all(torch.equal(part, whole[index]) for part, whole in zip(made, expected, strict=True))
    narrow = llamagen_teacher_like(model_type="t2i", cls_token_num=4, caption_dim=3)
    with pytest.raises(DDFastError, match=r"captions\.txt: got \[1, 4, 2\] and \[1, 4\], expected features"):
        give_captions(narrow, path)
