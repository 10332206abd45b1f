"""The rules of the house that a machine can check: layers, sizes, flags, and what the documentation points to."""

import ast
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("Models", "Models/emd", "dataloader", "engine", "pictures", "datasets", "datasets/recipes", "benchmarks")
FILES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for folder in (".", *PACKAGES)
    for path in sorted((ROOT / folder).glob("*.py"))
}
TREES = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
# The library, which reads as a script but is imported like a package.
LIBRARY = {"deepemd", "hubconf"} & set(FILES)
SCRIPTS = {module for module in FILES if "." not in module} - {"utils", *PACKAGES, *LIBRARY}
COMMANDS = {f"datasets.{name}" for name in ("prepare", "verify", "fetch", "make_glyphs")}
BENCHMARKS = {module for module in FILES if module.startswith("benchmarks.")}

# What each place may import of this project.
ALL = {"Models", "dataloader", "engine", "pictures", "utils"}
MAY_IMPORT = {
    "utils": set(),
    "engine": {"engine", "utils"},
    "Models": {"Models", "utils"},
    "Models.emd": {"Models.emd"},  # it can be copied into another project
    "dataloader": {"dataloader", "utils"},
    "pictures": ALL,
    "datasets": {"datasets", "dataloader", "engine", "utils"},
    "datasets.recipes": {"datasets", "dataloader", "utils"},
    "benchmarks": (ALL - {"pictures"}) | {"benchmarks"},
    **dict.fromkeys(SCRIPTS | LIBRARY, ALL | LIBRARY),
}
# Modules that need an optional library, and may therefore be imported inside a function.
NEEDS_A_LIBRARY = {"Models.emd.simplex_kernel": "numba"}
OPTIONAL_LIBRARIES = {
    *("cv2", "numba", "qpth", "timm", "pyarrow", "huggingface_hub", "safetensors", "matplotlib", "torchvision"),
    *("onnx", "onnxruntime"),
    *("ot", "scipy"),  # which benchmarks/emd.py compares with
    *("fcntl", "torch"),  # not on every system; a part of it that only torchrun needs
}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 100
LONGER: dict[str, str] = {}  # "path" or "path: function", and the reason


def place_of(module: str) -> str:
    return module if module in MAY_IMPORT else module.rpartition(".")[0]


def resolve(name: str) -> str | None:
    """The module of this project that an imported name is, or is defined in."""
    for prefix in ("", "datasets.", "benchmarks."):  # no packages: their files import each other by bare names
        parts = (prefix + name).split(".")
        for end in range(len(parts), 0, -1):
            if (candidate := ".".join(parts[:end])) in FILES:
                return candidate
    return None


