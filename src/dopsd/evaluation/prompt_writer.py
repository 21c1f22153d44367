"""Test prompts written by a vision-language model, as in D-OPSD's evaluation: for each image its
scene in other words, and four new scenes.

Every prompt must hold the trigger; answers that break the rule are refused.
"""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image

from dopsd.files import read_jsonl, shorten, write_jsonl
from dopsd.images import open_image

Mode = Literal["object", "style"]
MOST_TOKENS = 1024  # of an answer, as in the reference code
SCENES = 4
RULE = {
    "object": "2 to 5: put {trigger} into four new scenes that have nothing to do with this one: "
    "two that a camera could have taken, and two that only imagination can make. Never say what "
    "kind of thing {trigger} is",
    "style": "2 to 5: four new subjects that this picture does not show, each painted in {trigger} "
    "style",
}
QUESTION = (
    "This picture has the caption: {caption}\nIn it, {trigger} stands for {meaning}. Write five "
    "prompts for a text-to-image model, numbered 1. to 5., each one sentence with the word "
    "{trigger} in it.\n"
    "1: the same scene as in the picture, in other words than the caption.\n{rule}.\n"
    "Write the five numbered prompts and nothing else."
)
MEANING = {"object": "its main object or character", "style": "the way it is made"}


def write_test_prompts(
    images: Sequence[tuple[Path, str]],
    file: Path,
    ask: Callable[[Image.Image, str], str],
    trigger: str,
    mode: Mode,
    class_word: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Write five prompts for each (image, caption) into a `.jsonl` file; images that have prompts
    there already are skipped. Returns the number of prompts in the file.

    ask: (image, question) -> answer. class_word: what the object is ("dog"); object prompts must
    not say it, and text metrics read it in place of the trigger. Raises ValueError for an answer
    that breaks the rule; the prompts so far are kept.
    """
    rows = [row for _, row in read_jsonl(file)] if file.exists() else []
    done = {row.get("target") for row in rows}
    for number, (path, caption) in enumerate(images, start=1):
        target = os.path.relpath(path, file.parent)
        if target not in done:
            question = QUESTION.format(
                caption=caption,
                trigger=trigger,
                meaning=MEANING[mode],
                rule=RULE[mode].format(trigger=trigger),
            )
            answer = ask(open_image(path), question)
            prompts = prompts_in(
                answer, trigger, class_word if mode == "object" else None, path.name
            )
            rows += [_row(p, k, target, trigger, class_word) for k, p in enumerate(prompts)]
            write_jsonl(file, rows)
        if progress:
            progress(number, len(images))
    return len(rows)


def _row(
    prompt: str, place: int, target: str, trigger: str, class_word: str | None
) -> dict[str, str]:
    row = {"prompt": prompt, "target": target, "kind": "scene" if place else "rewrite"}
    return row | ({"scored_as": prompt.replace(trigger, class_word)} if class_word else {})


def prompts_in(answer: str, trigger: str, forbidden: str | None, called: str) -> list[str]:
    """The five prompts of an answer. called: the image, in messages. Raises ValueError for an
    answer of another form, a prompt without the trigger, or one with the forbidden word."""
    form = (
        r"\s*" + r"\s+".join(rf"{number}[.)]\s+(.+?)" for number in range(1, SCENES + 2)) + r"\s*"
    )
    match = re.fullmatch(form, answer, flags=re.DOTALL)
    if not match:
        raise ValueError(
            f"the answer about {called} is not five numbered prompts: {shorten(answer, 120)!r}."
        )
    for prompt in match.groups():
        if trigger not in prompt:
            raise ValueError(
                f"a prompt about {called} lacks the trigger {trigger}: {shorten(prompt, 120)!r}."
            )
        if forbidden and re.search(rf"\b{re.escape(forbidden)}s?\b", prompt, flags=re.IGNORECASE):
            raise ValueError(
                f"a prompt about {called} says {forbidden}, which gives the thing away: "
                f"{shorten(prompt, 120)!r}."
            )
    return list(match.groups())
