"""FLUX.2-klein against Flux2KleinPipeline on a tiny random checkpoint: contexts, times, latents;
and its teachers."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from PIL import Image
from safetensors.torch import save_file
from tiny_klein import TEXT, write_klein, write_vlm

from dopsd.diffusion.batch import Batch
from dopsd.diffusion.rollout import rollout
from dopsd.diffusion.rollout import sample as sample_rollout
from dopsd.diffusion.sampling import noise_for
from dopsd.methods import DOPSD
from dopsd.models import load_family
from dopsd.models.base import TeacherVision
from dopsd.models.flux2_klein import LAST_SUFFIX, SUFFIX, Flux2Klein, KleinTextEncoder
from dopsd.models.lora import read_lora
from dopsd.models.pipeline import sample
from dopsd.training.adapters import add_lora, coverage
from dopsd.training.roles import Teacher, make_roles

CPU = torch.device("cpu")
PROMPTS = [
    "a star",
    "a big red heart at the left on night in striped style",
    "words unseen: kaleidoscope, zeppelin",
]


def noisy_image(seed: int, width: int, height: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(
        0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8
    )
    return Image.fromarray(values).resize((width, height))


REFERENCES = [noisy_image(1, 80, 130), noisy_image(2, 150, 70)]  # neither a multiple of 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_klein(tmp_path_factory.mktemp("klein") / "model")


@pytest.fixture(scope="module")
def klein(folder) -> Flux2Klein:
    return load_family(str(folder))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def text_encoder(klein) -> KleinTextEncoder:
    return klein.load_text_encoder(CPU, torch.float32, images=True)


@pytest.fixture(scope="module")
def denoiser(klein):
    return klein.load_denoiser(CPU, torch.float32)


@pytest.fixture(scope="module")
def pipeline(folder) -> Flux2KleinPipeline:
    pipeline = Flux2KleinPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generated_by(pipeline, noise: torch.Tensor, nfe: int = 4, **inputs) -> torch.Tensor:
    """The pipeline's last latents before it undoes the batch norm, as [B, C, h, w]."""
    seen = {}

    def keep(pipe, index, time, tensors):
        seen.update(tensors)
        return tensors

    height, width = noise.shape[-2:]
    pipeline(
        height=16 * height,
        width=16 * width,
        num_inference_steps=nfe,
        latents=noise.clone(),
        output_type="latent",
        callback_on_step_end=keep,
        **inputs,
    )
    return seen["latents"].mT.reshape(noise.shape)


def test_student_contexts_equal_the_pipelines_prompt_embeddings_with_their_padding(
    text_encoder, pipeline
):
    theirs, _ = pipeline.encode_prompt(list(PROMPTS))
    ours = text_encoder.context(PROMPTS)
    assert ours.tokens.shape == theirs.shape == (3, 512, 48) and ours.lengths == (512,) * 3
    torch.testing.assert_close(ours.tokens, theirs, atol=2e-6, rtol=1e-5)
    assert theirs[:, -1].abs().max() > 0.1  # padding has states too


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize(("height", "width"), [(4, 6), (7, 3)])
def test_latents_equal_the_pipelines_from_the_same_noise_and_references(
    klein, text_encoder, denoiser, pipeline, count, height, width
):
    noise, shown = noise_for(range(3), klein.channels, height, width).start, REFERENCES[:count]
    theirs = generated_by(pipeline, noise, prompt=list(PROMPTS), image=shown or None)
    context = text_encoder.context(PROMPTS, references=[shown] * 3 if shown else None)
    ours = sample_rollout(denoiser, noise, klein.schedule(4, height, width), context)
    assert (theirs[0] - theirs[1]).abs().max() > 0.1
    assert (ours - theirs).abs().max() <= 1e-4


def test_in_bfloat16_the_network_is_told_the_pipelines_times(klein, text_encoder, pipeline):
    noise = noise_for([0], klein.channels, 12, 8).start
    half = klein.load_denoiser(CPU, torch.bfloat16)
    told: dict[str, list[float]] = {"pipeline": [], "ours": []}

    def recording(times):
        return lambda module, inputs: times.append(inputs[0][0].item())

    embed = half.network.time_guidance_embed
    with embed.register_forward_pre_hook(recording(told["ours"])):
        sample_rollout(half, noise, klein.schedule(4, 12, 8), text_encoder.context(PROMPTS[:1]))
    float32 = pipeline.transformer
    try:
        pipeline.transformer = half.network
        embeddings = pipeline.encode_prompt(PROMPTS[0])[0].bfloat16()
        with embed.register_forward_pre_hook(recording(told["pipeline"])):
            generated_by(pipeline, noise.bfloat16(), prompt_embeds=embeddings)
    finally:
        pipeline.transformer = float32
    assert len(told["ours"]) == 4 and told["ours"] == told["pipeline"]


