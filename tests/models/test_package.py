"""Packages and where they come from: what is refused, and what is downloaded once."""

import hashlib
import http.server
import json
import re
import struct
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save, save_file
from torch import nn

from Models import DeepEMD
from Models.conv4 import Conv4
from Models.package import find_record, locate, weights_file
from Models.weights import load_encoder_weights
from utils import InputError

BIAS, VARIANCE = "norm.bias", "norm.running_var"
COMMIT = "c0ffee" * 6 + "abcd"


class Tiny(nn.Module):
    """An encoder whose packages are written quickly."""

    out_channels = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, kernel_size=1, bias=False), nn.BatchNorm2d(4)


def write_package(folder: Path, tensors: dict[str, torch.Tensor] | bytes, **changes) -> Path:
    """A package of these weights, with changes of its config.json; None leaves an entry out."""
    folder.mkdir(parents=True, exist_ok=True)
    content = tensors if isinstance(tensors, bytes) else save(tensors)
    (folder / "model.safetensors").write_bytes(content)
    config = {"format": 1, "backbone": "resnet12", "flags": {}, "mean": [0.5] * 3, "std": [0.25, 0.5, 1], "results": []}
    config |= {"weights": {"sha256": hashlib.sha256(content).hexdigest()}} | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return folder


@pytest.fixture
def model() -> nn.Module:
    return Tiny()


@pytest.fixture
def state(model) -> dict[str, torch.Tensor]:
    return {key: value + 0.5 if value.is_floating_point() else value for key, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["", "model.safetensors"])
def test_a_package_loads(tmp_path, model, state, dtype, name):
    state = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    write_package(tmp_path, state)
    load_encoder_weights(model, tmp_path / name)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key].to(value.dtype))
        assert value.dtype in (torch.float32, torch.int64)


def test_a_safetensors_file_alone_is_a_checkpoint(tmp_path, model, state):
    """With the prefixes of checkpoints; also under another name, as a server may give it."""
    for name in ("some.safetensors", "some.bin"):
        save_file({f"module.encoder.{key}": value + 1 for key, value in state.items()}, tmp_path / name)
        load_encoder_weights(model, tmp_path / name)
        assert torch.equal(model.norm.bias, state[BIAS] + 1)


def test_a_model_takes_the_statistics_of_a_package(tmp_path):
    model, statistics = DeepEMD(encoder=Conv4(), norm="standard"), torch.arange(1.0, 65)
    keys = {"base_statistics.mean": -statistics, "base_statistics.deviation": statistics}
    write_package(tmp_path, {**model.encoder.state_dict(), **keys})
    load_encoder_weights(model, tmp_path)
    assert torch.equal(model.settings.statistics.mean, -statistics)
    assert torch.equal(model.settings.statistics.deviation, statistics)
    load_encoder_weights(model.encoder, tmp_path)  # which has no use for them
    write_package(tmp_path, {**model.encoder.state_dict(), **{key: value[1:] for key, value in keys.items()}})
    with pytest.raises(InputError, match="the statistics are of 63 channels"):
        load_encoder_weights(model, tmp_path)
    write_package(tmp_path, model.encoder.state_dict(), flags={"norm": "standard"})
    assert "a mean and a deviation are needed; there is neither" in refusal(model, tmp_path)


