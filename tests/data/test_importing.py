"""Data sets of other tools become folders that read_folder reads, bytes and captions unchanged."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from dopsd.data.folder import read_folder
from dopsd.data.importing import fill_folder, import_data


def image(colour: str, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), colour).save(buffer, form)
    return buffer.getvalue()


@pytest.fixture()
def reference(tmp_path: Path) -> Path:
    """Two rows of the reference code: a JPEG named .png, and captions of several lengths."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image("red", "JPEG"))
    (tmp_path / "images" / "b.png").write_bytes(image("blue"))
    rows = [
        {
            "class_name": "corgi",
            "local_path_list": ["images/a.png"],
            "h*w": "832*1264",
            "short_en": "[V] outdoors",
            "medium_en": "[V] sitting outdoors",
            "short_zh": "x",
        },
        {
            "class_name": "corgi",
            "image_path": "images/b.png",
            "short_en": "[V] asleep",
            "medium_en": "",
        },
    ]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return tmp_path / "data.jsonl"


def test_the_reference_codes_rows_become_a_folder_with_all_english_captions(reference, tmp_path):
    assert import_data(str(reference), tmp_path / "out") == 2
    first, second = read_folder(tmp_path / "out").examples
    assert (first.path.name, first.caption, first.also) == (
        "000000.jpg",
        "[V] outdoors",
        ("[V] sitting outdoors",),
    )
    assert (second.caption, second.also) == ("[V] asleep", ())
    assert first.path.read_bytes() == image("red", "JPEG") and second.path.read_bytes() == image(
        "blue"
    )


def test_a_row_of_several_images_becomes_an_editing_row_with_the_last_as_its_target(tmp_path):
    for name, colour in (("one", "red"), ("two", "green"), ("three", "blue")):
        (tmp_path / f"{name}.png").write_bytes(image(colour))
    row = {
        "local_path_list": ["one.png", "two.png", "three.png"],
        "h*w": [],
        "short_en": "join them",
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(row))
    import_data(str(tmp_path / "data.jsonl"), tmp_path / "out")
    (example,) = read_folder(tmp_path / "out").examples
    assert example.path.read_bytes() == image("blue") and example.caption == "join them"
    assert [path.read_bytes() for path in example.references] == [image("red"), image("green")]


def test_one_caption_column_can_be_chosen(reference, tmp_path):
    with pytest.raises(ValueError, match="line 2 has no caption in medium_en"):
        import_data(str(reference), tmp_path / "out", caption_columns=["medium_en"])
    assert not (tmp_path / "out").exists()