def test_images_and_noise_equal_the_pipelines(folder, pipeline, tmp_path):
    for index, image in enumerate(REFERENCES):
        image.save(tmp_path / f"{index}.png")
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    ours = sample(str(folder), PROMPTS[:1], seed=7, references=paths)[0]
    theirs = pipeline(
        prompt=PROMPTS[0],
        image=REFERENCES,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert ours.size == theirs.size == (80, 128)  # by the first reference
    assert max(abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes(), strict=True)) <= 1


@pytest.mark.parametrize("nfe", [1, 4])
@pytest.mark.parametrize(("height", "width"), [(4, 4), (9, 5), (64, 64), (56, 72), (80, 60)])
def test_the_schedule_has_the_pipelines_sigmas_bit_for_bit_at_every_size(
    klein, pipeline, nfe, height, width
):
    # The pipeline's own calls, without the network between them.
    theirs = pipeline.scheduler
    from diffusers.pipelines.flux2 import pipeline_flux2_klein as source

    mu = source.compute_empirical_mu(image_seq_len=height * width, num_steps=nfe)
    source.retrieve_timesteps(theirs, nfe, None, sigmas=np.linspace(1.0, 1 / nfe, nfe), mu=mu)
    expected = theirs.sigmas.clone()
    if height * width < 50:  # and, where it is cheap, after a complete call
        generated_by(
            pipeline, torch.zeros(1, klein.channels, height, width), nfe=nfe, prompt="a star"
        )
        assert torch.equal(theirs.sigmas, expected)
    assert torch.equal(klein.schedule(nfe, height, width).times, expected)


def test_the_schedule_at_1024_pixels_has_the_documented_times(klein):
    times = klein.schedule(4, 64, 64).times
    torch.testing.assert_close(
        times, torch.tensor([1.0, 0.967, 0.908, 0.767, 0.0]), atol=1e-3, rtol=0
    )


def test_encoding_and_decoding_equal_the_pipelines(klein, pipeline):
    vae = klein.load_vae(CPU, torch.float32)
    pixels = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        theirs = pipeline._encode_vae_image(pixels, None)
        torch.testing.assert_close(vae.latents(pixels), theirs, atol=1e-6, rtol=1e-5)
        std = torch.sqrt(pipeline.vae.bn.running_var + pipeline.vae.config.batch_norm_eps).view(
            1, -1, 1, 1
        )
        raw = pipeline._unpatchify_latents(
            theirs * std + pipeline.vae.bn.running_mean.view(1, -1, 1, 1)
        )
        torch.testing.assert_close(
            vae.pixels(theirs), pipeline.vae.decode(raw).sample, atol=1e-5, rtol=1e-4
        )


def test_references_are_resized_by_the_pipelines_rule(klein):
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    sizes = [
        *np.random.default_rng(0).integers(30, 3000, (60, 2)).tolist(),
        [64, 512],
        [63, 100],
        [1024, 1024],
    ]
    for width, height in sizes:
        image = Image.new("1", (width, height))
        try:
            processor.check_image_input(image)
        except ValueError:
            with pytest.raises(ValueError, match="an image to edit is"):
                klein.reference_size((width, height))
            continue
        resized = processor._resize_if_exceeds_area(image).size
        assert klein.reference_size((width, height)) == (
            resized[0] // 16 * 16,
            resized[1] // 16 * 16,
        )


def test_other_prompts_in_the_batch_do_not_change_an_image(klein, text_encoder, denoiser):
    noise, schedule = noise_for(range(3), klein.channels, 4, 4).start, klein.schedule(4, 4, 4)
    together = sample_rollout(denoiser, noise, schedule, text_encoder.context(PROMPTS))
    alone = sample_rollout(denoiser, noise[1:2], schedule, text_encoder.context(PROMPTS[1:2]))
    torch.testing.assert_close(together[1:2], alone, atol=1e-4, rtol=1e-4)


