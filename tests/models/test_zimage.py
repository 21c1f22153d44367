"""Z-Image against ZImagePipeline on the same folder: contexts, times and latents; and what it
refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import ZImagePipeline
from latents import sample_latents
from PIL import Image
from transformers import AutoTokenizer, Qwen3VLModel

from dopsd.diffusion.rollout import rollout
from dopsd.diffusion.rollout import sample as sample_rollout
from dopsd.diffusion.sampling import generate, noise_for
from dopsd.models import load_family
from dopsd.models.base import TeacherVision
from dopsd.models.pipeline import sample
from dopsd.models.qwen3_prompts import with_image
from dopsd.models.qwen3_vl import transplant

CPU = torch.device("cpu")
PROMPTS = [
    "a star",
    "a big red heart at the left on night in striped style",
    "two words that the tokenizer has never seen: kaleidoscope, zeppelin",
]


@pytest.fixture(scope="module")
def pipeline(pocket) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(pocket.checkpoint.folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_student_contexts_equal_the_pipelines_prompt_embeddings(pocket_text_encoder, pipeline):
    theirs, _ = pipeline.encode_prompt(list(PROMPTS), do_classifier_free_guidance=False)
    ours = pocket_text_encoder.context(PROMPTS)
    for index, row in enumerate(theirs):
        torch.testing.assert_close(ours.row(index).tokens[0], row, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("nfe", "width", "height"), [(2, 64, 64), (4, 64, 64), (8, 64, 64), (2, 96, 48), (8, 48, 96)]
)
def test_latents_equal_the_pipelines_from_the_same_noise(pocket, pipeline, nfe, width, height):
    noise = noise_for(
        range(3),
        pocket.channels,
        height // pocket.vae_scale_factor,
        width // pocket.vae_scale_factor,
    )
    theirs = pipeline(
        list(PROMPTS),
        height=height,
        width=width,
        num_inference_steps=nfe,
        guidance_scale=0.0,
        latents=noise.start,
        output_type="latent",
        return_dict=False,
    )[0]
    ours = sample_latents(pocket, PROMPTS, noise, nfe=nfe)
    assert (ours - theirs).abs().max() <= 1e-4


def test_images_equal_the_pipelines_images(pocket, pipeline):
    noise = noise_for(range(3), pocket.channels, 16, 16)
    theirs = pipeline(
        list(PROMPTS),
        height=64,
        width=64,
        num_inference_steps=4,
        guidance_scale=0.0,
        latents=noise.start,
    )
    ours = sample(pocket.checkpoint.folder, PROMPTS, nfe=4)
    for left, right in zip(theirs.images, ours, strict=True):
        assert max(abs(a - b) for a, b in zip(left.tobytes(), right.tobytes(), strict=True)) <= 1


@pytest.mark.parametrize("nfe", [1, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (24, 12)])
def test_a_rollout_takes_the_pipelines_sigmas_bit_for_bit(
    pocket, pipeline, pocket_text_encoder, nfe, height, width
):
    seen = []

    def velocity(z, t, context):
        seen.append(t[0].clone())
        return torch.zeros_like(z)

    context = pocket_text_encoder.context(PROMPTS[:1])
    noise = noise_for([0], pocket.channels, height, width).start
    list(rollout(velocity, noise, pocket.schedule(nfe, height, width), context))
    pipeline(
        PROMPTS[0],
        height=height * pocket.vae_scale_factor,
        width=width * pocket.vae_scale_factor,
        num_inference_steps=nfe,
        guidance_scale=0.0,
        output_type="latent",
    )
    assert torch.equal(torch.stack(seen), pipeline.scheduler.sigmas[:-1])


def test_turbos_schedule_has_the_documented_times(pocket):
    four, eight = pocket.schedule(4, 16, 16).times, pocket.schedule(8, 16, 16).times
    torch.testing.assert_close(four, torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    torch.testing.assert_close(
        eight[:-1],
        torch.tensor([1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3]),
        atol=1e-4,
        rtol=0,
    )
    assert all((eight - t).abs().min() < 1e-6 for t in four)


def test_other_captions_in_the_batch_do_not_change_an_image(pocket, pocket_text_encoder):
    denoiser = pocket.load_denoiser(CPU, torch.float32)
    noise, schedule = noise_for(range(3), pocket.channels, 16, 16), pocket.schedule(4, 16, 16)
    together = sample_rollout(denoiser, noise.start, schedule, pocket_text_encoder.context(PROMPTS))
    alone = sample_rollout(
        denoiser, noise[1:2].start, schedule, pocket_text_encoder.context(PROMPTS[1:2])
    )
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


def test_the_teachers_context_is_one_user_turn_with_the_image_first(pocket, pocket_text_encoder):
    image = Image.new("RGB", (64, 64), "red")
    context = pocket_text_encoder.context(["a star"], [image])
    text = pocket_text_encoder.tokenizer.apply_chat_template(
        [{"role": "user", "content": "a star"}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    assert context.tokens.shape[1] == len(text) + 64 + 2  # 64 image tokens between two marks
    other = pocket_text_encoder.context(["a star"], [Image.new("RGB", (64, 64), "blue")])
    assert (context.tokens - other.tokens).abs().max() > 1e-3


def test_the_teachers_image_is_limited_to_576_tokens(pocket, tmp_path):
    shutil.copytree(Path(pocket.checkpoint.folder) / "vlm", tmp_path / "vlm")
    file = tmp_path / "vlm" / "preprocessor_config.json"
    wide = {"shortest_edge": 65536, "longest_edge": 16777216}  # Qwen3-VL's own
    file.write_text(json.dumps(json.loads(file.read_text()) | {"size": wide}))
    text_encoder = load_family(
        str(pocket.checkpoint.folder), teacher_vision=TeacherVision(vlm=str(tmp_path / "vlm"))
    ).load_text_encoder(CPU, torch.float32, images=True)
    patches = text_encoder.processor(images=[Image.new("RGB", (2000, 1000))], return_tensors="pt")
    tokens = int(patches["image_grid_thw"].prod()) // text_encoder.processor.merge_size**2
    assert 500 <= tokens <= 576


def test_text_only_states_of_encoder_and_vlm_are_equal(pocket_text_encoder):
    assert pocket_text_encoder.text_gap == 0


def copied(pocket, tmp_path: Path) -> Path:
    shutil.copytree(pocket.checkpoint.folder, tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_without_a_part_is_refused(pocket, tmp_path):
    folder = copied(pocket, tmp_path)
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match="lacks the folder vae"):
        load_family(str(folder))


def test_a_folder_of_another_family_is_refused(pocket, tmp_path):
    folder = copied(pocket, tmp_path)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"_class_name": "FluxPipeline"}))
    with pytest.raises(ValueError, match=r"FluxPipeline.*dopsd knows"):
        load_family(str(folder))


@pytest.mark.parametrize("path", ["/no/such/folder", "./missing", "missing"])
def test_a_missing_folder_is_refused(path):
    with pytest.raises(ValueError, match="does not exist"):
        load_family(path)


def test_a_vlm_of_another_size_is_refused_and_the_keys_listed(pocket, pocket_text_encoder):
    config = pocket_text_encoder.vlm.config.__class__.from_dict(
        pocket_text_encoder.vlm.config.to_dict()
    )
    config.text_config.num_hidden_layers = 4
    with pytest.raises(ValueError, match=r"layers\.3.*\(missing\)"):
        transplant(pocket_text_encoder.encoder, Qwen3VLModel(config), "bigger")
    config = config.__class__.from_dict(pocket_text_encoder.vlm.config.to_dict())
    config.text_config.intermediate_size = 64
    with pytest.raises(ValueError, match=r"\(shape\)"):
        transplant(pocket_text_encoder.encoder, Qwen3VLModel(config), "narrower")


def test_a_caption_over_the_limit_is_refused_not_truncated(pocket_text_encoder):
    with pytest.raises(ValueError, match="the limit is 512"):
        pocket_text_encoder.context(["star " * 600])
    with pytest.raises(ValueError, match="64 of them the image's; the limit is 1024"):
        pocket_text_encoder.context(["star " * 1100], [Image.new("RGB", (64, 64))])


# The user turn of Qwen3's template, as in Z-Image's tokenizer: it drops content that is not text.
QWEN3 = (
    "{%- for message in messages %}"
    "{%- if message.content is string %}{%- set content = message.content %}"
    "{%- else %}{%- set content = '' %}{%- endif %}"
    "{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)


def test_image_placeholders_are_written_with_a_template_that_supports_no_images(
    pocket,
):
    tokenizer = AutoTokenizer.from_pretrained(pocket.checkpoint.folder / "tokenizer")
    ours = with_image(tokenizer, "a red star", 3)
    tokenizer.chat_template = QWEN3
    assert with_image(tokenizer, "a red star", 3) == ours
    assert ours == (
        "<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|image_pad|><|image_pad|><|vision_end|>"
        "a red star<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@torch.no_grad()
def test_decoding_uses_diffusers_tiles_and_encoding_uses_none(pocket):
    whole, tiled = (pocket.load_vae(CPU, torch.float32, tiled=tiled) for tiled in (False, True))
    pixels = torch.rand(1, 3, 160, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = whole.latents(pixels)
    assert torch.equal(tiled.latents(pixels), latents)
    scaled = (
        latents / whole.autoencoder.config.scaling_factor + whole.autoencoder.config.shift_factor
    )
    theirs = whole.autoencoder
    theirs.tile_sample_min_size, theirs.tile_latent_min_size = 64, 16
    expected = theirs.tiled_decode(scaled, return_dict=False)[0]
    assert torch.equal(tiled.pixels(latents), expected)
    assert (
        not torch.equal(whole.pixels(latents), expected)
        and (whole.pixels(latents) - expected).abs().mean() < 0.1
    )


@torch.no_grad()
def test_images_generated_in_chunks_equal_those_generated_together(
    pocket, pocket_text_encoder, monkeypatch
):
    denoiser, vae = pocket.load_denoiser(CPU, torch.float32), pocket.load_vae(CPU, torch.float32)
    side = pocket.resolution // pocket.vae_scale_factor
    context, noise = (
        pocket_text_encoder.context(PROMPTS),
        noise_for(range(3), pocket.channels, side, side),
    )
    sizes = []

    def velocity(z, t, text):
        sizes.append(len(z))
        return denoiser(z, t, text)

    together = generate(velocity, vae, pocket.schedule(2, side, side), context, noise)
    monkeypatch.setattr("dopsd.diffusion.sampling.MAX_PIXELS", 2 * pocket.resolution**2)
    apart = generate(velocity, vae, pocket.schedule(2, side, side), context, noise)
    assert sizes == [3, 3, 2, 2, 1, 1]
    assert (together.int() - apart.int()).abs().max() <= 1


@pytest.mark.parametrize(("version", "named"), [(None, "none"), (2, "2"), (4, "4")])
def test_a_model_of_another_release_is_refused(pocket, tmp_path, version, named):
    folder = tmp_path / "old"
    shutil.copytree(pocket.checkpoint.folder, folder)
    about = json.loads((folder / "dopsd.json").read_text())
    del about["version"]
    if version:
        about["version"] = version
    (folder / "dopsd.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=f"another release.*version {named},.*`pocket`"):
        load_family(str(folder))
