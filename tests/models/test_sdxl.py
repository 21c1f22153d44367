"""SDXL against StableDiffusionXLPipeline on the same tiny folder: contexts, times, latents; and
what it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import (
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from latents import sample_latents
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from dopsd.cli.app import app
from dopsd.config.recipe import parse_recipe
from dopsd.diffusion.rollout import rollout
from dopsd.diffusion.rollout import sample as sample_rollout
from dopsd.diffusion.sampling import noise_for
from dopsd.models import load_family
from dopsd.models.folder import fuse
from dopsd.models.inspection import inspect_lora
from dopsd.models.lora import read_lora
from dopsd.models.lora_deltas import LowRank
from dopsd.models.lora_forms import lora_tensors
from dopsd.models.lora_keys import sort_keys
from dopsd.models.pipeline import sample
from dopsd.runs.resolve import open_family
from dopsd.runs.train import train

CPU = torch.device("cpu")
PROMPTS = [
    "a cat",
    "a big red heart at the left on night",
    "words without a known merge: kaleidoscope, zeppelin",
]
DMD2_TIMESTEPS = {1: [999], 4: [999, 749, 499, 249]}  # from DMD2's README


def pipeline_of(folder: Path) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generated(
    pipeline: StableDiffusionXLPipeline, nfe: int, width: int, height: int, **more
) -> torch.Tensor:
    renoising = isinstance(pipeline.scheduler, LCMScheduler)
    steps = {"timesteps": DMD2_TIMESTEPS[nfe]} if renoising else {"num_inference_steps": nfe}
    return pipeline(
        list(PROMPTS),
        height=height,
        width=width,
        guidance_scale=0.0,
        output_type="latent",
        return_dict=False,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))],
        **steps,
        **more,
    )[0]


@pytest.fixture(scope="module", params=["turbo", "dmd2", "lightning"])
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(kind, sdxl) -> Path:
    return sdxl(kind)


@pytest.fixture(scope="module")
def family(folder):
    return load_family(str(folder))


@pytest.fixture(scope="module")
def pipeline(folder):
    return pipeline_of(folder)


def test_contexts_equal_the_pipelines_prompt_embeddings(family, pipeline):
    tokens, _, pooled, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    ours = family.load_text_encoder(CPU, torch.float32, images=False).context(PROMPTS)
    assert torch.equal(ours.tokens, tokens) and torch.equal(ours.extras["pooled"], pooled)
    blank = family.blank_context(PROMPTS)
    assert (blank.tokens.shape, blank.layout, blank.lengths) == (
        ours.tokens.shape,
        ours.layout,
        ours.lengths,
    )


@pytest.mark.parametrize(
    ("nfe", "width", "height"), [(1, 64, 64), (4, 64, 64), (4, 96, 64), (4, 64, 128)]
)
def test_latents_equal_the_pipelines_from_the_same_seeds(family, pipeline, nfe, width, height):
    noise = noise_for(
        range(3),
        family.channels,
        height // family.vae_scale_factor,
        width // family.vae_scale_factor,
    )
    ours = sample_latents(family, PROMPTS, noise, nfe=nfe)
    assert (ours - generated(pipeline, nfe, width, height)).abs().max() <= 1e-4


def test_images_equal_the_pipelines_images(folder, pipeline, kind):
    steps = {"timesteps": DMD2_TIMESTEPS[4]} if kind == "dmd2" else {"num_inference_steps": 4}
    theirs = pipeline(
        PROMPTS[1], guidance_scale=0.0, generator=torch.Generator().manual_seed(7), **steps
    ).images[0]
    ours = sample(str(folder), [PROMPTS[1]], nfe=4, seed=7)[0]
    assert max(abs(a - b) for a, b in zip(theirs.tobytes(), ours.tobytes(), strict=True)) <= 1


@pytest.mark.parametrize(("nfe", "height", "width"), [(4, 8, 8), (4, 16, 8), (1, 8, 12)])
def test_a_rollout_takes_the_pipelines_sigmas_and_timesteps_bit_for_bit(
    family, pipeline, nfe, height, width
):
    denoiser = family.load_denoiser(CPU, torch.float32)
    context = family.load_text_encoder(CPU, torch.float32, images=False).context(PROMPTS)
    ours, theirs = [], []
    times = []
    for network, seen in ((denoiser.network, ours), (pipeline.unet, theirs)):
        network.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[1].float().max())
        )
    noise = noise_for(range(3), family.channels, height, width)
    for state in rollout(
        denoiser, noise.start, family.schedule(nfe, height, width), context, torch.Generator()
    ):
        times.append(state.step.now)
    generated(pipeline, nfe, width * family.vae_scale_factor, height * family.vae_scale_factor)
    pipeline.unet._forward_pre_hooks.clear()
    assert torch.equal(torch.stack(ours), torch.stack(theirs))
    if isinstance(pipeline.scheduler, LCMScheduler):  # it has no sigmas
        products = pipeline.scheduler.alphas_cumprod[torch.stack(theirs).long()]
        sigmas = ((1 - products) / products) ** 0.5
    else:
        sigmas = pipeline.scheduler.sigmas[:-1]
    assert torch.equal(torch.stack(times), sigmas / (1 + sigmas))


def test_timesteps_between_two_times_are_interpolated(family):
    denoiser = family.empty_denoiser()
    assert torch.equal(denoiser.timesteps(denoiser.times), torch.arange(1000.0))
    middle = (denoiser.times[1:] + denoiser.times[:-1]) / 2
    torch.testing.assert_close(
        denoiser.timesteps(middle), torch.arange(999) + 0.5, atol=0.05, rtol=0
    )
    assert denoiser.timesteps(torch.tensor([0.0, 1.0])).tolist() == [0, 999]


def test_the_velocity_is_that_of_the_noise_the_unet_predicts(family):
    """Where x = clean + sigma noise, the UNet reads x / sqrt(1 + sigma^2) predicting noise."""
    denoiser = family.load_denoiser(CPU, torch.float32)
    context = family.load_text_encoder(CPU, torch.float32, images=False).context(PROMPTS[:1])
    z, t = torch.randn(1, 4, 8, 8), denoiser.times[[500]]
    sigma = (t / (1 - t)).item()
    sizes = torch.tensor([[64, 64, 0, 0, 64, 64.0]])
    noise = denoiser.network(
        z * (1 + sigma) / (1 + sigma**2) ** 0.5,
        torch.tensor(500),
        context.tokens,
        added_cond_kwargs={"text_embeds": context.extras["pooled"], "time_ids": sizes},
        return_dict=False,
    )[0]
    velocity = denoiser(z, t, context)
    torch.testing.assert_close(z + (1 - t) * velocity, noise, atol=1e-5, rtol=1e-5)


def test_an_image_depends_on_its_own_caption_and_on_no_other_in_the_batch(family):
    text_encoder, denoiser = (
        family.load_text_encoder(CPU, torch.float32, images=False),
        family.load_denoiser(CPU, torch.float32),
    )
    noise, schedule = noise_for(range(3), family.channels, 8, 8), family.schedule(4, 8, 8)

    def sample_in_chunks(rows: slice, prompts: list[str]) -> torch.Tensor:
        z, generators = noise[rows].draw()
        return sample_rollout(denoiser, z, schedule, text_encoder.context(prompts), generators)

    together, alone = (
        sample_in_chunks(slice(0, 3), PROMPTS),
        sample_in_chunks(slice(1, 2), PROMPTS[1:2]),
    )
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)
    assert (sample_in_chunks(slice(1, 2), PROMPTS[2:]) - alone).abs().max() > 1e-3


def test_a_base_distilled_by_a_lora_or_a_unet_equals_the_pipeline_with_it(
    sdxl, dmd2_lora, tmp_path
):
    base = sdxl("base")
    unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base / "unet"))
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    for file in (dmd2_lora, tmp_path / "unet.safetensors"):
        pipeline = pipeline_of(base)
        pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
        if file == dmd2_lora:
            pipeline.load_lora_weights(file.parent, weight_name=file.name)
            pipeline.fuse_lora()
            pipeline.unload_lora_weights()
        else:
            pipeline.unet.load_state_dict(load_file(file))
        family = load_family(str(base), distilled_by=str(file))
        assert family.distilled and family.default_nfe == 4
        ours = sample_latents(family, PROMPTS, noise_for(range(3), 4, 8, 8))
        theirs = generated(pipeline, 4, 64, 64)
        assert (ours - theirs).abs().max() <= 1e-4
        base_tensors = sample_latents(
            load_family(str(sdxl("dmd2"))), PROMPTS, noise_for(range(3), 4, 8, 8)
        )
        assert (ours - base_tensors).abs().max() > 0.01, (
            "the file did nothing, so the comparison would prove nothing"
        )


@pytest.mark.parametrize(
    ("name", "steps"),
    [("sdxl_lightning_4step_lora", 4), ("sdxl_lightning_8step_lora", 8), ("my-Lightning", 4)],
)
def test_a_base_distilled_by_lightning_equals_the_pipeline_with_its_sampler(
    name, steps, sdxl, dmd2_lora, tmp_path
):
    """ByteDance's usage: EulerDiscreteScheduler with trailing spacing and no guidance."""
    file = Path(shutil.copy(dmd2_lora, tmp_path / f"{name}.safetensors"))
    pipeline = pipeline_of(sdxl("base"))
    pipeline.scheduler = EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    pipeline.load_lora_weights(file.parent, weight_name=file.name)
    family = load_family(str(sdxl("base")), distilled_by=str(file))
    assert family.distilled and family.default_nfe == steps and family.licence == "openrail++"
    ours = sample_latents(family, PROMPTS, noise_for(range(3), 4, 8, 8))
    assert (ours - generated(pipeline, steps, 64, 64)).abs().max() <= 1e-4
    usage = family.usage(steps)
    assert any('timestep_spacing="trailing"' in line for line in usage.setup)
    fuse(str(sdxl("base")), file, tmp_path / "fused", distilled_by=str(file))
    assert load_family(str(tmp_path / "fused")).distilled


