"""D-OPSD (arXiv:2605.05204) in one file: plain torch and peft, on the pocket model, in a few
minutes on a CPU.

The model is its own teacher. The student walks its own few sampling steps from noise, given only
the prompt. At each state of that rollout the teacher (a moving average of the student's weights) is
asked for its velocity, given the prompt and the target image, and the student's velocity is pulled
there. No target image is ever noised: the student is trained at the states where its few steps take
it, and keeps them.

dopsd provides the model (text encoder, VAE, velocity) and the images; the whole algorithm is here.
`src/dopsd/methods/dopsd.py` and `src/dopsd/training` are the same with all the options.

    python examples/dopsd_in_one_file.py   # runs/one_file/before_and_after.png and zib.safetensors
"""

from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from safetensors.torch import save_file
from torch.func import functional_call

from dopsd.models import load_family
from dopsd.pocket.world.captions import caption_of
from dopsd.pocket.world.scenes import Thing, draw_scene, render

MODEL = "pocket"
UPDATES = 240
NFE = 4  # sampling steps, those that the model is deployed with
LEARNING_RATE = 1e-3
RANK = 16
TEACHER_DECAY = 0.9999  # the paper's
OUT = Path("runs/one_file")

torch.manual_seed(0)

# Four captioned images of a thing that no word describes: only an image can teach it. Things from
# seed 1,000,000 on were never in the pocket model's training.

rng = np.random.default_rng(0)
thing = Thing.from_seed(1_000_003)
scenes = [draw_scene(rng, thing=thing) for _ in range(4)]
images = [Image.fromarray(render(scene)) for scene in scenes]


def caption(scene) -> str:
    stated = {"size": scene.size, "place": scene.place, "background": scene.background}
    return caption_of(stated, thing=True, name="zib")


captions = [caption(scene) for scene in scenes]
unseen = ["a zib big toy in the middle on mint", "a zib small toy at the left on night"]
unrelated = ["a big red boat in the middle on paper", "a small green star at the top on slate"]
OUT.mkdir(parents=True, exist_ok=True)

# The model. z [B, C, h, w] is a state, t [B] its time (1 = noise), the velocity is noise - clean.
# The student reads the prompt, the teacher the prompt and the target image; nothing is encoded
# while training.

device = torch.device("cpu")
family = load_family(MODEL)
text_encoder = family.load_text_encoder(device, torch.float32, images=True)
student_context = text_encoder.context(captions)
teacher_context = text_encoder.context(captions, images)
prompts = [*captions[:2], *unseen, *unrelated]
sample_context = text_encoder.context(prompts)
del text_encoder

vae = family.load_vae(device, torch.float32)
denoiser = family.load_denoiser(device, torch.float32)  # denoiser(z, t, context) -> velocity
side = family.resolution // family.vae_scale_factor
times = family.schedule(NFE, side, side).times  # [NFE + 1], from 1 to 0, as the pipeline's
sample_noise = torch.randn(len(prompts), family.channels, side, side)


@torch.no_grad()
def generate() -> torch.Tensor:
    """The prompts as deployed: NFE Euler steps, always from the same noise. uint8 [B, H, W, 3]."""
    z = sample_noise
    for now, after in pairwise(times):
        z = z + (after - now) * denoiser(z, now.expand(len(z)), sample_context)
    pixels = (vae.pixels(z) / 2 + 0.5).clamp(0, 1)
    return (pixels * 255).round().to(torch.uint8).permute(0, 2, 3, 1)


before = generate()

# The student is a LoRA, whose B is zero at first, so that it starts as the base model. The teacher
# is a copy of the LoRA's few tensors, in float32.

network = denoiser.network.requires_grad_(False)
lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=family.lora_targets)
inject_adapter_in_model(lora, network, adapter_name="student")
student = {name: p for name, p in network.named_parameters() if p.requires_grad}
teacher = {name: p.detach().clone() for name, p in student.items()}
optimizer = torch.optim.AdamW(student.values(), lr=LEARNING_RATE, weight_decay=0.0)

# The algorithm.

for update in range(1, UPDATES + 1):
    z = torch.randn(len(images), family.channels, side, side)
    total = 0.0
    for now, after in pairwise(times):
        t = now.expand(len(z))
        u_student = denoiser(z, t, student_context)
        # The same network under the teacher's tensors: no adapter is ever switched.
        with torch.no_grad():
            under_teacher = {f"network.{name}": tensor for name, tensor in teacher.items()}
            u_teacher = functional_call(denoiser, under_teacher, (z, t, teacher_context))
        loss = (u_student - u_teacher).square().mean() / NFE  # eq. 7
        # Backward at once: gradients add up, and one step's activations are alive instead of NFE.
        loss.backward()
        total += loss.item()
        # On policy: the next state is where the student goes, whatever the teacher says.
        z = z + (after - now) * u_student.detach()
    torch.nn.utils.clip_grad_norm_(student.values(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for name, tensor in teacher.items():
            tensor.lerp_(student[name], 1 - TEACHER_DECAY)
    if update == 1 or update % 20 == 0:
        print(f"update {update}/{UPDATES}  loss {total:.4f}", flush=True)

# What it learned, and a file for ZImagePipeline.load_lora_weights. As alpha = rank, there is no
# scale to multiply in.

rows = [np.concatenate(list(batch.numpy()), axis=1) for batch in (before, generate())]
sheet = Image.fromarray(np.concatenate(rows))
sheet = sheet.resize((256 * len(prompts), 512), Image.Resampling.NEAREST)
sheet.save(OUT / "before_and_after.png")
tensors = {
    f"transformer.{name.replace('.student', '')}": p.detach().contiguous()
    for name, p in student.items()
}
save_file(tensors, OUT / "zib.safetensors", metadata={"format": "pt"})
print(f"{OUT / 'before_and_after.png'}: {'; '.join(prompts)}")
