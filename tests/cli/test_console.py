"""What is printed is what was given: no markup, no emoji, no control characters, one line."""

import os
import subprocess
import sys

import pytest

from dopsd.cli.console import LONGEST, printable, refuse, say, show_table


@pytest.mark.parametrize(
    "text", ["runs [old]/a.png", "m[v2]", "[/x]", ":x: :smile:", "[red]no[/red]", "café 星"]
)
def test_paths_and_captions_are_printed_as_they_are(text, capsys):
    say(text)
    show_table(["name"], [[text]])
    assert capsys.readouterr().out.split("\n")[::2][0] == text
    show_table(["name"], [[text]])
    assert text in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("a\nloader: yes", "a\\nloader: yes"),
        ("title\x1b]0;x\x07", "title\\x1b]0;x\\x07"),
        ("c1\x9b2J", "c1\\x9b2J"),
        ("\r", "\\r"),
    ],
)
def test_control_characters_are_escaped(text, shown, capsys):
    assert printable(text) == shown
    say(text)
    assert capsys.readouterr().out == shown + "\n"
    show_table(["name"], [[text]])
    assert shown in capsys.readouterr().out


def test_a_character_that_the_terminal_lacks_is_a_question_mark():
    done = subprocess.run(
        [sys.executable, "-m", "dopsd", "check", "星.yaml"],
        env={**os.environ, "PYTHONIOENCODING": "cp1252"},
        capture_output=True,
    )
    assert done.returncode == 2 and done.stderr.startswith(b"dopsd: ?.yaml does not exist")


def test_a_refusal_is_never_longer_than_a_few_lines(capsys):
    refuse("a" * 100_000)
    assert len(capsys.readouterr().err) < LONGEST + 20