@pytest.mark.parametrize(
    "name",
    ["Hyper-SDXL-8steps-lora", "lcm-lora-sdxl", "pcm_sdxl", "sdxl-turbo-lora", "sdxl_tcd_lora"],
)
def test_files_distilled_in_other_ways_are_refused_by_name(name, sdxl, dmd2_lora, tmp_path):
    file = shutil.copy(dmd2_lora, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="whose sampler is not here"):
        load_family(str(sdxl("base")), distilled_by=str(file))
    one = shutil.copy(dmd2_lora, tmp_path / "sdxl_lightning_1step.safetensors")
    with pytest.raises(ValueError, match="in one step"):
        load_family(str(sdxl("base")), distilled_by=str(one))


def test_a_file_whose_name_does_not_say_how_it_was_distilled_is_warned_about(
    sdxl, dmd2_lora, tmp_path, caplog
):
    file = shutil.copy(dmd2_lora, tmp_path / "few_steps.safetensors")
    load_family(str(sdxl("base")), distilled_by=str(file))
    assert "its name does not say how it was distilled" in caplog.text


def test_a_unet_that_reads_the_guidance_scale_is_refused(sdxl, tmp_path):
    """As SDXL-LCM's: without that condition its answers are off by percents."""
    folder = copied(sdxl, "dmd2", tmp_path)
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"time_cond_proj_dim": 256}))
    with pytest.raises(ValueError, match="reads the guidance scale as a condition, as SDXL-LCM"):
        load_family(str(folder))