# Double and single blocks, heads and text width of the two sizes, and their linear layers.
SHAPES = {"4B": (5, 20, 24, 7680, 100), "9B": (8, 24, 32, 12288, 144)}


@pytest.mark.parametrize("size", SHAPES)
def test_lora_targets_match_every_linear_layer_of_the_blocks_of_both_sizes(size):
    doubles, singles, heads, width, linears = SHAPES[size]
    with torch.device("meta"):
        network = Flux2Transformer2DModel(
            num_layers=doubles,
            num_single_layers=singles,
            num_attention_heads=heads,
            joint_attention_dim=width,
            guidance_embeds=False,
        )
    reach = coverage(network, Flux2Klein.lora_targets, rank=32)
    assert (reach.adapted, reach.linears) == (linears, linears)
    assert reach.adapted_weights == reach.linear_weights


@torch.no_grad()
def test_the_edit_teachers_prediction_depends_on_the_image_and_not_on_its_suffix_alone(
    klein, text_encoder, denoiser
):
    z, t = noise_for([0, 1], klein.channels, 4, 4).start, torch.tensor([1.0, 0.9])
    plain = text_encoder.context(PROMPTS[:2])
    seeing = text_encoder.context(PROMPTS[:2], [noisy_image(seed, 64, 64) for seed in (3, 4)])
    assert plain.layout == () and seeing.layout == (("reference_0", (klein.channels, 4, 4)),)
    assert (denoiser(z, t, seeing) - denoiser(z, t, plain)).abs().mean() > 0.05
    suffixed = text_encoder.context([f"{prompt} {SUFFIX}" for prompt in PROMPTS[:2]])
    assert torch.equal(seeing.tokens, suffixed.tokens)
    assert (denoiser(z, t, seeing) - denoiser(z, t, suffixed)).abs().mean() > 0.05
    without = replace(seeing, extras={})
    assert torch.equal(denoiser(z, t, without), denoiser(z, t, suffixed))
    assert torch.equal(
        denoiser(z, t, text_encoder.context(PROMPTS[:2], references=[[], []])),
        denoiser(z, t, plain),
    )


def test_with_references_the_teacher_sees_the_target_last_at_its_own_size(klein, text_encoder):
    target = noisy_image(5, 96, 64)
    seeing = text_encoder.context(PROMPTS[:1], [target], [REFERENCES])
    assert [shape for _, shape in seeing.layout] == [(16, 8, 5), (16, 4, 9), (16, 4, 6)]
    latents = klein.load_vae(CPU, torch.float32).latents(
        text_encoder._pixels(target, target.size)[None]
    )
    torch.testing.assert_close(seeing.extras["reference_2"], latents)
    assert torch.equal(seeing.tokens, text_encoder.context([f"{PROMPTS[0]} {LAST_SUFFIX}"]).tokens)


def test_the_teachers_suffix_can_be_set(folder):
    for suffix, prompt in (("as it is", "a star as it is"), ("", "a star")):
        family = load_family(str(folder), teacher_vision=TeacherVision(suffix=suffix))
        assert family.edit_prompt("a star", False) == family.edit_prompt("a star", True) == prompt


def test_dopsd_takes_the_official_times_and_sends_no_gradient_through_the_teachers_image(
    klein, text_encoder
):
    """With the roles that a run has. The student's own reference would get a gradient, if it asked
    for one."""
    shown, target = noisy_image(7, 64, 64), noisy_image(6, 64, 64)
    own, privileged = (
        text_encoder.context(PROMPTS[:1], None, [[shown]]),
        text_encoder.context(PROMPTS[:1], [target], [[shown]]),
    )
    ours, theirs = (
        {name: latents.clone().requires_grad_(True) for name, latents in each.extras.items()}
        for each in (own, privileged)
    )
    assert list(ours) == ["reference_0"] and list(theirs) == ["reference_0", "reference_1"]
    denoiser = klein.load_denoiser(CPU, torch.float32)
    student = add_lora(denoiser.network, klein.lora_targets, rank=2, alpha=2, seed=0)
    teacher = Teacher(student, 0.9999)
    roles, seen = (
        make_roles(denoiser, student, teacher, lambda nfe, h, w: klein.schedule(nfe or 4, h, w)),
        [],
    )

    def watched(z, t, context):
        seen.append(t[0].clone())
        return roles.student(z, t, context)

    batch = Batch(
        torch.zeros(1, klein.channels, 4, 4),
        replace(own, extras=ours),
        tuple(PROMPTS[:1]),
        torch.ones(1),
        replace(privileged, extras=theirs),
    )
    for piece in DOPSD().losses(
        replace(roles, student=watched), batch, torch.Generator().manual_seed(0)
    ):
        piece.surrogate.backward()
    assert torch.equal(torch.stack(seen), klein.schedule(4, 4, 4).times[:-1])
    assert (
        all(latents.grad is None for latents in theirs.values()) and ours["reference_0"].grad.any()
    )
    assert any(parameter.grad.any() for parameter in student.values())


