"""Rows of metadata.jsonl and metadata.csv: columns, pairs, and a sentence for each bad row."""

import pytest
from image_folders import refusals, write_image, write_metadata

from dopsd.data.folder import read_folder
from dopsd.data.sources import Source, read_sources


@pytest.mark.parametrize("file", ["file_name", "image", "image_path"])
@pytest.mark.parametrize("text", ["text", "prompt", "caption"])
def test_metadata_columns_have_the_usual_names(tmp_path, file, text):
    write_image(tmp_path / "a.png")
    write_metadata(tmp_path, {file: "a.png", text: "a cat", "other": 1})
    assert read_folder(tmp_path).examples[0].caption == "a cat"


def test_a_row_may_have_a_text_for_the_teacher_which_gets_the_trigger_too(tmp_path):
    for name in ("a.png", "b.png"):
        write_image(tmp_path / name)
    write_metadata(
        tmp_path,
        {"file_name": "a.png", "text": "a cat", "teacher_text": "a grey cat on a sofa, sharp"},
        {"file_name": "b.png", "text": "a dog"},
    )
    cat, dog = read_sources([Source(tmp_path, trigger="zib")]).examples
    assert cat.teacher_text == "zib, a grey cat on a sofa, sharp" and dog.teacher_text is None
    assert cat.read_by_teacher("zib, a cat") == cat.teacher_text
    assert cat.read_by_teacher("") == "", "under caption dropout both read nothing"
    assert dog.read_by_teacher("zib, a dog") == "zib, a dog"
    before = read_folder(tmp_path).fingerprint()
    write_metadata(
        tmp_path,
        {"file_name": "a.png", "text": "a cat", "teacher_text": "a white cat"},
        {"file_name": "b.png", "text": "a dog"},
    )
    assert read_folder(tmp_path).fingerprint() != before


def test_csv_metadata_is_read_and_a_caption_cut_by_a_comma_is_refused(tmp_path):
    for name in ("a.png", "b.png", "c.png"):
        write_image(tmp_path / name)
    rows = 'file_name,text\na.png,"a cat, sitting"\nb.png,a dog, running\nc.png\n'
    (tmp_path / "metadata.csv").write_text(rows, encoding="utf-8-sig")
    assert read_folder(tmp_path, skip_bad=True).source == "metadata.csv"
    assert [e.caption for e in read_folder(tmp_path, skip_bad=True).examples] == ["a cat, sitting"]
    message = refusals(tmp_path)
    assert (
        "line 3 has more fields than the header" in message
        and "caption of metadata.csv line 4 is None" in message
    )


def test_csv_that_is_not_utf8_or_not_csv_is_one_clear_error(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,une forêt\n".encode("latin-1"))
    with pytest.raises(ValueError, match="not UTF-8"):
        read_folder(tmp_path, skip_bad=True)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png," + "x" * 200_000)
    with pytest.raises(ValueError, match="not readable CSV"):
        read_folder(tmp_path, skip_bad=True)


def test_two_metadata_files_are_refused(tmp_path):
    write_image(tmp_path / "a.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "a"})
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a\n")
    with pytest.raises(ValueError, match=r"both metadata\.jsonl and metadata\.csv"):
        read_folder(tmp_path)


def test_every_bad_metadata_line_is_named_with_its_number(tmp_path):
    write_image(tmp_path / "good.png")
    (tmp_path.parent / "outside.png").write_bytes((tmp_path / "good.png").read_bytes())
    write_metadata(
        tmp_path,
        {"file_name": "good.png", "text": "good"},
        '{"file_name": "good.png", "text": ',
        "[1, 2]",
        {"file_name": "gone.png", "text": "missing"},
        {"file_name": "../outside.png", "text": "escapes"},
        {"file_name": "x/../../outside.png", "text": "escapes"},
        {"file_name": str(tmp_path.parent / "good.png"), "text": "absolute, elsewhere"},
        {"file_name": "C:\\good.png", "text": "absolute"},
        {"file_name": 7, "text": "wrong type"},
        {"file_name": "good.png", "text": {"wrong": "type"}},
        {"file_name": "good.png", "text": "  "},
        {"file_name": "good.png"},
        {"file_name": "good.png", "text": "\ud800"},
    )
    message = refusals(tmp_path)
    expected = {
        2: "is not JSON",
        3: "is not a JSON object",
        4: "no such file",
        5: "outside the folder",
        6: "outside the folder",
        7: "outside the folder",
        8: "outside the folder",
        9: "is not a file name",
        10: "is not text",
        11: "is empty",
        12: "has none of text, prompt, caption",
        13: "not valid Unicode",
    }
    lines = message.splitlines()
    assert len(lines) == len(expected)
    for number, words in expected.items():
        assert any(f"metadata.jsonl line {number} " in line and words in line for line in lines), (
            number,
            message,
        )
    assert len(read_folder(tmp_path, skip_bad=True).examples) == 1


def test_a_metadata_line_that_is_not_utf8_is_named(tmp_path):
    write_image(tmp_path / "a.png")
    good = b'{"file_name": "a.png", "text": "a"}\n'
    (tmp_path / "metadata.jsonl").write_bytes(good + b'{"file_name": "a.png", "text": "\xff"}\n')
    assert "line 2 is not UTF-8" in refusals(tmp_path)


def test_an_image_that_the_metadata_does_not_name_is_refused(tmp_path):
    write_image(tmp_path / "a.png")
    write_image(tmp_path / "b.png")
    write_metadata(tmp_path, {"file_name": "a.png", "text": "a"})
    assert "b.png has no caption: no row of metadata.jsonl" in refusals(tmp_path)


def test_pairs_bring_one_or_several_rejected_images(tmp_path):
    for name in "abcd":
        write_image(tmp_path / f"{name}.png")
    write_metadata(
        tmp_path,
        {"chosen": "a.png", "rejected": "b.png", "prompt": "a cat"},
        {"file_name": "c.png", "rejected": ["d.png", "b.png"], "text": "a dog"},
    )
    pairs = {e.path.name: [p.name for p in e.rejected] for e in read_folder(tmp_path).examples}
    assert pairs == {"a.png": ["b.png"], "c.png": ["d.png", "b.png"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": "a.png", "text": "x"}, "is half a pair: it names no image in rejected"),
        ({"file_name": "a.png", "rejected": "", "text": "x"}, "is half a pair"),
        (
            {"chosen": "a.png", "rejected": "gone.png", "text": "x"},
            "names gone.png, and there is no such file",
        ),
        ({"chosen": "a.png", "rejected": 7, "text": "x"}, "names its image with 7"),
        (
            {"rejected": "a.png", "text": "x"},
            "has none of file_name, image, image_path, target, chosen",
        ),
        ({"chosen": "a.png", "rejected": "../a.png", "text": "x"}, "outside the folder"),
        (
            {"chosen": "a.png", "rejected": ["a.png"], "text": "x"},
            "names a.png as chosen and as rejected",
        ),
    ],
)
def test_a_pair_missing_a_side_is_named(row, message, tmp_path):
    write_image(tmp_path / "a.png")
    write_metadata(tmp_path, row)
    with pytest.raises(ValueError, match=message) as refused:
        read_folder(tmp_path)
    assert "no row of metadata.jsonl names it" not in str(refused.value)


def test_a_rejected_image_that_cannot_be_decoded_refuses_the_pair(tmp_path):
    write_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not an image")
    write_metadata(tmp_path, {"chosen": "a.png", "rejected": "b.png", "text": "x"})
    with pytest.raises(ValueError, match=r"b\.png is not a .* image"):
        read_folder(tmp_path)