def test_lora_targets_match_every_linear_layer_of_the_transformers_and_kohyas_names_keep_them(
    family,
):
    network = family.empty_denoiser().network
    linears = {
        n
        for n, m in network.named_modules()
        if isinstance(m, torch.nn.Linear) and ".attentions." in n
    }
    pairs = {name: LowRank(torch.zeros(2, 1), torch.zeros(1, 2)) for name in linears}
    assert all(re.fullmatch(family.lora_targets, name) for name in linears)
    public = lora_tensors(pairs, family, "kohya")
    assert len(public) == 3 * len(linears)
    places = sort_keys(public, family.module_names).places.values()
    assert sorted(place.parts for place in places) == sorted((name,) for name in linears)


KOHYA = {
    "diffusers' modules": "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    "the original model's modules": "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
}


@pytest.mark.parametrize("form", [*KOHYA, "diffusers' names", "bare names", "raw PEFT"])
def test_public_forms_of_one_adapter_read_as_the_same_deltas(form, family, tmp_path):
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = torch.randn(2, 16), torch.randn(16, 2)
    if form in KOHYA:
        name = KOHYA[form]
        tensors = {
            f"{name}.lora_down.weight": a,
            f"{name}.lora_up.weight": b,
            f"{name}.alpha": torch.tensor(4.0),
        }
    else:
        prefix = {"diffusers' names": "unet.", "bare names": "", "raw PEFT": "base_model.model."}[
            form
        ]
        tensors = {f"{prefix}{module}.lora_A.weight": a, f"{prefix}{module}.lora_B.weight": 2 * b}
    save_file(tensors, tmp_path / "lora.safetensors")
    pairs = read_lora(tmp_path / "lora.safetensors", family)
    assert list(pairs) == [module]
    torch.testing.assert_close(pairs[module].dense(), 2 * b.double() @ a.double())


