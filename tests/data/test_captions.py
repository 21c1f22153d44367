"""What can be a caption, and the trigger as a whole word or in place of `[trigger]`."""

import pytest

from dopsd.data.captions import as_caption, with_trigger, without_trigger


@pytest.mark.parametrize(
    ("caption", "trigger", "result"),
    [
        ("a zib on grass", "zib", "a zib on grass"),
        ("zib", "zib", "zib"),
        ("the zib's bowl", "zib", "the zib's bowl"),
        ("a zibra on grass", "zib", "zib, a zibra on grass"),
        ("a bazib", "zib", "zib, a bazib"),
        ("zibé", "zib", "zib, zibé"),
        ("zib2", "zib", "zib, zib2"),
        ("on grass", "zib", "zib, on grass"),
        ("a Zib on grass", "zib", "zib, a Zib on grass"),
        ("[trigger] on grass", "zib", "zib on grass"),
        ("[Trigger], [trigger]", "zib", "zib, zib"),
        ("a [trigger]ra", "zib", "zib, a zibra"),
        ("a photo of [V]", "[V]", "a photo of [V]"),
        ("a (zib)", "zib", "a (zib)"),
        ("a.b", "a.b", "a.b"),
        ("a-b", "a.b", "a.b, a-b"),
        ("[trigger] on grass", r"\\1", r"\\1 on grass"),
        ("小明在海边", "小明", "小明在海边"),
        ("지브가 달린다", "지브", "지브가 달린다"),
        ("a zib and [ trigger ]", "zib", "a zib and [ trigger ]"),
    ],
)
def test_a_trigger_is_put_into_the_caption_unless_it_is_there_as_a_word(caption, trigger, result):
    assert with_trigger(caption, trigger) == result


@pytest.mark.parametrize(
    ("caption", "result"),
    [
        ("zib, a small dog", "a small dog"),
        ("a zib on grass", "a on grass"),
        ("a zibra beside a zib", "a zibra beside a"),
        ("a dog, zib, on grass", "a dog, on grass"),
        ("zib", ""),
    ],
)
def test_a_trigger_is_taken_out_as_a_whole_word(caption, result):
    assert without_trigger(caption, "zib") == result


def test_without_a_trigger_captions_stay_and_a_placeholder_is_refused():
    assert with_trigger("on grass", None) == "on grass"
    with pytest.raises(ValueError, match=r"'a \[trigger\]' contains .* set data\.trigger"):
        with_trigger("a [trigger]", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (7, "the caption is 7, which is not text"),
        (" \n", "the caption is empty"),
        ("\ud800", "not valid Unicode"),
    ],
)
def test_what_is_no_caption_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        as_caption(text, "the caption")
    assert as_caption(" a cat\n", "the caption") == "a cat"
