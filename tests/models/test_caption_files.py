import json
import re

import pytest

from ddfast.errors import DDFastError
from ddfast.models.caption_files import holds_features, read_texts
from ddfast.models.llamagen.captions import random_captions, save_captions


def annotations(*captions, images=(7, 3, 5)):
    made = [{"image_id": image, "id": number, "caption": text} for number, (image, text) in enumerate(captions)]
    return {"info": {"year": 2014}, "images": [{"id": image, "file_name": f"{image}.jpg"} for image in images],
            "licenses": [], "annotations": made}  # fmt: skip


COCO = annotations((3, "A dog. "), (7, " A cat\n on a  mat"), (3, "Another dog"), (5, "  "), (5, "Ein Hündchen"))


@pytest.mark.parametrize("separators", [None, (",", ":")])
def test_of_coco_every_image_has_its_first_caption_in_the_order_of_the_images(tmp_path, separators):
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(COCO, separators=separators))
    assert read_texts(path) == ["A cat on a mat", "A dog.", "Ein Hündchen"]


def test_what_a_file_holds_decides_not_its_name(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(COCO, separators=(",", ":"), ensure_ascii=False).encode())
    assert len(read_texts(path)) == 3
    # Its ninth byte is the brace with which the header of safetensors begins.
    path.write_text('{"info":{},"images":[{"id":1}],"annotations":[{"image_id":1,"caption":"a cat"}]}')
    assert path.read_bytes()[8:9] == b"{"
    assert not holds_features(path)
    assert read_texts(path) == ["a cat"]


def test_lines_are_captions(tmp_path):
    path = tmp_path / "captions.txt"
    path.write_text("a cat\r\n\n  two dogs\n")
    assert read_texts(path) == ["a cat", "two dogs"]
    path.write_text("\n \n")
    with pytest.raises(DDFastError, match=r"captions\.txt holds no captions: expected features, text with a caption"):
        read_texts(path)


def test_the_texts_of_features_are_read_without_the_features(tmp_path, monkeypatch):
    path = tmp_path / "captions.safetensors"
    features, mask = random_captions(2, 6, 4)
    save_captions(path, features, mask)
    with pytest.raises(DDFastError, match="holds features without their texts: give save_captions the texts too"):
        read_texts(path)
    save_captions(path, features, mask, ["a cat", "two dogs"])
    monkeypatch.setattr("ddfast.models.checkpoint.StoredTensor.read", lambda tensor: pytest.fail("read"))
    assert read_texts(path) == ["a cat", "two dogs"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "got a list of 0, expected images and annotations"),
        ({"images": []}, "annotations: got nothing, expected a list"),
        ({"annotations": [], "images": {"id": 1}}, "images: got a dict of 1, expected a list"),
        (annotations(), "there is no caption of any image"),
        (annotations((7, " \n")), "there is no caption of any image"),
        (annotations((7, "a cat"), (3, 7)), "annotations[1].caption: got 7, expected a text"),
        (annotations((7, None)), "annotations[0].caption: got nothing, expected a text"),
        (annotations((7, ["a"] * 1000)), "annotations[0].caption: got a list of 1000, expected a text"),
        (annotations((7, "a" * 10_001)), "annotations[0].caption: got 10001 letters, expected at most 10000"),
        (annotations((7, "\ud83d")), "annotations[0].caption: got a lone surrogate, expected Unicode text"),
        (annotations(("7", "a cat")), "annotations[0].image_id: got '7', expected an integer"),
        (annotations((True, "a cat"), images=(1,)), "annotations[0].image_id: got True, expected an integer"),
        (annotations((8, "a cat")), "annotations[0].image_id: got 8, which is no image of the file"),
        (
            annotations((10**2000, "a cat")),
            "annotations[0].image_id: got a whole number of 6644 bits, which is no",
        ),
        (annotations((7, "a cat"), images=(7, 1.5)), "images[1].id: got 1.5, expected an integer"),
        ({"images": [7], "annotations": []}, "images[0].id: got nothing, expected an integer"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, content, problem):
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DDFastError) as caught:
        read_texts(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is no file of captions in COCO's format: {problem}")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 200


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (json.dumps(COCO)[:-40], "Expecting|Unterminated|delimiter"),
        ("", "Expecting value: line 1 column 1"),
        ("[" * 100_000, "nested too deeply"),
        ('{"images": [{"id": ' + "9" * 10_000 + "}]}", "4300"),
    ],
    ids=["cut short", "empty", "deep", "a number of 10,000 digits"],
)
def test_damaged_json_is_one_line(tmp_path, text, problem):
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(DDFastError, match=r"captions\.json is no file of captions in COCO's format") as caught:
        read_texts(path)
    assert re.search(problem, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "captions.json"
    with path.open("wb") as file:
        file.truncate(3 * 2**30)  # of holes
    with pytest.raises(DDFastError, match=r"has 3\.0 GB, expected captions: at most 1 GB of text"):
        read_texts(path)
    path.unlink()
    with pytest.raises(DDFastError, match=r"cannot read .*: No such file or directory"):
        read_texts(path)
