"""Keys of other trainers are translated, typing errors get a suggestion, and nothing is guessed."""

from pathlib import Path

import pytest

from dopsd.config.aliases import ALIASES, MOVED, RENAMED, UNSUPPORTED
from dopsd.config.recipe import Recipe, known_keys, load_recipe, parse_recipe


def message_for(section: str, key: str) -> str:
    with pytest.raises(ValueError, match="is no key of a recipe") as refused:
        parse_recipe({section: {key: 1}} if section else {key: 1})
    return next(line for line in str(refused.value).split(". ") if "is no key" in line)


@pytest.mark.parametrize(("word", "key"), ALIASES.items())
def test_words_of_other_trainers_are_translated(word, key):
    assert f"; {word} is {key} here" in message_for("train", word)
    assert key in known_keys() or key == "the --resume flag"


@pytest.mark.parametrize(("word", "reason"), UNSUPPORTED.items())
def test_what_does_not_exist_is_not_called_something_else(word, reason):
    assert message_for("train", word).endswith(f"is no key of a recipe; {reason}")


@pytest.mark.parametrize(
    ("section", "word", "hint"),
    [
        ("lora", "rnak", "(did you mean lora.rank?)"),
        ("train", "learning_rte", "(did you mean train.learning_rate?)"),
        ("train", "rank", "(did you mean lora.rank?)"),
        ("sample", "evry", "(did you mean sample.every?)"),
        ("save", "evry", "(did you mean save.every?)"),
        ("", "trian", "(did you mean train?)"),
        ("", "max_steps", "(did you mean train.max_steps?)"),
    ],
)
def test_typing_errors_get_a_suggestion(section, word, hint):
    assert hint in message_for(section, word)


@pytest.mark.parametrize("word", ["weights_of_base", "noise_offset", "xformers", "snr", "mp", "x"])
def test_a_key_that_resembles_none_gets_the_sections_and_no_guess(word):
    message = message_for("train", word)
    assert "did you mean" not in message and "the sections are adapter, data, health" in message


def test_renamed_keys_lead_to_keys_that_exist():
    for old, renamed in RENAMED.items():
        assert renamed.key in known_keys() and old not in known_keys()


def with_old_key(key: str, value: object) -> Recipe:
    tree = {
        "model": {"name_or_path": "pocket"},
        "data": {"folder": "."},
        "method": {"name": "dopsd"},
        "run_name": "run",
    }
    section, name = key.split(".")
    return parse_recipe(tree | {section: tree[section] | {name: value}})


@pytest.mark.parametrize(
    ("old", "value", "new"),
    [
        ("method.retention", 0.5, "retention.weight"),
        ("data.replay", ["a cat"], "retention.prompts"),
    ],
)
def test_a_key_that_moved_is_refused_in_one_sentence_and_its_off_value_is_not(old, value, new):
    """Run folders hold every default of their time."""
    with pytest.raises(ValueError, match=rf"{old} is no key of a recipe; it is {new} now\.$"):
        with_old_key(old, value)
    assert new in known_keys() and old not in known_keys()
    assert with_old_key(old, MOVED[old].off).retention.weight == 0


def test_a_run_folder_from_before_retention_was_a_section_is_read():
    config = Path(__file__).parents[1] / "runs" / "outputs" / "old_run" / "config.yaml"
    assert "replay:" in config.read_text() and "retention: 0.0" in config.read_text()
    assert load_recipe(config).retention.weight == 0
