"""Checkpoints by hub id, from a local HTTP server: fetched part by part, cached, refused with a
sentence."""

import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from transformers.utils import logging as transformers_logging

from dopsd.models import load_family
from dopsd.pocket import CHECKPOINT as POCKET

COMMIT = "c" * 40
FILES = {
    p.relative_to(POCKET).as_posix(): p
    for p in POCKET.rglob("*")
    if p.is_file() and "parent" not in p.parts
}
REFUSED = {
    "gated/model": (403, "GatedRepo"),
    "missing/model": (404, "RepoNotFound"),
    "broken/model": (500, None),
}


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that its client uses."""

    def __init__(self, *arguments, requested: list[str]):
        self.requested = requested
        super().__init__(*arguments)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.partition("?")[0].strip("/").removeprefix("api/models/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in REFUSED:
            status, code = REFUSED[repo]
            self.answer(status, b"{}", {"X-Error-Code": code} if code else {})
        elif rest[:1] == ["revision"]:
            known = rest[1] in ("main", COMMIT)
            about = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in FILES]}
            self.answer(
                200 if known else 404,
                json.dumps(about).encode(),
                {} if known else {"X-Error-Code": "RevisionNotFound"},
            )
        elif rest[:1] == ["tree"]:
            tree = [
                {"type": "file", "path": n, "size": p.stat().st_size, "oid": _oid(p)}
                for n, p in FILES.items()
            ]
            self.answer(200, json.dumps(tree).encode(), {})
        elif rest[:1] == ["resolve"]:
            name = "/".join(rest[2:])
            if name not in FILES:
                self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
                return
            if self.command == "GET":
                self.requested.append(name)
            self.answer(
                200,
                FILES[name].read_bytes(),
                {"ETag": f'"{_oid(FILES[name])}"', "X-Repo-Commit": COMMIT},
            )
        else:
            self.answer(404, b"{}", {})

    def answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(content)),
            "Content-Type": "application/json",
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _oid(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture()
def hub() -> Iterator[tuple[str, list[str]]]:
    """Its address, and the names of the files requested so far."""
    requested: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, requested=requested))
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}", requested
    server.shutdown()
    server.server_close()


def run(code: str, home: Path, endpoint: str, **environment: str) -> str:
    """The output of a fresh process: the hub's client reads its settings when it is imported."""
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | settings | environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


OPEN = """
from dopsd.models import load_family
for name, revision in {cases!r}:
    try:
        family = load_family(name, revision=revision)
        print("opened", family.channels)
    except ValueError as error:
        print(error)
"""


def test_a_hub_checkpoint_opens_by_its_configs_and_fetches_weights_when_needed(hub, tmp_path):
    endpoint, requested = hub
    run(OPEN.format(cases=[("tiny/zimage", None)]), tmp_path, endpoint)
    assert requested and not [name for name in requested if name.endswith(".safetensors")]
    sample = (
        "from dopsd import sample; "
        "local, hub = (sample(name, ['a toy'])[0] for name in ('pocket', 'tiny/zimage')); "
        "print(local.tobytes() == hub.tobytes())"
    )
    assert run(sample, tmp_path, endpoint).split() == ["True"]
    weights = {name for name in requested if name.endswith(".safetensors")}
    assert {Path(name).parts[0] for name in weights} == {
        "transformer",
        "vae",
        "text_encoder",
    }  # no VLM
    assert len(requested) == len(set(requested)), "a file was fetched twice"
    assert run(sample, tmp_path, endpoint, HF_HUB_OFFLINE="1").split() == ["True"]


def test_every_error_of_the_hub_is_one_sentence(hub, tmp_path):
    cases = [
        ("gated/model", None),
        ("missing/model", None),
        ("tiny/zimage", "v9"),
        ("broken/model", None),
        ("no name/at all", None),
        ("tiny/zimage/x", None),
    ]
    lines = run(OPEN.format(cases=cases), tmp_path, hub[0]).splitlines()
    expected = [
        "gated: accept its licence",
        "neither a local folder nor a repository",
        "has no revision v9",
        "could not be reached",
        "nor a valid name on the hub",
        "does not exist",
    ]
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected, strict=True):
        assert words in line


def test_a_file_on_the_hub_is_checked_without_fetching_it(hub, tmp_path):
    endpoint, requested = hub
    code = """
from dopsd.models.hub import weights_here
for name in ("tiny/zimage/vae/diffusion_pytorch_model.safetensors",
             "tiny/zimage/lora.safetensors", "missing/model/lora.safetensors",
             "gated/model/lora.safetensors", "./lora.safetensors"):
    try:
        print(weights_here(name, "model.distilled_by"))
    except ValueError as error:
        print(error)
"""
    lines = run(code, tmp_path, endpoint).splitlines()
    expected = [
        "None",
        "there is no lora.safetensors in tiny/zimage",
        "there is no lora.safetensors in missing/model",
        "gated: accept its licence",
        "./lora.safetensors does not exist",
    ]
    assert len(lines) == len(expected) and not requested
    for line, words in zip(lines, expected, strict=True):
        assert words in line


def test_a_gated_model_is_refused_with_advice_and_exit_code_2(hub, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: {name_or_path: gated/model}\n"
        f"data: {{folder: {tmp_path}}}\n"
        "method: {name: sft}\n",
        encoding="utf-8",
    )
    code = (
        "from typer.testing import CliRunner; from dopsd.cli.app import app; "
        f"done = CliRunner().invoke(app, ['check', {str(recipe)!r}]); "
        "print(done.exit_code, done.output)"
    )
    output = " ".join(run(code, tmp_path, hub[0]).split())
    assert (
        output
        == "2 dopsd: gated/model is gated: accept its licence on the hub, then run `hf auth login`."
    )


def test_offline_an_incomplete_checkpoint_in_the_cache_is_refused(hub, tmp_path):
    endpoint, _ = hub
    run(OPEN.format(cases=[("tiny/zimage", None)]), tmp_path, endpoint)
    (config,) = tmp_path.rglob("snapshots/*/vae/config.json")
    config.unlink()
    cases = [("tiny/zimage", None), ("other/model", None)]
    lines = run(OPEN.format(cases=cases), tmp_path, endpoint, HF_HUB_OFFLINE="1").splitlines()
    assert len(lines) == 2 and all("not complete in the hub's cache" in line for line in lines)


def test_a_full_disk_is_one_sentence(monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(
        ValueError, match=r"no space left for tiny/zimage: .* GiB are free .* HF_HOME"
    ):
        load_family("tiny/zimage")


def test_libraries_are_quiet_only_while_a_part_is_read(pocket, capfd):
    logger = logging.getLogger("transformers")
    logger.setLevel(logging.WARNING)
    with pocket.checkpoint.reading("vae"):
        assert not transformers_logging.is_progress_bar_enabled()
        logger.warning("a library's warning")
    assert transformers_logging.is_progress_bar_enabled() and logger.level == logging.WARNING
    pocket.load_text_encoder(torch.device("cpu"), torch.float32, images=True)
    assert capfd.readouterr() == ("", "")
