"""The rules of the house that a machine can hold."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each place may import of ours. An import inside a function counts like any other.
MAY_IMPORT = {
    "utils": set(),
    "engine": {"engine", "utils"},
    "Models": {"Models", "utils"},
    "Models/emd": {"Models.emd"},  # it can be copied into another project
    "dataloader": {"dataloader", "utils"},
    "datasets": {"datasets", "dataloader", "engine", "utils"},
    "eval": {"Models", "dataloader", "engine", "utils"},
    "pictures": {"pictures", "Models", "dataloader", "engine", "utils"},
    "visualize": {"pictures", "Models", "dataloader", "engine", "utils"},
    "predict": {"pictures", "Models", "dataloader", "engine", "utils"},
    # Each stage prints the command of the next.
    "train_meta": {"Models", "dataloader", "engine", "utils", "eval", "pictures"},
    "train_pretrain": {"Models", "dataloader", "engine", "utils", "train_meta"},
}
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for place in MAY_IMPORT
    for path in ([ROOT / f"{place}.py"] if (ROOT / f"{place}.py").is_file() else (ROOT / place).glob("*.py"))
}


def imports(module: str) -> set[str]:
    """The modules of ours that a module imports, anywhere in it."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(
                [*package.split(".")[: len(package.split(".")) + 1 - node.level], *filter(None, [node.module])]
            )
            base = base if node.level else node.module
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return {name for name in found if name in FILES and name != module}


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_imports_run_one_way(place):
    name = place.replace("/", ".")
    modules = [module for module in FILES if module == name or module.rpartition(".")[0] == name]
    assert modules
    for module in modules:
        for found in imports(module):
            allowed = MAY_IMPORT[place]
            assert any(found == good or found.startswith(good + ".") for good in allowed), f"{module} imports {found}"
            assert place != "engine" or found != "engine.arguments" or module == "engine.arguments"


def test_no_circle_of_files():
    def reaches(module: str, goal: str, seen: set[str]) -> bool:
        new = imports(module) - seen
        seen |= new
        return goal in new or any(reaches(found, goal, seen) for found in new)

    # A package and the modules in it import each other by nature: its __init__ is what the package shows.
    for module in FILES:
        if FILES[module].name != "__init__.py":
            assert not reaches(module, module, {name for name, path in FILES.items() if path.name == "__init__.py"}), (
                module
            )


def test_only_scripts_and_arguments_see_argparse():
    for module, path in FILES.items():
        if "argparse" in path.read_text() and module.split(".")[0] != "datasets":
            assert path.name in ("arguments.py", "utils.py") or path.parent == ROOT, module
            assert path.name != "utils.py" or "Namespace" not in path.read_text()


FLAGS = """
common: dataset=miniimagenet data_dir=datasets way=5 shot=1 query=15 temperature=12.5 metric=cosine norm=center deepemd=fcn
  feature_pyramid=none gpu seed=1 extra_dir num_workers image_size=84 num_patch=9 patch_list=2,3 patch_ratio=2.0 solver=opencv
  form=L2 l2_strength=1e-06 emd_gradient=full feature_cache=auto episode_batch=8 fixed_patches amp=off compile
  checkpoint_activations sfc_wd=0.0 sfc_update_step=100 sfc_bs=4 head=deepemd kshot=sfc deterministic verify_images
train_pretrain: max_epoch=120 lr=0.1 step_size=30 gamma=0.2 bs=128 set=val num_episode=100 save_all random_val_task
train_meta: set=val bs=1 max_epoch=100 lr=0.0005 step_size=10 gamma=0.5 val_frequency=50 random_val_task save_all
  val_episode=1000 test_episode=5000 pretrain_dir=deepemd_pretrain_model/ sfc_lr=0.1 val_solver=opencv log_images=0
eval: set=test test_episode=5000 model_dir=deepemd_trained_model/<dataset>/<deepemd>/max_acc.pth sfc_lr=100.0
"""


@pytest.mark.parametrize("script", ["train_pretrain", "train_meta", "eval"])
def test_published_flags_and_defaults(script):
    text = " ".join(importlib.import_module(script).build_parser().format_help().split()).replace("- ", "-")
    sections = dict(re.findall(r"^(\w+): (.*?)(?=^\w+: |\Z)", FLAGS.strip() + "\n", re.M | re.S))
    for flag in (sections["common"] + " " + sections[script]).split():
        name, _, default = flag.partition("=")
        described = re.search(rf" -{name}( .*?(?= -[a-z0-9_]+[ ,]|\Z))", text[text.index("options:") :])
        assert described, name
        assert described[1].count("default:") <= 1
        if default:
            assert f"(default:{default})" in described[1].replace(" ", ""), (name, described[1])


def test_readme_links_and_files_exist():
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", readme):
        assert "://" in target or (ROOT / target).exists(), target
    for command in re.findall(r"(?:python|bash) ([\w/]+\.(?:py|sh))", readme):
        assert (ROOT / command).exists(), command
