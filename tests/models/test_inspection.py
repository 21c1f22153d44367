"""What `dopsd inspect` reports of LoRA files and of a model's folder."""

from pathlib import Path

import pytest
from lora_files import FORMS, MODULES, RANK
from safetensors.torch import save_file

from dopsd.models.inspection import inspect_lora, inspect_model


@pytest.fixture(params=FORMS)
def file(request, tmp_path: Path) -> Path:
    make, metadata = FORMS[request.param]
    save_file(make(), tmp_path / "lora.safetensors", metadata)
    return tmp_path / "lora.safetensors"


def test_inspect_reports_family_rank_and_loaders_of_every_public_form(file, request):
    lines = dict(inspect_lora(file).lines)
    assert (lines["family"], lines["rank"], lines["modules"]) == (
        "zimage",
        str(RANK),
        str(len(MODULES)),
    )
    expected = {
        "ours": "strength 1",
        "scale in the metadata": "strength 1",
        "with alpha": "error",
        "bare names": "nothing is loaded, without a message",
        "raw PEFT": "nothing is loaded, without a message",
    }
    form = request.node.callspec.params["file"]
    assert lines["diffusers"].partition(":")[0] == expected.get(form, "strength 1")


def test_inspect_reports_the_network_of_a_models_folder(pocket):
    lines = dict(inspect_model(pocket.checkpoint.folder).lines)
    network = pocket.empty_denoiser().network
    millions = sum(tensor.numel() for tensor in network.state_dict().values()) / 1e6
    count = len(network.state_dict())
    assert lines["family"] == "zimage" and lines["dtype"] == "bfloat16"
    assert lines["network"] == f"{millions:.2f} M weights in {count} tensors"
    assert lines["tuned by dopsd"] == "no, or it is not recorded"
