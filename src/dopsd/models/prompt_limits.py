"""Which prompts a text encoder does not take: over its limit, or with its own marks in them."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from dopsd.models.base import UnfitPrompts


def refuse_unfit(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    lengths: Sequence[int],
    limits: Sequence[int],
    image_tokens: Sequence[int] | None = None,
) -> None:
    """Raise UnfitPrompts for prompts whose tokens exceed their limits, and for those that contain a
    mark of the tokenizer, such as <|image_pad|> or <|im_end|>, which would not be read as text.

    Marks of one character ("!", with which CLIP pads) are ordinary text. image_tokens: how many of
    the tokens are an image's.
    """
    marks = [mark for mark in tokenizer.get_added_vocab() if len(mark) > 1]  # pyright: ignore
    reasons = {}
    for index, (prompt, length, limit) in enumerate(zip(prompts, lengths, limits, strict=True)):
        if contained := [mark for mark in marks if mark in prompt]:
            reasons[index] = (
                f"contains {contained[0]}, which the text encoder takes for a mark of its own: "
                "remove it"
            )
        elif length > limit:
            of_image = image_tokens[index] if image_tokens else 0
            part = f", {of_image} of them the image's" if of_image else ""
            reasons[index] = f"makes {length} tokens{part}; the limit is {limit}. Shorten it"
    if reasons:
        raise UnfitPrompts(prompts, reasons)