def test_a_data_set_of_the_datasets_library_becomes_a_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"picture": [image("red"), image("blue", "WEBP")], "words": ["a red one", "a blue one"]}
    features = datasets.Features({"picture": datasets.Image(), "words": datasets.Value("string")})
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(
        tmp_path / "table" / "train.parquet"
    )
    assert import_data(str(tmp_path / "table"), tmp_path / "out", "picture", ["words"]) == 2
    examples = read_folder(tmp_path / "out").examples
    assert [(e.path.name, e.caption) for e in examples] == [
        ("000000.png", "a red one"),
        ("000001.webp", "a blue one"),
    ]
    assert [e.path.read_bytes() for e in examples] == rows["picture"]
    with pytest.raises(ValueError, match="has no column image; it has picture, words"):
        import_data(str(tmp_path / "table"), tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_recipes_data_set_fills_its_folder_once_and_another_one_is_refused(reference, tmp_path):
    out = tmp_path / "out"
    fill_folder(out, str(reference), caption_columns=["short_en"])
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    fill_folder(out, str(reference), caption_columns=["short_en"])
    assert stamps == {path: path.stat().st_mtime_ns for path in out.iterdir()} and len(stamps) == 4
    for folder, columns in ((out, ["medium_en"]), (tmp_path / "images", ["short_en"])):
        with pytest.raises(ValueError, match="was not filled from"):
            fill_folder(folder, str(reference), caption_columns=columns)


BAD = {
    "not JSON": ("{", "line 1 is not JSON"),
    "a list": ("[1]", "line 1 is not a JSON object"),
    "no image": ('{"short_en": "a"}', "names no image"),
    "reference gone": (
        '{"local_path_list": ["b.png", "a.png"], "short_en": "a"}',
        "names b.png, which is neither in",
    ),
    "gone": ('{"path": "gone.png", "short_en": "a"}', "neither in"),
    "no caption": ('{"path": "a.png", "class_name": "x"}', "has no caption"),
    "no rows": ("", "has no rows"),
    "no image inside": ('{"path": "text.png", "short_en": "a"}', "row 1 of .* is not a JPEG"),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_row_that_cannot_be_used_is_named_and_nothing_is_left(fault, tmp_path):
    text, message = BAD[fault]
    (tmp_path / "a.png").write_bytes(image("red"))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "data.jsonl").write_text(text)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=message):
        import_data(str(tmp_path / "data.jsonl"), tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_an_existing_folder_is_not_overwritten(reference, tmp_path):
    with pytest.raises(ValueError, match="is not overwritten"):
        import_data(str(reference), tmp_path)


def test_a_data_set_that_cannot_be_opened_is_one_sentence(tmp_path):
    pytest.importorskip("datasets")
    with pytest.raises(ValueError, match="cannot be opened as a data set"):
        import_data(str(tmp_path / "nothing"), tmp_path / "out")


def test_pairs_of_a_data_set_become_pairs_of_the_folder(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"win": [image("red")], "lose": [image("blue", "WEBP")], "prompt": ["a red one"]}
    features = datasets.Features(
        {"win": datasets.Image(), "lose": datasets.Image(), "prompt": datasets.Value("string")}
    )
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(
        tmp_path / "table" / "train.parquet"
    )
    import_data(
        str(tmp_path / "table"), tmp_path / "out", "win", ["prompt"], rejected_column="lose"
    )
    (example,) = read_folder(tmp_path / "out").examples
    assert example.path.read_bytes() == rows["win"][0]
    assert [path.read_bytes() for path in example.rejected] == rows["lose"]
    with pytest.raises(ValueError, match="has no column loser"):
        import_data(
            str(tmp_path / "table"), tmp_path / "again", "win", ["prompt"], rejected_column="loser"
        )


def test_a_phones_jpeg_with_a_second_image_inside_is_imported_as_jpeg(tmp_path):
    """Pillow calls that format MPO."""
    white, blue = (Image.new("RGB", (16, 12), colour) for colour in ("white", "blue"))
    white.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[blue])
    (tmp_path / "data.jsonl").write_text('{"path": "a.jpg", "short_en": "a"}')
    import_data(str(tmp_path / "data.jsonl"), tmp_path / "out")
    (example,) = read_folder(tmp_path / "out").examples
    assert example.path.name == "000000.jpg"
    assert example.path.read_bytes() == (tmp_path / "a.jpg").read_bytes()


def test_captions_may_be_lists(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [image("red")], "text": [["a red one", "", "a star"]]}
    features = datasets.Features(
        {"image": datasets.Image(), "text": datasets.Sequence(datasets.Value("string"))}
    )
    (tmp_path / "table").mkdir()
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "table/train.parquet")
    import_data(str(tmp_path / "table"), tmp_path / "out")
    (example,) = read_folder(tmp_path / "out").examples
    assert (example.caption, example.also) == ("a red one", ("a star",))


def test_rows_that_cannot_be_used_are_left_out_on_request(tmp_path, caplog):
    (tmp_path / "good.png").write_bytes(image("red"))
    (tmp_path / "bad.gif").write_bytes(image("red", "GIF"))
    rows = [
        '{"image_path": "bad.gif", "short_en": "a gif"}',
        '{"image_path": "good.png", "short_en": ["first", "second"]}',
        '{"image_path": "good.png", "short_en": " "}',
        '{"image_path": ',
        '{"image_path": ["good.png", "gone.png"], "short_en": "an edit"}',
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="row 1 of"):
        import_data(str(tmp_path / "d.jsonl"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert import_data(str(tmp_path / "d.jsonl"), tmp_path / "out", skip_bad=True) == 1
    names = ["000000.png", "metadata.jsonl", "origin.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert "4 of 5 rows were left out" in caplog.text
    assert "line 4 is not JSON" in caplog.text and "gone.png" in caplog.text
    (tmp_path / "d.jsonl").write_text("\n".join(rows[:1]))
    with pytest.raises(ValueError, match=r"has no rows that can be used \(first: row 1 of"):
        import_data(str(tmp_path / "d.jsonl"), tmp_path / "none", skip_bad=True)