def imported(module: str, node: ast.AST) -> set[str]:
    """The full names that an import statement asks for; empty for another node."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if not isinstance(node, ast.ImportFrom):
        return set()
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    parts = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
    return {".".join([*parts, *filter(None, [node.module]), alias.name]) for alias in node.names}


def functions_of(module: str) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(TREES[module]) if isinstance(node, ast.FunctionDef)]


@functools.cache
def imports(module: str) -> set[str]:
    """The modules of this project that a module imports, anywhere in it."""
    names = {name for node in ast.walk(TREES[module]) for name in imported(module, node)}
    return {found for name in names if (found := resolve(name)) and found != module}


@pytest.mark.parametrize("module", FILES)
def test_imports_run_one_way(module):
    allowed = MAY_IMPORT[place_of(module)]
    for found in imports(module):
        assert any(found == good or found.startswith(good + ".") for good in allowed), f"{module} imports {found}"
    if place_of(module) == "engine" and module != "engine.arguments":
        assert "engine.arguments" not in imports(module)


def test_no_circle_of_files():
    packages = {name for name, path in FILES.items() if path.name == "__init__.py"}

    def reaches(module: str, goal: str, seen: set[str]) -> bool:
        new = imports(module) - seen
        seen |= new
        return goal in new or any(reaches(found, goal, seen) for found in new)

    # A package and the modules in it import each other by nature: its __init__ is what the package shows.
    for module in set(FILES) - packages:
        assert not reaches(module, module, set(packages)), module


# An entry point of torch.hub imports what it needs alone, and nothing before the others are listed.
@pytest.mark.parametrize("module", sorted(FILES.keys() - {"hubconf"}))
def test_imports_stand_at_the_top(module):
    for function in functions_of(module):
        for name in {name for node in ast.walk(function) for name in imported(module, node)}:
            where = f"{module}, line {function.lineno}: {name} is imported inside {function.name}"
            assert resolve(name) in (None, *NEEDS_A_LIBRARY), where
            assert resolve(name) or name.split(".")[0] in OPTIONAL_LIBRARIES, where


def test_only_scripts_and_arguments_use_argparse():
    for module, tree in TREES.items():
        names = {name.split(".")[0] for node in ast.walk(tree) for name in imported(module, node)}
        if "argparse" in names:
            # engine.start(args) stands at the top of every script, and takes what they parsed.
            may = SCRIPTS | LIBRARY | COMMANDS | BENCHMARKS | {"utils", "engine.command_line", "engine.start"}
            assert module in may or FILES[module].name == "arguments.py", module


def test_files_and_functions_are_short():
    long = {}
    for module, path in FILES.items():
        name = path.relative_to(ROOT).as_posix()
        functions = functions_of(module)
        lines = {f"{name}: {node.name}": node.end_lineno - node.lineno + 1 for node in functions}
        long |= {place: count for place, count in lines.items() if count > MOST_LINES_OF_A_FUNCTION}
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > MOST_LINES:
            long[name] = count
    assert long.keys() == LONGER.keys(), long


# --- Flags ------------------------------------------------------------------------------------------------------------

PUBLISHED = {
    "common": "dataset=miniimagenet data_dir=datasets way=5 shot=1 query=15 temperature=12.5 metric=cosine norm=center "
    "deepemd=fcn feature_pyramid=None seed=1 extra_dir= solver=opencv gpu=None num_patch=9 patch_list=2,3 patch_ratio=2.0 "
    "form=L2 l2_strength=1e-06 sfc_wd=0.0 sfc_update_step=100 sfc_bs=4",
    "train_pretrain": "max_epoch=120 lr=0.1 step_size=30 gamma=0.2 bs=128 set=val num_episode=100 save_all=False "
    "random_val_task=False",
    "train_meta": "set=val bs=1 max_epoch=100 lr=0.0005 step_size=10 gamma=0.5 val_frequency=50 random_val_task=False "
    "save_all=False val_episode=1000 test_episode=5000 pretrain_dir=deepemd_pretrain_model/ sfc_lr=0.1",
    "eval": "set=test test_episode=5000 model_dir=None sfc_lr=100.0",
}


def defaults_of(script: str) -> dict[str, str]:
    parser = importlib.import_module(script).build_parser()
    parsed = vars(parser.parse_args([]))
    flags = [action for action in parser._actions if action.option_strings and action.dest in parsed]
    # Those that depend on other flags are None before they are parsed.
    return {flag.option_strings[0]: str(parsed[flag.dest] if flag.default is None else flag.default) for flag in flags}


@pytest.mark.parametrize("script", ["train_pretrain", "train_meta", "eval"])
def test_published_flags_have_published_defaults(script):
    defaults = defaults_of(script)
    for flag in f"{PUBLISHED['common']} {PUBLISHED[script]}".split():
        name, default = flag.split("=")
        assert defaults[f"-{name}"] == default, name


def test_the_table_of_defaults_is_that_of_the_parsers():
    text = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    table = re.search(r"^\| flag \|(.*)\n\|[-|]+\n((?:\|.*\n)+)", text, re.M)
    defaults = [defaults_of(script) for script in re.findall(r"`(\w+)\.py`", table[1])]
    for row in table[2].splitlines():
        flag, *cells = (cell.strip(" `") for cell in row.strip("|").split("|"))
        assert [known.get(flag, "") for known in defaults] == cells, flag


# --- Documentation ----------------------------------------------------------------------------------------------------

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [ROOT / "datasets" / "README.md"]
HISTORY = ROOT / "CHANGELOG.md"  # may name what is no more
# Single-dash flags of other programs.
FOREIGN_FLAGS = {"-h", "-r", "-m", "-k", "-q"}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_files_of_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if "://" in target or target.startswith("../../actions/"):  # of the repository's own pages, which have no file
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target
    for command in re.findall(r"(?:python|bash) ([\w/]+\.(?:py|sh))", text):
        assert (ROOT / command).exists(), command
    if page != HISTORY:
        places = "Models|dataloader|datasets|engine|pictures|tests|benchmarks"
        for path in re.findall(rf"`((?:{places})/[\w/]+\.(?:py|sh))`", text):
            assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_flags_of_a_page_exist(page):
    calls = (node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Call))
    adding = (call.args for call in calls if getattr(call.func, "attr", "") == "add_argument")
    flags = {word.value for words in adding for word in words if isinstance(word, ast.Constant)} | FOREIGN_FLAGS
    assert len(flags) > 60
    text = page.read_text(encoding="utf-8")
    code = [line for line in text.splitlines() if line.startswith("    ")] + re.findall(r"`([^`\n]+)`", text)
    named = {flag for words in code for flag in re.findall(r"(?<!\S)-[a-z][a-z0-9_]*", words)}
    assert page == HISTORY or named <= flags, named - flags


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_are_accepted_by_their_parsers(page, monkeypatch):
    # Files and models that they name are the reader's.
    monkeypatch.setattr("engine.command_line._Parser._complete", lambda parser, parsed: None)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # whose scripts import their neighbours
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for command in re.findall(r"^    python ((?:benchmarks/)?\w+\.py .*)$", text, re.M):
        script, *words = shlex.split(command, comments=True)
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        if hasattr(module, "build_parser") and "..." not in words:
            module.build_parser().parse_args(words)  # exits where it does not accept them


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_of_a_page_compiles(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
        compile(block, str(page), "exec")
