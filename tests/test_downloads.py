"""The download scripts, fed local archives, and what they say when Google Drive does not deliver."""

import io
import subprocess
import tarfile
from pathlib import Path

import fetch as fetch_module
import pytest
from fetch import FetchError, fetch

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    ("download_pretrain_model.sh", "", "1Prn7_41NVrZbnePAlSiKjD21Jlz0LKJM", "deepemd_pretrain_model"),
    ("download_trained_model.sh", "", "1lGcNHMRnBrjODDmt647RzMJ5cLCd4pmv", "deepemd_trained_model"),
    ("datasets/download_miniimagenet.sh", "datasets", "191cFzwwNTzG_mHUDABF0Nh77cI6pa-qq", "miniimagenet"),
    ("datasets/download_tieredimagenet.sh", "datasets", "1ANczVwnI1BDHIF65TgulaGALFnXBvRfs", "tiered_imagenet"),
    ("datasets/download_cub.sh", "datasets", "1B8jmZin9teye7Lte9ZKsQ3lyMASbxune", "cub"),
    ("datasets/download_fc100.sh", "datasets", "1nEh3O2RJ5zTbWj7luyQCNcklpX0_5KlS", "FC100"),
    ("datasets/download_cifar_fs.sh", "datasets", "1Lq2USoQmbFgCFJlGx3huFSfjqwtxMCL8", "cifar_fs"),
]


def archive(path: Path, **members: str) -> Path:
    with tarfile.open(path, "w") as content:
        for name, text in members.items():
            info = tarfile.TarInfo(name.replace("__", "/").replace("UP", ".."))
            info.size = len(text)
            content.addfile(info, io.BytesIO(text.encode()))
    return path


@pytest.mark.parametrize(("script", "into", "drive_id", "folder"), SCRIPTS)
@pytest.mark.parametrize("as_url", [False, True])
def test_script_extracts_a_local_archive(tmp_path, script, into, drive_id, folder, as_url):
    project = tmp_path / "project"
    (project / "datasets").mkdir(parents=True)
    for name in (script, "datasets/fetch.py"):
        (project / name).write_bytes((ROOT / name).read_bytes())
    assert drive_id in (project / script).read_text()
    path = archive(tmp_path / "local.tar", **{f"{folder}__a__b.txt": "hello"})
    source = path.as_uri() if as_url else "local.tar"
    done = subprocess.run(["bash", f"project/{script}", source], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (project / into / folder / "a" / "b.txt").read_text() == "hello"
    assert not list((project / into).glob(".*"))
    again = subprocess.run(["bash", f"project/{script}", source], cwd=tmp_path, capture_output=True, text=True)
    assert "is there already" in again.stdout


def spoilt(tmp_path: Path, what: str) -> str:
    path = tmp_path / "local.tar"
    if what == "absent":
        return str(path)
    if what == "a web page":
        path.write_text("<html>Google Drive - Quota exceeded</html>")
    elif what == "cut off":
        whole = archive(path, cub__a="x" * 40000).read_bytes()
        path.write_bytes(whole[:20000])
    elif what == "another folder":
        archive(path, birds__a="x")
    elif what == "outside":
        archive(path, cub__a="x", UP__evil="x")
    return str(path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("absent", "there is no such file"),
        ("a web page", "it is neither, or it is cut off"),
        ("cut off", "cannot be extracted"),
        ("another folder", "expected the folder cub .* it holds birds"),
        ("outside", "cannot be extracted"),
    ],
)
def test_bad_archive_leaves_nothing(tmp_path, what, message):
    with pytest.raises(FetchError, match=message):
        fetch("id", "cub.tar", tmp_path / "into", ["cub"], spoilt(tmp_path, what))
    assert list((tmp_path / "into").iterdir()) == []
    assert not (tmp_path / "evil").exists()


def pretend_gdown(monkeypatch, outcome):
    def run(command, **_):
        code, message = outcome(Path(command[command.index("-O") + 1]))
        return subprocess.CompletedProcess(command, code, stderr=message)

    monkeypatch.setattr(fetch_module.subprocess, "run", run)


def test_drive_refuses(tmp_path, monkeypatch):
    pretend_gdown(monkeypatch, lambda out: (1, "Traceback\nFailed to retrieve file url: too many users"))
    with pytest.raises(FetchError, match="quota.*too many users") as error:
        fetch("id", "miniimagenet.tar", tmp_path, ["miniimagenet"], None)
    assert "rebuilt" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_drive_sends_a_page(tmp_path, monkeypatch):
    pretend_gdown(monkeypatch, lambda out: (out.write_text("<html>") and 0, ""))
    with pytest.raises(FetchError, match="a web page or broken"):
        fetch("id", "cub.tar", tmp_path, ["cub"], None)
    assert list(tmp_path.iterdir()) == []


def test_drive_delivers(tmp_path, monkeypatch):
    pretend_gdown(monkeypatch, lambda out: (archive(out, cub__a="x") and 0, ""))
    fetch("id", "cub.tar", tmp_path, ["cub"], None)
    assert [path.name for path in tmp_path.iterdir()] == ["cub"]