def refusal(model: nn.Module, source: Path | str) -> str:
    """The message with which a package is refused: one line, and the model is unchanged."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(InputError) as error:
        load_encoder_weights(model, source)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    return str(error.value)


def filled(state, key, value):
    return {**state, key: torch.full_like(state[key], value)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != BIAS}, "it lacks norm.bias"),
        (lambda s: {**s, "extra": torch.ones(1)}, "it has unknown extra"),
        (lambda s: {**s, "fc.weight": torch.ones(1)}, "it has unknown fc.weight"),
        (lambda s: {f"encoder.{k}": v for k, v in s.items()}, "it lacks conv.weight"),
        (lambda s: {**s, BIAS: torch.ones(5)}, "norm.bias is (5,), not (4,)"),
        (lambda s: {**s, BIAS: torch.ones(4, dtype=torch.int32)}, "norm.bias is a torch.int32 tensor"),
        (lambda s: filled(s, BIAS, float("nan")), "norm.bias has NaN or infinite"),
        (lambda s: filled(s, VARIANCE, -1), "norm.running_var has negative"),
        (lambda s: {**s, "base_statistics.mean": torch.ones(4)}, "base_statistics cannot be used"),
        (lambda s: {**s, "base_statistics.x": torch.ones(4)}, "base_statistics cannot be used"),
        *(
            (
                lambda s, bad=bad: {**s, "base_statistics.mean": torch.ones(4), "base_statistics.deviation": bad},
                "be used",
            )
            for bad in (torch.ones(3), torch.zeros(4), torch.full((4,), float("inf")), torch.ones(4, 1))
        ),
    ],
)
def test_packages_of_other_weights_are_refused(tmp_path, model, state, change, message):
    assert message in refusal(model, write_package(tmp_path, change(state)))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda c: c[:-1], "not a safetensors file"),
        (lambda c: c[: len(c) // 2], "not a safetensors file"),
        (lambda c: c[:4], "not a safetensors file"),
        (lambda c: b"", "not a safetensors file"),
        (lambda c: struct.pack("<Q", 2**62) + c[8:], "not a safetensors file"),
        (lambda c: struct.pack("<Q", 99_999_999) + c[8:], "not a safetensors file"),
        (lambda c: c + b"0", "not a safetensors file"),
        (lambda c: c.replace(b"F32", b"F33"), "not a safetensors file"),
        (lambda c: c.replace(b'"data_offsets":[0', b'"data_offsets":[9'), "not a safetensors file"),
        (lambda c: b"\x80\x02}q\x00." * 9, "not a safetensors file"),
    ],
)
def test_damaged_weights_are_refused(tmp_path, model, state, damage, message):
    """With a hash that fits, and by the hash where it was made of the whole file."""
    whole = save(state)
    assert damage(whole) != whole
    assert message in refusal(model, write_package(tmp_path, damage(whole)))
    write_package(tmp_path, whole)
    (tmp_path / "model.safetensors").write_bytes(damage(whole))
    assert "its SHA-256 is" in refusal(model, tmp_path)


def test_a_flipped_bit_is_noticed(tmp_path, model, state):
    content = bytearray(save(state))
    write_package(tmp_path, bytes(content))
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "is damaged, or not the file of its config.json" in refusal(model, tmp_path)


FLAGS = {"backbone": "resnet12", "deepemd": "fcn", "image_size": 84}
RESULT = {"flags": {}, "dataset": "cub", "set": "test", "way": 5, "shot": 1, "episodes": 3}
RESULT |= {"accuracy": 1.0, "interval": 0.0}


@pytest.mark.parametrize(
    "changes",
    [
        *({"format": 2}, {"format": None}, {"mean": None}, {"mean": [1, 2]}, {"std": [0, 1, 1]}, {"std": "abc"}),
        *(
            {"format": True},
            {"mean": 3},
            {"std": [1e-9, 1, 1]},
            {"std": [1, 1, 1e9]},
            {"head": 3},
            {"data": {"set": 3}},
        ),
        *({"flags": {"norm": "none"}, "head": {"norm": "center"}}, {"results": [RESULT | {"accuracy": 101.0}]}),
        *({"mean": [float("nan")] * 3}, {"weights": {}}, {"weights": {"sha256": "../../x"}}, {"weights": 3}),
        *({"flags": None}, {"flags": []}, {"backbone": 3}, {"results": {}}),
        *({"mean": [10**400, 0, 0]}, {"data": 3}, {"versions": []}, {"license": {}}, {"image_size": 3, "flags": FLAGS}),
        *({"backbone": "conv4", "flags": FLAGS}, {"view": "grid", "flags": FLAGS}, {"results": [3]}, {"results": [{}]}),
        *({"results": [RESULT | wrong]} for wrong in ({"accuracy": float("nan")}, {"flags": 3}, {"way": "x"})),
        {"weights": {"sha256": "0" * 64, "checkpoint": []}},
    ],
)
def test_a_wrong_description_is_refused(tmp_path, model, state, changes):
    message = refusal(model, write_package(tmp_path, state, **changes))
    assert message.startswith(f"{tmp_path}/config.json is damaged, or not the description of a package")
    assert "object" not in message  # Python's own words


def test_flags_that_are_missing_are_those_of_the_other_entries(tmp_path, state):
    parts = {"image_size": 32, "view": "grid", "head": {"norm": "none", "sfc_lr": 3.0}, "flags": {"kshot": "mean"}}
    _, flags = find_record(str(write_package(tmp_path, state, **parts)))
    found = {
        "kshot": "mean",
        "backbone": "resnet12",
        "deepemd": "grid",
        "image_size": 32,
        "norm": "none",
        "sfc_lr": 3.0,
    }
    assert flags == found


def test_an_incomplete_package_is_refused(tmp_path, model, state):
    write_package(tmp_path, state)
    config = (tmp_path / "config.json").read_text()
    for content in ("", "[]", "null", "3", config[:-3], "[" * 100_000):
        (tmp_path / "config.json").write_text(content)
        assert "not the description of a package" in refusal(model, tmp_path)
    with pytest.raises(InputError, match="not the description of a package"):
        find_record(str(tmp_path))
    (tmp_path / "config.json").unlink()
    assert "is not a complete package: it has no config.json" in refusal(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "config.json").write_text(config)
    assert refusal(model, tmp_path) == f"no checkpoint at {tmp_path}/model.safetensors."
    with pytest.raises(InputError, match="is not a complete package: it has no model.safetensors"):
        find_record(str(tmp_path))


def test_a_run_in_the_same_folder_is_preferred(tmp_path, model, state):
    write_package(tmp_path, state)
    (tmp_path / "max_acc.pth").write_bytes(b"")
    assert weights_file(tmp_path) == tmp_path / "max_acc.pth"


# --- Downloads --------------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Files under ``root``: as they are, and as the Hub serves those of ``<owner>/<name>`` at one commit."""

    root: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        self.asked.append(f"{self.command} {self.path} {self.headers.get('Authorization', '')}".strip())
        status, kind, path = 200, "", self.root / self.path.strip("/")
        if found := re.fullmatch("/(.+)/resolve/(.+?)/(.+)", self.path):
            repository, revision, name = found.groups()
            path = self.root / repository / name
            if not path.parent.is_dir():
                status, kind = 401, "RepoNotFound"
            elif revision not in ("main", COMMIT):
                status, kind = 404, "RevisionNotFound"
        if status == 200 and not path.is_file():
            status, kind = 404, "EntryNotFound"
        if self.path == "/no-http":
            self.wfile.write(b"something else\r\n\r\n")
            return
        content = path.read_bytes() if status == 200 else b""
        self.send_response(status)
        for header, value in (("X-Error-Code", kind), ("X-Repo-Commit", COMMIT), ("Content-Length", len(content))):
            self.send_header(header, value)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of ``tmp_path/served``, which is also the Hub, and what it was asked for."""
    root, asked = tmp_path / "served", []
    root.mkdir()
    handler = type("Handler", (Server,), {"root": root, "asked": asked})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HF_TOKEN", "secret")
    locate.cache_clear()
    yield address, root, asked
    running.shutdown()
    running.server_close()
    locate.cache_clear()


def files_of(asked: list[str], kind: str = "GET") -> list[str]:
    return [line.split()[1] for line in asked if line.startswith(kind) and "/resolve/" in line]


def test_a_package_of_the_hub_is_downloaded_once(server, model, state):
    """Of one commit, and only what is needed; HF_TOKEN is sent."""
    _, root, asked = server
    write_package(root / "me/mine", state)
    (root / "me/mine/other.safetensors").write_bytes(b"x")
    for source in ("hf://me/mine", "hf://me/mine@main", f"hf://me/mine@{COMMIT}"):
        load_encoder_weights(model, source)
        assert torch.equal(model.norm.bias, state[BIAS])
        locate.cache_clear()
    assert files_of(asked) == ["/me/mine/resolve/main/config.json", f"/me/mine/resolve/{COMMIT}/model.safetensors"]
    assert all(line.endswith("Bearer secret") for line in asked if "/resolve/" in line)
    (locate("hf://me/mine") / "model.safetensors").resolve().write_bytes(b"damaged")
    locate.cache_clear()
    load_encoder_weights(model, "hf://me/mine")


def test_a_package_that_was_downloaded_needs_no_network(server, monkeypatch, model, state):
    _, root, asked = server
    write_package(root / "me/mine", state)
    locate("hf://me/mine")
    locate.cache_clear()
    asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load_encoder_weights(model, "hf://me/mine")
    assert "cannot get hf://me/other. It is not in the cache, and" in refusal(model, "hf://me/other")
    assert not asked


def test_what_the_hub_does_not_have_is_said_in_a_line(server, model, state):
    _, root, asked = server
    write_package(root / "me/mine", state, format=7)
    (root / "me/empty").mkdir()
    assert "no such repository, or this is not allowed to see it" in refusal(model, "hf://me/none")
    assert "It has no such revision" in refusal(model, "hf://me/mine@v9")
    assert "It is not a package of export.py" in refusal(model, "hf://me/empty")
    assert "hf://me/mine is not a package that this version reads" in refusal(model, "hf://me/mine")
    assert not [path for path in files_of(asked, "") if path.endswith(".safetensors")]


@pytest.mark.parametrize(
    "name", ["a", "../a/b", "a/..", "a/b/c", "a/b@", "a/b@../c", "a/b@x/../c", "a/b@x y", "/etc/passwd", "a/b?x=1"]
)
def test_names_that_the_hub_cannot_have_are_not_asked_for(model, name):
    assert "is not the name of a package" in refusal(model, f"hf://{name}")


def test_a_file_from_a_server_is_downloaded_once_by_its_hash(server, model, state):
    address, root, asked = server
    for name, write in (
        ("a.safetensors", save_file),
        ("b.pth", lambda params, path: torch.save({"params": params}, path)),
    ):
        write(state, root / name)
        digest = hashlib.sha256((root / name).read_bytes()).hexdigest()
        for _ in range(2):
            load_encoder_weights(model, f"{address}/{name}#sha256={digest}")
            assert torch.equal(model.norm.bias, state[BIAS])
            locate.cache_clear()
        locate(f"{address}/{name}#sha256={digest}").write_bytes(b"damaged")
        locate.cache_clear()
        load_encoder_weights(model, f"{address}/{name}#sha256={digest}")
        assert len([line for line in asked if name in line]) == 2


def test_a_wrong_hash_keeps_nothing(server, model, tmp_path, state):
    address, root, _ = server
    save_file(state, root / "a.safetensors")
    message = refusal(model, f"{address}/a.safetensors#sha256={'0' * 64}")
    assert "is not the file of that SHA-256; the download was removed" in message
    assert not [path for path in (tmp_path / "torch").rglob("*") if path.is_file()]
    assert "HTTP Error 404" in refusal(model, f"{address}/b.pth#sha256={'0' * 64}")
    assert "cannot download" in refusal(model, f"{address}/no-http#sha256={'0' * 64}")
    assert "cannot download" in refusal(model, f"https://localhost:no-port/a#sha256={'0' * 64}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://a.b/c.pth", "write -model_dir 'https://a.b/c.pth#sha256=<64 digits>'"),
        ("https://a.b/c.pth#sha256=123", "need their SHA-256"),
        ("https://a.b/c.pth#" + "0" * 63, "need their SHA-256"),
        ("http://a.b/c.pth#sha256=" + "0" * 64, "over https://"),
        ("http://localhost.evil.com/c.pth#sha256=" + "0" * 64, "over https://"),
        ("file:///etc/passwd#sha256=" + "0" * 64, "over https://"),
        ("s3://a/b", "over https://"),
    ],
)
def test_addresses_that_are_not_safe_are_refused(model, source, message):
    assert message in refusal(model, source)
