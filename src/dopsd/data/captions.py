"""Captions: what can be one, and the trigger word in them."""

import re

from dopsd.files import shorten

PLACEHOLDER = re.compile(re.escape("[trigger]"), re.IGNORECASE)
# A letter next to the trigger makes it part of another word ("zib" in "zibra"). Scripts that put no
# spaces between words (Chinese, Japanese, Korean) are the exception.
LETTER = r"[^\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"


def as_caption(text: object, what: str) -> str:
    """The text without surrounding white space. what: names it in messages. Raises ValueError for
    what cannot be a caption."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is {shorten(text)}, which is not text.")
    try:
        text.encode()  # JSON can hold half a surrogate pair, which no tokenizer and no file takes
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not valid Unicode ({error}).") from error
    if not text.strip():
        raise ValueError(f"{what} is empty.")
    return text.strip()


def with_trigger(caption: str, trigger: str | None) -> str:
    """The caption with `trigger` in place of every `[trigger]`, or before it where the caption does
    not contain the trigger as a whole word. Raises ValueError for a `[trigger]` without a trigger.
    """
    if trigger is None:
        if PLACEHOLDER.search(caption):
            raise ValueError(
                f"the caption {shorten(caption, 80)!r} contains [trigger], and its folder has no "
                "`trigger`: set data.trigger (or `trigger` of the entry in data.more)."
            )
        return caption
    caption = PLACEHOLDER.sub(lambda _: trigger, caption)
    return caption if _whole_word(trigger).search(caption) else f"{trigger}, {caption}"


def without_trigger(caption: str, trigger: str) -> str:
    """The caption without the trigger as a whole word, and without a comma that stood after it;
    empty where nothing else was in it."""
    rest = re.sub(f"{_whole_word(trigger).pattern}(\\s*,)?", "", caption)
    return " ".join(rest.split()).strip(" ,")


def _whole_word(trigger: str) -> re.Pattern[str]:
    return re.compile(f"(?<!{LETTER}){re.escape(trigger)}(?!{LETTER})")
