"""The rules of the house that a machine can hold."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"Models", "dataloader", "engine", "utils", "datasets", "eval", "train_meta", "train_pretrain"}
MAY_IMPORT = {
    "utils.py": set(),
    "engine.py": {"utils"},
    "Models": {"Models", "utils"},
    "Models/emd": set(),  # it can be lifted out
    "dataloader": {"dataloader", "utils"},
    "datasets": set(),
    "eval.py": {"Models", "dataloader", "engine", "utils"},
    "train_meta.py": {"Models", "dataloader", "engine", "utils"},
    "train_pretrain.py": {"Models", "dataloader", "engine", "utils"},
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level < 2, f"{path.name} reaches out of its own package by a relative import"
            if node.level == 0:
                found.add(node.module)
    return {name for name in found if name.split(".")[0] in OURS}


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_run_one_way(place):
    path = ROOT / place
    files = [path] if path.is_file() else list(path.glob("*.py"))
    assert files
    for file in files:
        for name in imports(file):
            allowed = MAY_IMPORT[place]
            assert any(name == good or name.startswith(good + ".") for good in allowed), f"{file.name} imports {name}"


FLAGS = """
common: dataset=miniimagenet data_dir=datasets way=5 shot=1 query=15 temperature=12.5 metric=cosine norm=center deepemd=fcn
  feature_pyramid=none gpu seed=1 extra_dir= num_workers image_size=84 num_patch=9 patch_list=2,3 patch_ratio=2.0 solver=opencv
  form=L2 l2_strength=1e-06 emd_gradient=full feature_cache=auto episode_batch=8 fixed_patches amp=off compile
  checkpoint_activations sfc_wd=0.0 sfc_update_step=100 sfc_bs=4
train_pretrain: max_epoch=120 lr=0.1 step_size=30 gamma=0.2 bs=128 set=val num_episode=100 save_all random_val_task
train_meta: set=val bs=1 max_epoch=100 lr=0.0005 step_size=10 gamma=0.5 val_frequency=50 random_val_task save_all
  val_episode=1000 test_episode=5000 pretrain_dir=deepemd_pretrain_model/ sfc_lr=0.1 val_solver=opencv
eval: set=test test_episode=5000 model_dir=deepemd_trained_model/miniimagenet/fcn/max_acc.pth sfc_lr=100.0
"""


@pytest.mark.parametrize("script", ["train_pretrain", "train_meta", "eval"])
def test_published_flags_and_defaults(script):
    import sys

    words = subprocess.run(
        [sys.executable, f"{script}.py", "-h"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    text = " ".join(words.split()).replace("- ", "-")
    sections = dict(re.findall(r"^(\w+): (.*?)(?=^\w+: |\Z)", FLAGS.strip() + "\n", re.M | re.S))
    for flag in (sections["common"] + " " + sections[script]).split():
        name, _, default = flag.partition("=")
        described = re.search(rf" -{name}( .*?(?= -[a-z_]+[ ,]|\Z))", text[text.index("options:") :])
        assert described, name
        if default:
            assert f"(default: {default})" in described[1].replace(" ", "").replace("(default:", "(default: "), (
                name,
                described[1],
            )


def test_readme_links_and_files_exist():
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert "://" in target or (ROOT / target).exists(), target
    for command in re.findall(r"(?:python|bash) ([\w/]+\.(?:py|sh))", readme):
        assert (ROOT / command).exists(), command