@pytest.fixture(scope="module")
def by_vlm(folder) -> KleinTextEncoder:
    return load_family(str(folder), teacher_vision=TeacherVision("vlm")).load_text_encoder(
        CPU, torch.float32, images=True
    )


@torch.no_grad()
def test_the_vlm_teacher_takes_the_same_layers_and_the_padding(by_vlm, text_encoder):
    assert by_vlm.text.text_gap == 0  # although the VLM's own rotary base differs
    red, blue = (Image.new("RGB", (64, 64), colour) for colour in ("red", "blue"))
    context = by_vlm.context(PROMPTS[:1], [red])
    assert context.lengths == (512 + 16,) and context.layout == ()
    assert (context.tokens - by_vlm.context(PROMPTS[:1], [blue]).tokens).abs().max() > 1e-3
    # What precedes the image is encoded as the text encoder does.
    torch.testing.assert_close(
        context.tokens[:, :2], text_encoder.context([""]).tokens[:, :2], atol=2e-6, rtol=1e-5
    )
    with_references = by_vlm.context(PROMPTS[:1], [red], [REFERENCES[:1]])
    assert torch.equal(with_references.tokens, context.tokens) and len(with_references.layout) == 1


@torch.no_grad()
def test_padding_beside_an_image_has_the_positions_after_the_prompt_as_in_the_text_encoder(by_vlm):
    """Text alone, padded, through the VLM's own path for images' rows: the states of the text
    encoder."""
    text = by_vlm.text
    tokens = text._tokens([PROMPTS[0]], 512)
    places, _ = text.vlm.get_rope_index(tokens.input_ids, torch.zeros_like(tokens.input_ids).int())
    seeing = text._states(
        text.vlm.language_model(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            position_ids=places,
            output_hidden_states=True,
        )
    )
    plain = text._states(text.encoder(**tokens, output_hidden_states=True))
    torch.testing.assert_close(seeing, plain, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_rows_of_several_lengths_are_run_without_padding(by_vlm, klein, denoiser):
    short, long = (by_vlm.context(["a star"], [noisy_image(1, side, side)]) for side in (64, 64))
    long = replace(
        long,
        tokens=torch.cat([long.tokens, long.tokens[:, -5:]], dim=1),
        lengths=(long.lengths[0] + 5,),
    )
    z, t = noise_for([0, 1], klein.channels, 4, 4).start, torch.tensor([1.0, 1.0])
    together = denoiser(z, t, type(short).stack([short, long]))
    alone = torch.cat([denoiser(z[:1], t[:1], short), denoiser(z[1:], t[1:], long)])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("teacher_vision", [TeacherVision("edit"), TeacherVision("vlm")])
@pytest.mark.parametrize("shown", [(), REFERENCES])
def test_blank_contexts_have_the_shapes_of_real_ones(
    folder, text_encoder, by_vlm, teacher_vision, shown
):
    family = load_family(str(folder), teacher_vision=teacher_vision)
    encoder = text_encoder if teacher_vision.context == "edit" else by_vlm
    rows = [list(shown)] * 2 if shown else None
    sizes = [[image.size for image in row] for row in rows] if rows else None
    target = noisy_image(5, 96, 64)
    for images, seen in ((None, None), ([target] * 2, [target.size] * 2)):
        blank = family.blank_context(PROMPTS[:2], seen, sizes)
        real = encoder.context(PROMPTS[:2], images, rows)
        assert (blank.tokens.shape, blank.lengths, blank.layout) == (
            real.tokens.shape,
            real.lengths,
            real.layout,
        )


def test_an_incomplete_or_many_step_klein_is_recognised_by_its_configs(tmp_path, folder):
    assert not load_family(str(write_klein(tmp_path / "base", distilled=False))).distilled
    with pytest.raises(
        ValueError, match=r"after layers 9, 18, 27 of its text encoder; this one has 12"
    ):
        load_family(str(write_klein(tmp_path / "shallow", layers=12)))
    shutil.copytree(folder, tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "vae")
    with pytest.raises(ValueError, match="lacks the folder vae"):
        load_family(str(tmp_path / "parts"))


def test_a_vlm_that_encodes_text_differently_is_refused(tmp_path, folder):
    vlm = write_vlm(tmp_path / "vlm", TEXT | {"rms_norm_eps": 10.0})
    family = load_family(str(folder), teacher_vision=TeacherVision("vlm", str(vlm)))
    with pytest.raises(
        ValueError,
        match="encodes a text without an image differently from the checkpoint's text encoder",
    ):
        family.load_text_encoder(CPU, torch.float32, images=True)


def test_a_vlm_of_another_size_is_refused(tmp_path, folder):
    vlm = write_vlm(tmp_path / "vlm", TEXT | {"num_hidden_layers": 30})
    family = load_family(str(folder), teacher_vision=TeacherVision("vlm", str(vlm)))
    with pytest.raises(
        ValueError, match=r"text encoder: num_hidden_layers 30, not 28\. Set model\.vlm"
    ):
        family.count_tokens(PROMPTS, [(64, 64)] * len(PROMPTS))
    with pytest.raises(
        ValueError, match=r"does not match the checkpoint's text encoder in layers\.28.*model\.vlm"
    ):
        family.load_text_encoder(CPU, torch.float32, images=True)


def test_a_caption_over_the_limit_is_refused_not_truncated(klein, text_encoder):
    for refuse in (
        lambda: text_encoder.context(["star " * 600]),
        lambda: klein.count_tokens(["star " * 600]),
    ):
        with pytest.raises(ValueError, match="the limit is 512"):
            refuse()


FORMS = {
    "ours": ("transformer.", "lora_A", "lora_B", False),
    "with alpha": ("transformer.", "lora_A", "lora_B", True),
    "ComfyUI's": ("diffusion_model.", "lora_A", "lora_B", False),
    "ComfyUI's with alpha": ("diffusion_model.", "lora_A", "lora_B", True),
    "down and up": ("diffusion_model.", "lora_down", "lora_up", True),
    "bare names": ("", "lora_A", "lora_B", False),
    "raw PEFT": ("base_model.model.", "lora_A", "lora_B", False),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_public_form_of_one_adapter_reads_as_the_same_deltas(klein, tmp_path, form):
    prefix, down, up, alpha = FORMS[form]
    generator, expected, tensors = torch.Generator().manual_seed(0), {}, {}
    for module in (
        "transformer_blocks.0.attn.add_q_proj",
        "transformer_blocks.1.ff.linear_in",
        "single_transformer_blocks.2.attn.to_out",
    ):
        a, b = torch.randn(4, 6, generator=generator), torch.randn(5, 4, generator=generator)
        expected[module] = b.double() @ a.double() * 2
        tensors |= {
            f"{prefix}{module}.{down}.weight": a,
            f"{prefix}{module}.{up}.weight": b if alpha else b * 2,
        }
        tensors |= {f"{prefix}{module}.alpha": torch.tensor(8.0)} if alpha else {}
    save_file(tensors, tmp_path / "lora.safetensors")
    pairs = read_lora(tmp_path / "lora.safetensors", klein)
    assert pairs.keys() == expected.keys()
    for module, delta in expected.items():
        torch.testing.assert_close(pairs[module].dense(), delta)


def test_another_teacher_context_has_another_cache_key(text_encoder, by_vlm, folder):
    other = load_family(
        str(folder), teacher_vision=TeacherVision(suffix="as it is")
    ).load_text_encoder(CPU, torch.float32, images=True)
    assert len({text_encoder.fingerprint, by_vlm.fingerprint, other.fingerprint}) == 3


def test_sampling_takes_four_forwards(klein, text_encoder):
    states = list(
        rollout(
            lambda z, t, c: z,
            noise_for([0], 16, 4, 4).start,
            klein.schedule(klein.default_nfe, 4, 4),
            text_encoder.context(PROMPTS[:1]),
        )
    )
    assert len(states) == 4