def copied(sdxl, kind: str, tmp_path: Path) -> Path:
    shutil.copytree(sdxl(kind), tmp_path / "model")
    return tmp_path / "model"


def test_an_incomplete_checkpoint_or_one_for_another_sampler_is_refused(sdxl, tmp_path):
    folder = copied(sdxl, "turbo", tmp_path)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    for change, words in (
        ({"timestep_spacing": "leading"}, "EulerAncestralDiscreteScheduler with leading spacing"),
        ({"_class_name": "DPMSolverMultistepScheduler"}, "DPMSolverMultistepScheduler"),
        ({"prediction_type": "v_prediction"}, "predicts v_prediction"),
    ):
        scheduler.write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=words):
            load_family(str(folder))
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(ValueError, match="lacks the folder text_encoder_2"):
        load_family(str(folder))


def test_a_file_that_cannot_distil_is_refused(sdxl, dmd2_lora, pocket, tmp_path):
    base = str(sdxl("base"))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    save_file({"conv_in.weight": torch.zeros(1)}, tmp_path / "half.safetensors")
    for model, file, words in (
        (base, "unet.bin", "`dopsd import` converts a .bin"),
        (base, str(tmp_path / "other.safetensors"), "neither a LoRA nor a UNet"),
        (str(sdxl("turbo")), str(dmd2_lora), "is a few-step model already"),
        (str(pocket.checkpoint.folder), str(dmd2_lora), "zimage takes no model.distilled_by"),
        (base, str(tmp_path / "missing.safetensors"), "does not exist"),
        (base, "missing.safetensors", "does not exist"),
    ):
        with pytest.raises(ValueError, match=words):
            load_family(model, distilled_by=file)
    half = load_family(base, distilled_by=str(tmp_path / "half.safetensors"))
    assert (
        half.licence == "other"
        and load_family(base, distilled_by=str(dmd2_lora)).licence == "cc-by-nc-4.0"
    )
    with pytest.raises(ValueError, match="is not a UNet of"):
        half.load_denoiser(CPU, torch.float32)


