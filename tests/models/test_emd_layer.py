"""The EMD layer as ``pip install .`` gives it, and through torch.hub."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from safetensors.torch import save_file

from Models import ResNet12
from utils import InputError, file_hash

SETUPTOOLS = "the wheel is built with setuptools 77 or newer, which is not installed"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The content of the wheel, built without network from a copy of what it is made of."""
    try:
        if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
            pytest.skip(SETUPTOOLS)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(SETUPTOOLS)
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "Models", source / "Models", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "utils.py", "deepemd.py"):
        shutil.copy(ROOT / name, source)
    flags = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    command = [sys.executable, "-m", "pip", "wheel", *flags, "-w", str(target), str(source)]
    subprocess.run(command, check=True, timeout=120)
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(code: str, folder: Path, *hidden: str) -> subprocess.CompletedProcess:
    """Code in a new interpreter, in the folder, which cannot import the libraries that are hidden from it."""
    hide = f"import sys; sys.path.insert(0, {str(folder)!r}); sys.modules.update(dict.fromkeys({hidden!r}))\n"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_CACHE_DIR": str(folder / "cache")}
    words = [sys.executable, "-I", "-c", hide + code]
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


EXAMPLE = """
import torch
from emd_layer import MissingLibraryError, emd, scale_to_mass

cost = torch.rand(2, 5, 3, requires_grad=True)
weights = [scale_to_mass(torch.ones(2, n), 1.0) for n in (5, 3)]
"""
OTHERS = (
    "numba",
    "cv2",
    "qpth",
    "scipy",
    "torchvision",
    "PIL",
    "tqdm",
    "matplotlib",
    "psutil",
    "timm",
    "Models",
    "utils",
)


def test_the_wheel_has_the_layer_and_its_cuda_text_and_nothing_else(installed):
    files = {path.name for path in (ROOT / "Models/emd").iterdir() if path.is_file()}
    assert {path.name for path in (installed / "emd_layer").iterdir()} == files
    assert "simplex.cu" in files
    (about,) = installed.glob("*.dist-info")
    assert {path.name for path in installed.iterdir() if path.suffix not in (".whl", "")} == {about.name}
    needed = [line for line in (about / "METADATA").read_text().splitlines() if line.startswith("Requires-Dist")]
    assert [line.split()[1] for line in needed if "extra" not in line] == ["torch>=2.6", "numpy>=1.26"]


def test_it_works_with_torch_and_numpy_alone(installed):
    code = """
value = emd(cost, *weights, solver="ipm").value
value.sum().backward()
assert cost.grad.shape == cost.shape and bool((cost.grad > 0).any())
try:
    emd(cost, *weights, solver="simplex")
except MissingLibraryError as error:
    print(error)
"""
    done = run(EXAMPLE + code, installed, *OTHERS)
    assert done.returncode == 0, done.stderr
    assert "pip install numba" in done.stdout


def test_it_finds_the_libraries_of_its_solvers(installed):
    code = """
found = [emd(cost, *weights, solver=solver).value for solver in ("opencv", "ipm")]
for value in found:
    torch.testing.assert_close(value, found[0], atol=1e-4, rtol=0)
"""
    done = run(EXAMPLE + code, installed, "Models", "utils")
    assert done.returncode == 0, done.stderr


# --- torch.hub ----------------------------------------------------------------------------------------------------------


def hub(entry: str, *words, **settings):
    return torch.hub.load(str(ROOT), entry, *words, source="local", **settings)


def test_the_hub_gives_the_layer():
    cost, weights = torch.rand(2, 5, 3), (torch.full((2, 5), 0.2), torch.full((2, 3), 1 / 3))
    for solver in ("simplex", "ipm"):
        expected = hub("emd")(cost, *weights, solver=solver).value
        assert torch.equal(hub("emd", solver=solver)(cost, *weights).value, expected)


def test_the_hub_needs_torch_and_numpy_alone_for_the_layer():
    code = f"import torch; emd = torch.hub.load({str(ROOT)!r}, 'emd', source='local', solver='ipm')\n"
    code += "one = torch.ones(1, 3); print(emd(torch.eye(3)[None], one, one).value.item())"
    done = run(code, ROOT, *(name for name in OTHERS if name not in ("Models", "utils")))
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("imported", ["", "import utils, Models;"])
def test_the_hub_and_a_project_with_modules_of_the_same_names_leave_each_other_alone(tmp_path, imported):
    """Also if the project imports its own later, and where solvers are imported when they are used."""
    (tmp_path / "Models").mkdir()
    for name in ("utils.py", "Models/__init__.py"):
        (tmp_path / name).write_text("MINE = True")
    code = f"""import torch; {imported} one = torch.ones(1, 3)
hub = lambda *words, **more: torch.hub.load({str(ROOT)!r}, *words, source="local", **more)
emd, model = hub("emd"), hub("deepemd", "none", device="cpu", image_size=32)
for solver in ("opencv", "ipm"):
    emd(torch.eye(3)[None], one, one, solver=solver)
model.match(*torch.zeros(2, 40, 40, 3, dtype=torch.uint8).numpy()).draw()
import utils, Models
assert utils.MINE and Models.MINE and type(hub("deepemd", "none", device="cpu")) is type(model)
"""
    (tmp_path / "mine.py").write_text(code)
    done = subprocess.run([sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_hub_gives_the_encoder_with_weights_or_without(tmp_path):
    encoder = ResNet12()
    torch.save({"params": encoder.state_dict()}, tmp_path / "max_acc.pth")
    found = hub("resnet12", str(tmp_path / "max_acc.pth"))
    assert not found.training
    assert torch.equal(found.layer4[0].conv3.weight, encoder.layer4[0].conv3.weight)
    assert not torch.equal(hub("resnet12").layer4[0].conv3.weight, encoder.layer4[0].conv3.weight)
    save_file(encoder.state_dict(), tmp_path / "model.safetensors")
    config = {"format": 1, "backbone": "resnet12", "flags": {}, "results": []}
    config |= {"mean": [0.1, 0.2, 0.3], "std": [1, 2, 3]}
    config["weights"] = {"sha256": file_hash(tmp_path / "model.safetensors")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = hub("resnet12", str(tmp_path / "model.safetensors"))
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (1, 2, 3))
    with pytest.raises(InputError, match="no checkpoint at"):
        hub("resnet12", str(tmp_path / "none.pth"))


def test_the_hub_gives_the_library(tmp_path):
    torch.save({"params": ResNet12().state_dict()}, tmp_path / "max_acc.pth")
    model = hub("deepemd", str(tmp_path), device="cpu", image_size=32)
    assert type(model).__module__ == "deepemd"
    with pytest.raises(InputError):
        hub("deepemd", str(tmp_path / "none"))
