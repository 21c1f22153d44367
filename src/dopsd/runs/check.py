"""What a resolved run would do, and everything that can be refused before a weight is loaded."""

from dataclasses import dataclass

import torch
from torch import nn

from dopsd.images import image_size, open_image
from dopsd.models import load_family
from dopsd.models.base import fitted_size, network_on_meta
from dopsd.models.lora import read_lora, refuse_misfit
from dopsd.runs.outputs.lora_export import refuse_unfit
from dopsd.runs.resolve import ResolvedRun
from dopsd.training.adapters import Coverage, coverage, lora_sizes
from dopsd.training.trainable import AllWeights


@dataclass(frozen=True)
class Checked:
    """coverage: which weights train. forwards_per_image: network forwards that one image costs, a
    backward counted as two."""

    coverage: Coverage | AllWeights
    forwards_per_image: int


def check(run: ResolvedRun) -> Checked:
    """Refuse what cannot be trained, and count what would be. No weight is loaded.

    Raises ValueError, in one sentence, for weights or LoRA files of another architecture, captions
    and prompts over the model's limit, images to edit that the model does not take, and steps that
    the method cannot take.
    """
    recipe, family = run.recipe, run.family
    _refuse_unfit_references(run)
    network = network_on_meta(family)
    if recipe.adapter == "full":
        trained = AllWeights(sum(parameter.numel() for parameter in network.parameters()))
    else:
        trained = coverage(network, run.lora_targets, recipe.lora.rank)
    _refuse_other_architectures(run, network)
    if path := recipe.lora.init_from:
        own_sizes = lora_sizes(network, run.lora_targets, recipe.lora.rank)
        refuse_unfit(path, read_lora(path, family), own_sizes)
    _refuse_long_prompts(run)
    recipe.method.refuse_nfe(run.nfe)
    return Checked(trained, recipe.method.forwards(run.nfe))


def _refuse_other_architectures(run: ResolvedRun, network: nn.Module) -> None:
    """The weights that are trained on instead of the deployed ones must be of the same
    architecture."""
    model = run.recipe.model
    if path := model.training_adapter:
        for module, (a, b) in read_lora(path, run.family).items():
            refuse_misfit(path, module, network, (len(b), a.shape[1]))
    if model.train_on:
        other = load_family(model.train_on)
        if other.name != run.family.name or _shapes(network_on_meta(other)) != _shapes(network):
            raise ValueError(
                f"model.train_on {model.train_on} is of another architecture than "
                f"{model.name_or_path}: a LoRA of one does not fit the other. Give a checkpoint of "
                "the same network, such as the many-step model that it was distilled from."
            )


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def _refuse_long_prompts(run: ResolvedRun) -> None:
    """Every caption and prompt must fit the student's context, and with an image the teacher's."""
    family, method = run.family, run.recipe.method
    captions = [
        (caption, index)
        for index, example in enumerate(run.listing.examples)
        for caption in (example.caption, *example.also)
    ]
    previewed = [preview.prompt for preview in run.previews]
    others = [*run.health_prompts, *run.replay_prompts]
    if method.to_generate and method.to_generate.prompt:
        others.append(method.to_generate.prompt)
    family.count_tokens([*(caption for caption, _ in captions), *previewed, *others])
    if run.learns_from_teacher:
        family.count_tokens(previewed, [(run.side, run.side)] * len(previewed))
        for sizes in run.sizes:
            family.count_tokens(
                [caption for caption, _ in captions], [sizes[index] for _, index in captions]
            )


def _refuse_unfit_references(run: ResolvedRun) -> None:
    """An image to edit must be one that the model takes. Those of the data are known to be images;
    those of the recipe's prompts are opened."""
    in_data = [path for example in run.listing.examples for path in example.references]
    for path in dict.fromkeys(in_data):
        fitted_size(run.family, path, image_size(path))
    in_prompts = [path for prompt in run.recipe.sample.prompts for path in prompt.references]
    for path in dict.fromkeys(in_prompts):
        fitted_size(run.family, path, open_image(path).size)