def test_a_base_with_any_many_step_scheduler_is_distilled_in_the_same_way(
    sdxl, dmd2_lora, tmp_path
):
    usual, folder = (
        load_family(str(sdxl("base")), distilled_by=str(dmd2_lora)),
        copied(sdxl, "base", tmp_path),
    )
    scheduler = folder / "scheduler" / "scheduler_config.json"
    config = json.loads(scheduler.read_text())
    for sampler in (
        "DPMSolverMultistepScheduler",
        "DDIMScheduler",
        "EulerAncestralDiscreteScheduler",
    ):
        scheduler.write_text(json.dumps(config | {"_class_name": sampler}))
        family = load_family(str(folder), distilled_by=str(dmd2_lora))
        assert torch.equal(family.schedule(4, 8, 8).times, usual.schedule(4, 8, 8).times)


def test_a_checkpoint_only_in_half_precision_generates_the_same_and_can_be_fused(
    sdxl, dmd2_lora, tmp_path
):
    folder = copied(sdxl, "turbo", tmp_path)
    for file in folder.glob("*/*.safetensors"):
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    noise = noise_for([5], 4, 8, 8)
    theirs, ours = (
        sample_latents(load_family(str(each)), ["a cat"], noise) for each in (sdxl("turbo"), folder)
    )
    assert torch.equal(ours, theirs)
    fuse(str(folder), dmd2_lora, tmp_path / "fused")
    assert not list((tmp_path / "fused").glob("*/*.fp16.*"))
    StableDiffusionXLPipeline.from_pretrained(tmp_path / "fused")


def test_a_many_step_base_is_refused_unless_allowed_or_distilled(sdxl, dmd2_lora, concept):
    def opened(**more):
        model = {"name_or_path": str(sdxl("base")), **more}
        tree = {
            "model": model,
            "data": {"folder": str(concept)},
            "method": {"name": "sft"},
            "run_name": "x",
        }
        return open_family(parse_recipe(tree))

    with pytest.raises(ValueError, match="is a many-step base model"):
        opened()
    assert not opened(allow_base=True).distilled
    assert opened(distilled_by=str(dmd2_lora)).distilled


