"""Rewards: images of known order, names that lead nowhere, and answers of a wrong form."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dopsd.evaluation.rewards import find_reward, load_reward
from dopsd.pocket.world.captions import caption_of, stated_in, stated_of
from dopsd.pocket.world.scenes import Jitter, Scene, draw_scene, render

CPU = torch.device("cpu")


def one_colour(*colour: float) -> torch.Tensor:
    return torch.tensor(colour)[:, None, None].expand(3, 8, 8)


def test_red_prefers_the_redder_image_and_bright_the_brighter():
    images = torch.stack(
        [
            one_colour(*c)
            for c in ((0, 1, 1), (0.2, 0.9, 0.9), (1, 1, 1), (0.9, 0.5, 0.3), (1, 0, 0))
        ]
    )
    red = load_reward("red", CPU)(images, ["a"] * 5)
    assert red.tolist() == sorted(red.tolist()) and red.dtype == torch.float32
    assert (red[0].item(), red[2].item(), red[4].item()) == (-1, 0, 1)
    bright = load_reward("bright", CPU)(images, ["a"] * 5)
    assert bright.tolist() == pytest.approx([2 / 3, 2 / 3, 1, 1.7 / 3, 1 / 3])


def test_attributes_prefers_the_image_that_shows_what_the_caption_states():
    scene = Scene(
        noun="star",
        colour="red",
        size="big",
        place="left",
        background="night",
        style="flat",
        jitter=Jitter(),
    )
    others = [
        scene,
        scene.__class__(**(scene.__dict__ | {"colour": "blue"})),
        scene.__class__(
            **(scene.__dict__ | {"colour": "blue", "place": "right", "background": "paper"})
        ),
    ]
    images = torch.from_numpy(np.stack([render(each) for each in others])).permute(0, 3, 1, 2) / 255
    reward = load_reward("attributes", CPU)
    shown = reward(images, ["a big red star at the left on night"] * 3)
    assert shown.tolist() == pytest.approx([1, 0.8, 0.4])
    assert torch.isnan(reward(images[:1], ["a shape"])).all()
    with pytest.raises(ValueError, match="64 x 64"):
        reward(images[..., :32], ["a red star"] * 3)


def test_what_a_caption_states_is_read_back_from_it():
    rng = np.random.default_rng(0)
    for _ in range(300):
        stated = stated_of(draw_scene(rng), rng)
        assert stated_in(caption_of(stated)) == stated


def as_module(folder: Path, name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_function_and_a_class_are_rewards_by_their_dotted_names(tmp_path, monkeypatch):
    text = """
import torch
class Long:
    def __init__(self):
        self.factor = 2
    def __call__(self, images, prompts):
        lengths = [self.factor * len(p) if p else float("nan") for p in prompts]
        return torch.tensor(lengths, dtype=torch.float64)
def second(images, prompts):
    return images[:, 0, 0, 0]
"""
    as_module(tmp_path, "my_rewards", text, monkeypatch)
    images = torch.rand(3, 3, 4, 4)
    assert torch.equal(load_reward("my_rewards:second", CPU)(images, ["a"] * 3), images[:, 0, 0, 0])
    answer = load_reward("my_rewards:Long", CPU)(images, ["a", "", "abc"])
    assert (
        answer.dtype == torch.float32
        and answer[[0, 2]].tolist() == [2, 6]
        and torch.isnan(answer[1])
    )


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        ("torch.zeros(2)", r"float32 \[2\] for 3 images: it must return a floating tensor \[3\]"),
        ("torch.zeros(3, 1)", r"float32 \[3, 1\]"),
        ("torch.zeros(())", r"float32 \[\]"),
        ("torch.zeros(3, dtype=torch.long)", r"int64 \[3\]"),
        ("[0.0, 0.0, 0.0]", "returned list"),
        ("None", "returned NoneType"),
    ],
)
def test_an_answer_of_another_shape_or_kind_is_refused(answer, sentence, tmp_path, monkeypatch):
    as_module(
        tmp_path,
        "bad_reward",
        f"import torch\ndef reward(images, prompts):\n    return {answer}\n",
        monkeypatch,
    )
    reward = load_reward("bad_reward:reward", CPU)
    with pytest.raises(ValueError, match=sentence):
        reward(torch.rand(3, 3, 4, 4), ["a"] * 3)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("pikscore", "pikscore is no metric: give .* Did you mean pickscore"),
        ("", "is no metric"),
        ("dino=/gone", "the model of dino, /gone, does not exist"),
        ("red=somewhere", "red takes no model"),
        ("aesthetic", "aesthetic has no default model: name a folder"),
        ("clip=/gone", "the model of clip, /gone, does not exist"),
        ("no_such_package.of:reward", "cannot be imported .ModuleNotFoundError"),
        ("math:nothing", "cannot be imported .AttributeError"),
        ("math:pi", "math:pi is a float, which cannot be called"),
        (":reward", "cannot be imported"),
        ("math:", "cannot be imported"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_sentence(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        find_reward(name)


def test_a_metric_that_needs_a_target_is_no_reward(tmp_path):
    with pytest.raises(
        ValueError, match="dino needs target images besides the generated ones: it is a metric"
    ):
        find_reward(f"dino={tmp_path}")
