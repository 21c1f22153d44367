"""`dopsd doctor`: what is installed and which devices there are. Changes nothing."""

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors")
EXTRAS = {
    "datasets": "`dopsd import` of hub data sets (pip install 'dopsd[data]')",
    "bitsandbytes": "model.quantize (pip install 'dopsd[quantize]')",
    **{
        name: f"track.to: {name} (pip install 'dopsd[{name}]')"
        for name in ("tensorboard", "trackio", "wandb")
    },
}
ROOM = 40  # GiB on disk: a 6 B model in bf16 with its text encoder and the teacher's VLM


def examine() -> Iterator[tuple[str, str]]:
    """Label and value of each line."""
    yield "dopsd", f"{version('dopsd')}, Python {platform.python_version()}, {platform.platform()}"
    for package in PACKAGES:
        yield package, version(package)
    for package, purpose in EXTRAS.items():
        yield package, _version_or_none(package) or f"not installed; needed for {purpose}"
    yield from _devices()
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    yield (
        "free disk here",
        f"{free:.0f} GiB" + ("" if free > ROOM else f"; a 6 B model needs about {ROOM} GiB"),
    )
    yield from _hub()
    yield from _platform_notes()


def _version_or_none(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield f"GPU {index}", f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    if torch.backends.mps.is_available():
        yield "GPU", "Apple, through MPS (not tested by this project)"
    elif not torch.cuda.is_available():
        yield "GPU", "none: the pocket model trains on this CPU, larger models need a GPU"
    yield "CPU", f"cores: {os.cpu_count()}, threads that torch uses: {torch.get_num_threads()}"


def _hub() -> Iterator[tuple[str, str]]:
    from huggingface_hub import HfApi, constants, get_token

    yield "hub cache", str(constants.HF_HUB_CACHE)
    if constants.HF_HUB_OFFLINE:
        yield (
            "hub",
            "offline by HF_HUB_OFFLINE: local folders and the cache can be opened",
        )
        return
    token = get_token()
    try:
        name = HfApi().whoami()["name"] if token else None
    except Exception as error:  # the hub's client raises its own, requests' and the system's errors
        yield (
            "hub",
            f"not reachable, or it refuses the token ({type(error).__name__}); local folders work",
        )
        return
    yield (
        "hub",
        f"logged in as {name}" if name else "not logged in: gated models need `hf auth login`",
    )


def _platform_notes() -> Iterator[tuple[str, str]]:
    if sys.platform == "win32":
        yield "Windows", "runs without WSL; SIGTERM does not exist there, Ctrl-C saves and stops"
    if sys.platform == "darwin":
        yield "macOS", "training runs on MPS or CPU in float32 (set model.dtype: fp32)"