def test_unsupported_recipes_on_sdxl_are_refused_with_exit_code_2(
    sdxl, dmd2_lora, concept, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    base, turbo, edited = str(sdxl("base")), str(sdxl("turbo")), tmp_path / "edited"
    shutil.copytree(concept, edited)
    rows = [
        {"target": path.name, "references": [path.name], "text": "a toy"}
        for path in edited.glob("*.png")
    ]
    (edited / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cases = (
        ({"name_or_path": base}, concept, "sft", "many-step base model"),
        ({"name_or_path": turbo}, edited, "sft", "sdxl edits none"),
        ({"name_or_path": turbo}, concept, "dopsd", "read no image"),
        (
            {"name_or_path": turbo, "distilled_by": str(dmd2_lora)},
            concept,
            "sft",
            "is a few-step model already",
        ),
        (
            {"name_or_path": base, "distilled_by": "unet.bin"},
            concept,
            "sft",
            "`dopsd import` converts a .bin",
        ),
    )
    for model, folder, method, words in cases:
        tree = {"model": model, "data": {"folder": str(folder)}, "method": {"name": method}}
        Path("recipe.yaml").write_text(yaml.safe_dump(tree))
        done = CliRunner().invoke(app, ["train", "recipe.yaml"])
        output = " ".join(done.output.split())
        assert done.exit_code == 2 and words in output and output.startswith("dopsd: "), output
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yaml", "edited", "concept"}


def test_a_caption_over_the_limit_is_refused_not_truncated(family):
    with pytest.raises(ValueError, match="makes 82 tokens; the limit is 77"):
        family.count_tokens(["i" + " i" * 79])
    with pytest.raises(ValueError, match="the limit is 77"):
        family.load_text_encoder(CPU, torch.float32, images=False).context(["i" + " i" * 79])


def test_a_schedule_of_no_steps_is_refused(family):
    with pytest.raises(ValueError, match="nfe is 0"):
        family.schedule(0, 8, 8)


OPEN_WITH_DIFFUSERS = """
import json, sys
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline

model, distilled_by, lora, target = sys.argv[1:]
pipeline = StableDiffusionXLPipeline.from_pretrained(model, torch_dtype=torch.float32)
steps = {"num_inference_steps": 4}
if distilled_by:
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(distilled_by)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    steps = {"timesteps": [999, 749, 499, 249]}
if lora:
    pipeline.load_lora_weights(lora)
steps |= {"generator": torch.Generator().manual_seed(5), "guidance_scale": 0.0}
steps |= {"output_type": "latent"}
latents = pipeline("a big red star", return_dict=False, **steps)[0]
torch.save(latents, target)
"""


@pytest.mark.parametrize("kind", ["turbo", "base and a LoRA"])
def test_diffusers_generates_the_same_with_the_tuned_lora_and_with_the_fused_folder(
    kind, sdxl, dmd2_lora, concept, tmp_path
):
    model = {"name_or_path": str(sdxl("turbo"))}
    if kind != "turbo":
        model = {"name_or_path": str(sdxl("base")), "distilled_by": str(dmd2_lora)}
    recipe = parse_recipe(
        {
            "model": model,
            "data": {"folder": str(concept)},
            "method": {"name": "sft", "space": "noise"},
            "lora": {"rank": 2, "alpha": 4},
            "train": {"max_steps": 3, "learning_rate": 0.02},
            "sample": {"every": 0, "prompts": "a star", "unrelated": 0},
            "health": {"every": 0},
            "output_dir": str(tmp_path),
            "run_name": "tuned",
        }
    )
    for _ in train(recipe):
        pass
    file = recipe.run_folder / "tuned.safetensors"
    base = load_family(model["name_or_path"], distilled_by=model.get("distilled_by"))
    noise = noise_for([5], 4, 8, 8)
    ours, untuned = (sample_latents(base, ["a big red star"], noise, lora) for lora in (file, None))
    assert (ours - untuned).abs().max() > 0.01, (
        "the adapter did nothing, so the comparison would prove nothing"
    )

    def opened(folder: str, distilled_by: str, lora: str) -> torch.Tensor:
        command = [
            sys.executable,
            "-c",
            OPEN_WITH_DIFFUSERS,
            folder,
            distilled_by,
            lora,
            str(tmp_path / "out.pt"),
        ]
        subprocess.run(command, check=True)
        return torch.load(tmp_path / "out.pt")

    assert (
        opened(model["name_or_path"], model.get("distilled_by", ""), str(file)) - ours
    ).abs().max() <= 1e-4
    expected, names = {}, base.module_names
    for name, module in base.empty_denoiser().network.named_modules():
        if re.fullmatch(base.lora_targets, name):
            key = "lora_unet_" + next(iter(names.native_rows([name]))).replace(".", "_")
            expected |= {f"{key}.lora_down.weight": (2, module.in_features), f"{key}.alpha": ()}
            expected[f"{key}.lora_up.weight"] = (module.out_features, 2)
    assert {name: tuple(tensor.shape) for name, tensor in load_file(file).items()} == expected
    lines = dict(inspect_lora(file).lines)
    assert (
        lines["family"] == "sdxl_base_v1-0"
        and lines["diffusers"] == "strength 1"
        and lines["rank"] == "2"
    )
    fuse(model["name_or_path"], file, tmp_path / "fused", distilled_by=model.get("distilled_by"))
    fused = load_family(str(tmp_path / "fused"))
    assert (
        fused.distilled
        and (sample_latents(fused, ["a big red star"], noise) - ours).abs().max() <= 1e-4
    )
    card = (recipe.run_folder / "README.md").read_text(encoding="utf-8")
    assert ("LCMScheduler" in card and "pipeline.fuse_lora()" in card) == (kind != "turbo")
