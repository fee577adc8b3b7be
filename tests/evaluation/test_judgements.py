"""Which figures share a table, and what their files hold."""

import json

import pytest

from ddfast.errors import DDFastError
from ddfast.evaluation.judgements import Judgement, read_judgement, table


def judged(source, **given):
    said = {"file": "x", "sha256": "1" * 64}
    return Judgement(
        instrument="clean",
        source=source,
        count=300,
        size=[8, 8],
        figures={"fid": 1.0, "precision": 0.5, "clip_score": 30.0},
        inception=said,
        reference=said,
        **given,
    )


def test_scores_of_two_models_or_captions_share_no_table():
    """Whichever rows have one: the first need not."""
    model = {"file": "b32", "sha256": "2" * 64, "captions": "3" * 64}
    assert len(table([judged("a"), judged("b", clip=model), judged("c", clip=model)])) > 5
    for other, what in (({"sha256": "4" * 64}, "model"), ({"captions": "5" * 64}, "captions")):
        with pytest.raises(DDFastError, match=f"c was measured with the CLIP {what} of SHA-256 [45]{{12}}, b with"):
            table([judged("a"), judged("b", clip=model), judged("c", clip=model | other)])


def test_what_a_preset_was_changed_to_is_told():
    row = judged("a", preset="var-readme", settings={"changed": ["quantise nearest", "cfg_scale 4.0"]})
    assert "| var-readme, but quantise nearest, cfg_scale 4.0 |" in "\n".join(table([row]))
    assert "| var-readme |" in "\n".join(table([judged("a", preset="var-readme")]))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("figures", {"fid": "1"}, "fid: got '1', expected float"),
        ("figures", [1], "figures: got a list of 1"),
        ("size", [8], "size: got a list of 1"),
        ("count", 1.5, "count: got 1.5, expected int"),
        ("count", 0, "count: got 0, expected a positive number"),
        ("inception", {"file": "x"}, "inception: sha256 is missing"),
        ("reference", None, "reference: got nothing"),
        ("clip", {"file": "x", "sha256": "y"}, "clip: captions is missing"),
        ("settings", {"changed": [1]}, "changed: got 1, expected str"),
    ],
)
def test_a_file_of_others_says_what_it_has_to(tmp_path, name, value, words):
    path = tmp_path / "a.json"
    path.write_text(judged("a").text())
    assert read_judgement(path).figures == judged("a").figures
    path.write_text(json.dumps({**json.loads(path.read_text()), name: value}))
    with pytest.raises(DDFastError, match=rf"--beside .*a\.json: is damaged \({words}"):
        read_judgement(path)
