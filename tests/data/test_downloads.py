"""The published downloads, from local archives: good ones, broken ones, hostile ones; and what Google Drive may answer."""

import bz2
import gzip
import io
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import archives
import fetch as module
import gdown
import pytest
import requests
import sources
from archives import BrokenArchive
from data_helpers import locked_by_another_process, tree
from fetch import DOWNLOADS, fetch
from folders import exclusive
from helpers import ROOT, run

from utils import InputError

PUBLISHED = {  # reference: Google Drive id, the folder inside
    "miniimagenet": ("191cFzwwNTzG_mHUDABF0Nh77cI6pa-qq", "datasets/miniimagenet"),
    "tieredimagenet": ("1ANczVwnI1BDHIF65TgulaGALFnXBvRfs", "datasets/tiered_imagenet"),
    "cub": ("1B8jmZin9teye7Lte9ZKsQ3lyMASbxune", "datasets/cub"),
    "fc100": ("1nEh3O2RJ5zTbWj7luyQCNcklpX0_5KlS", "datasets/FC100"),
    "cifar_fs": ("1Lq2USoQmbFgCFJlGx3huFSfjqwtxMCL8", "datasets/cifar_fs"),
    "pretrain_model": ("1Prn7_41NVrZbnePAlSiKjD21Jlz0LKJM", "deepemd_pretrain_model"),
    "trained_model": ("1lGcNHMRnBrjODDmt647RzMJ5cLCd4pmv", "deepemd_trained_model"),
}
NOISE = random.Random(1).randbytes(50000)  # does not compress, as images do not


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info


def tar(path: Path, *members: tuple[tarfile.TarInfo | str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as content:
        for info, data in members:
            info = member(info) if isinstance(info, str) else info
            info.size = len(data)
            content.addfile(info, io.BytesIO(data))
    return path


def zipped(path: Path, *members: tuple[zipfile.ZipInfo | str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as content:
        for name, data in members:
            content.writestr(name, data, method)
    return path


def zip_info(name: str, mode: int) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr, info.create_system = mode << 16, 3
    return info


def flip(path: Path, position: int) -> Path:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)
    return path


# --- Archives that are as they should be ------------------------------------------------------------------------------


def test_table_is_the_published_one():
    assert {name: found.drive_id for name, found in DOWNLOADS.items()} == {n: id_ for n, (id_, _) in PUBLISHED.items()}
    assert module.PROJECT == ROOT


@pytest.mark.parametrize("name", PUBLISHED)
def test_folder_comes_into_place(tmp_path, capsys, name):
    folder = PUBLISHED[name][1]
    path = tar(tmp_path / "local.tar", (f"./{Path(folder).name}/a/b.txt", b"hello"))
    project = tmp_path / "project"
    fetch(name, str(path), project)
    assert tree(project) == {f"{folder}/a/b.txt": b"hello"}
    assert "in place" in capsys.readouterr().out
    fetch(name, str(path), project)
    assert "exists: nothing to do" in capsys.readouterr().out
    assert path.is_file()


@pytest.mark.parametrize("spelling", ["tiered_imagenet", "tieredimagenet"])
def test_the_folder_may_have_either_spelling(tmp_path, spelling):
    path = tar(tmp_path / "local.tar", (f"{spelling}/a", b"x"))
    fetch("tieredimagenet", path.as_uri(), tmp_path / "project")
    assert tree(tmp_path / "project") == {f"datasets/{spelling}/a": b"x"}


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz", "zip"])
def test_every_compression_is_read(tmp_path, mode):
    members = (("cub/a", NOISE), ("cub/b/c", b"x"))
    path = tmp_path / "local"
    _ = zipped(path, *members) if mode == "zip" else tar(path, *members, mode=mode)
    fetch("cub", str(path), tmp_path)
    assert tree(tmp_path / "datasets") == {"cub/a": NOISE, "cub/b/c": b"x"}


def test_special_permissions_do_not_survive(tmp_path):
    fetch("cub", str(tar(tmp_path / "local", (member("cub/a", mode=0o6777), b"x"))), tmp_path)
    assert (tmp_path / "datasets/cub/a").stat().st_mode & 0o7111 == 0


def test_empty_folder_is_not_in_place(tmp_path):
    (tmp_path / "datasets/cub/images/a").mkdir(parents=True)
    fetch("cub", str(tar(tmp_path / "local.tar", ("cub/a", b"x"))), tmp_path)
    assert tree(tmp_path / "datasets") == {"cub/a": b"x"}


def test_file_in_the_way_is_kept(tmp_path):
    (tmp_path / "datasets").mkdir()
    (tmp_path / "datasets/cub").write_text("mine")
    with pytest.raises(InputError, match="cub"):
        fetch("cub", str(tar(tmp_path / "local.tar", ("cub/a", b"x"))), tmp_path)
    assert tree(tmp_path / "datasets") == {"cub": b"mine"}


# --- Archives that are not --------------------------------------------------------------------------------------------


def cut(path: Path, length: int) -> Path:
    path.write_bytes(path.read_bytes()[:length])
    return path


def encrypted(path: Path) -> Path:
    data = bytearray(zipped(path, ("cub/a", b"x")).read_bytes())
    data[6] |= 1  # the flags of the local header, and of the central directory
    data[data.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    return path


def raw(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def sparse_bomb(path: Path) -> Path:
    """A terabyte, by its header, in ten kilobytes."""
    info = member("cub/a", tarfile.GNUTYPE_SPARSE)
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[483:495] = b"16000000000\0"  # the real size, octal, far above the bound
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return raw(path, bytes(header) + bytes(10240))


ZEROS = bytes(1 << 20)
TWO = (("cub/a", NOISE), ("cub/b", NOISE))
NO_FILE = "'cub/.', which is neither a file nor a folder"
MANY_EMPTY = [(f"cub/{number}", b"") for number in range(1000)]
LINK_OUT = (member("cub/a", tarfile.SYMTYPE, "../../../secret"), b"")
ZIP_LINK = (zip_info("cub/a", stat.S_IFLNK | 0o777), b"/etc/passwd")
BROKEN = {
    "a web page": (lambda p: raw(p, b"<html>Quota exceeded</html>"), "neither a tar nor a zip archive"),
    "nothing": (lambda p: raw(p, b""), "neither a tar nor a zip archive"),
    "compressed text": (lambda p: raw(p, bz2.compress(b"hello" * 1000)), "neither a tar nor a zip archive"),
    "another folder": (lambda p: tar(p, ("birds/a", b"x")), "has no folder cub; it holds birds"),
    "an empty tar": (lambda p: tar(p), "it holds none"),
    # cut off, or changed
    "tar, cut in a member": (lambda p: cut(tar(p, *TWO), 20000), "is broken"),
    "tar, cut between members": (lambda p: cut(tar(p, *TWO), 512 + 50176), "is broken"),
    "tar, header changed": (lambda p: flip(tar(p, *TWO), 512 + 50176), "is broken"),
    "tar.gz, cut": (lambda p: cut(tar(p, *TWO, mode="w:gz"), 40000), "is broken"),
    "tar.gz, cut at once": (lambda p: cut(tar(p, *TWO, mode="w:gz"), 300), "neither a tar|is broken"),
    "tar.gz, without its checksum": (lambda p: cut(tar(p, *TWO, mode="w:gz"), -8), "is broken"),
    "tar.gz, checksum changed": (lambda p: flip(tar(p, *TWO, mode="w:gz"), -8), "is broken"),
    "tar.xz, byte changed": (lambda p: flip(tar(p, *TWO, mode="w:xz"), 30000), "neither a tar|is broken"),
    "zip, cut": (lambda p: cut(zipped(p, *TWO), 40000), "neither a tar nor a zip archive"),
    "zip, byte changed": (lambda p: flip(zipped(p, *TWO, method=zipfile.ZIP_STORED), 30000), "is broken .*CRC"),
    "zip, encrypted": (encrypted, "is encrypted"),
    # zipfile would decompress it without a bound
    "zip, by bzip2": (lambda p: zipped(p, ("cub/a", b"x"), method=zipfile.ZIP_BZIP2), "not compressed by deflate"),
    # bombs
    "tar.gz bomb": (lambda p: tar(p, ("cub/a", ZEROS), mode="w:gz"), "out of proportion"),
    "tar.gz bomb behind the end": (
        lambda p: raw(p, gzip.compress(tar(p, ("cub/a", b"x")).read_bytes() + ZEROS)),
        "out of proportion",
    ),
    "tar.gz bomb of empty files": (lambda p: tar(p, *MANY_EMPTY, mode="w:gz"), "out of proportion"),
    "sparse tar bomb": (sparse_bomb, "sparse file"),
    "zip bomb": (lambda p: zipped(p, ("cub/a", ZEROS)), "out of proportion"),
    # members that would be written outside, or are no files
    "tar, up": (lambda p: tar(p, ("cub/a", b"x"), ("../evil", b"x")), "'../evil', which leads out"),
    "tar, absolute": (lambda p: tar(p, ("cub/a", b"x"), ("/evil", b"x")), "'/evil', which leads out"),
    "tar, up by backslash": (lambda p: tar(p, ("cub/a", b"x"), ("..\\evil", b"x")), "leads out"),
    "tar, with a drive": (lambda p: tar(p, ("cub/a", b"x"), ("C:evil", b"x")), "leads out"),
    "zip, up from within": (lambda p: zipped(p, ("cub/../../evil", b"x")), "leads out"),
    "hard link": (lambda p: tar(p, ("cub/a", b"x"), (member("cub/b", tarfile.LNKTYPE, "cub/a"), b"")), NO_FILE),
    "symbolic link out": (lambda p: tar(p, LINK_OUT), NO_FILE),
    "pipe": (lambda p: tar(p, (member("cub/a", tarfile.FIFOTYPE), b"")), NO_FILE),
    "zip, symbolic link": (lambda p: zipped(p, ZIP_LINK), NO_FILE),
    "file below a file": (lambda p: tar(p, ("cub", b"x"), ("cub/a", b"x")), "cannot be extracted"),
}


@pytest.fixture
def low_bound(monkeypatch):
    monkeypatch.setattr(archives, "SPARE_BYTES", 1 << 18)


@pytest.mark.parametrize("what", BROKEN)
def test_bad_archive_leaves_nothing(tmp_path, monkeypatch, low_bound, what):
    spoil, message = BROKEN[what]
    (tmp_path / "secret").write_text("secret")
    path = spoil(tmp_path / "local")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=message):
        fetch("cub", str(path), tmp_path / "project")
    assert list((tmp_path / "project/datasets").iterdir()) == []
    assert tree(tmp_path) == before

    monkeypatch.setattr(module, "PROJECT", tmp_path / "project")
    status, _, said = run("fetch.py", "cub", path, cwd=tmp_path)
    assert (status, said.count("\n"), said[:7]) == (1, 1, "error: ")


def header(kind: bytes, size: int, name: str = "././@LongLink") -> bytes:
    info = member(name, kind)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


def sized(size: int) -> bytes:
    """The header of a file of any size, written in base 256."""
    content = bytearray(header(tarfile.REGTYPE, 0, "cub/a"))
    content[124:136] = (size + (0x80 << 88) * (size > 0)).to_bytes(12, "big", signed=size < 0)
    content[148:156] = b" " * 8
    content[148:156] = b"%06o\0 " % sum(content)
    return bytes(content)


MIB = 1 << 20
HEADERS = {
    "pax header": header(tarfile.XHDTYPE, 20 * MIB) + bytes(20 * MIB),
    "long name": header(tarfile.GNUTYPE_LONGNAME, 20 * MIB) + b"a" * (20 * MIB),
    "many long names": (header(tarfile.GNUTYPE_LONGNAME, MIB // 2) + b"a" * (MIB // 2)) * 40,
    "negative size": sized(-512),
    "size that leads back to the start": sized(-1536),
    "size beyond 64 bits": sized(1 << 80),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_header_is_not_read_whole_whatever_size_it_claims(tmp_path, what):
    good, packed = tar(tmp_path / "good", ("cub/a", b"x")).read_bytes(), tmp_path / "local"
    class_tar = tar(tmp_path / "outer", ("cub/n01532829.tar", HEADERS[what])).read_bytes()
    for content in (HEADERS[what] + good, good[:1024] + HEADERS[what], class_tar):
        raw(packed, gzip.compress(content, 1))
        tracemalloc.start()
        with pytest.raises(InputError, match="is broken|out of proportion"):
            sources.open_source(packed).entries()
        if content != class_tar:
            with pytest.raises(InputError, match="is broken|out of proportion"):
                fetch("cub", str(packed), tmp_path)
            assert list((tmp_path / "datasets").iterdir()) == []
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * MIB


def resized(path: Path, size: int, claimed: int) -> Path:
    """A zip with a file of zeros, and another size in its headers."""
    data = zipped(path, ("cub/a.png", bytes(size))).read_bytes()
    path.write_bytes(data.replace(size.to_bytes(4, "little"), claimed.to_bytes(4, "little")))
    return path


@pytest.mark.parametrize(
    ("size", "claimed", "message"), [(32 * MIB, 100, "Bad CRC-32"), (5000, 70000, "ends after 5000 of 70000 bytes")]
)
def test_a_zip_that_misstates_a_size_is_refused_without_decompressing_more(tmp_path, size, claimed, message):
    path = resized(tmp_path / "local.zip", size, claimed)
    for read in (
        lambda: fetch("cub", str(path), tmp_path),
        lambda: dict(sources.open_source(path).read({"cub/a.png"})),
    ):
        tracemalloc.start()
        with pytest.raises(BrokenArchive, match=f"is broken.*{message}"):
            read()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 * MIB
    assert list((tmp_path / "datasets").iterdir()) == []


@pytest.mark.parametrize("pack", ["w:gz", "w:bz2", "w:xz", "zip"])
@pytest.mark.parametrize("big", ["cub/a.png", "cub/n01532829.tar"])
def test_a_bomb_is_no_source(tmp_path, low_bound, pack, big):
    path, members = tmp_path / "local", (("cub/x.png", b"x"), (big, ZEROS))
    _ = zipped(path, *members) if pack == "zip" else tar(path, *members, mode=pack)
    with pytest.raises(BrokenArchive, match="out of proportion"):
        sources.open_source(path).entries()
    with pytest.raises(BrokenArchive, match="out of proportion"):
        list(sources.open_source(path).read({"cub/a.png"}))


@pytest.mark.parametrize("what", [what for what in BROKEN if what.startswith("tar") and re.search("cut|changed", what)])
def test_a_source_is_checked_to_its_end(tmp_path, what):
    path = BROKEN[what][0](tmp_path / "local")
    with pytest.raises(InputError, match=BROKEN[what][1]):
        sources.open_source(path).entries()


def test_a_set_is_fetched_by_one_process_at_a_time(tmp_path):
    path = tar(tmp_path / "local.tar", ("cub/a", b"x"))
    with (
        locked_by_another_process(tmp_path / "datasets/cub.tar"),
        pytest.raises(InputError, match="Wait for it to finish"),
    ):
        fetch("cub", str(path), tmp_path)
    fetch("cub", str(path), tmp_path)
    assert tree(tmp_path / "datasets") == {"cub/a": b"x"}


def test_what_another_process_has_just_fetched_is_kept(tmp_path, monkeypatch, capsys):
    path = tar(tmp_path / "local.tar", ("cub/a", b"x"))

    def after_another_process(target):
        monkeypatch.setattr(module, "exclusive", exclusive)
        fetch("cub", str(path), tmp_path)
        return exclusive(target)

    monkeypatch.setattr(module, "exclusive", after_another_process)
    pretend_gdown(monkeypatch, lambda _: pytest.fail("downloaded again"))
    fetch("cub", None, tmp_path)
    assert "exists: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["absent.tar", "file:///absent.tar", "file://[", "http://absent/cub.tar", "."])
def test_a_missing_archive_is_named(tmp_path, source):
    with pytest.raises(InputError, match="there is no archive"):
        fetch("cub", source, tmp_path)


def test_a_full_disk_keeps_the_download(tmp_path, monkeypatch):
    def full(self, member):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives.Archive, "chunks", full)
    pretend_gdown(monkeypatch, lambda out: tar(out, ("cub/a", b"x")))
    with pytest.raises(InputError, match="No space left"):
        fetch("cub", None, tmp_path)
    assert [path.name for path in (tmp_path / "datasets").iterdir()] == ["cub.tar.part"]  # not to be fetched again


# --- Google Drive -----------------------------------------------------------------------------------------------------


def pretend_gdown(monkeypatch, outcome):
    def download(*, id, output, resume, retries, timeout):  # noqa: A002 - the library's name
        assert (id, resume) == (DOWNLOADS[Path(output).name.split(".")[0]].drive_id, True)
        outcome(Path(output))

    monkeypatch.setattr(module.gdown, "download", download)


REFUSED = gdown.exceptions.FileURLRetrievalError(
    "Failed to retrieve file url:\n\n\tCannot retrieve the public link of the file. You may need to change\n\tthe permission"
)
NO_NAME = requests.ConnectionError("HTTPSConnectionPool(host='drive.google.com'): Max retries exceeded\nwith url")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (REFUSED, "You may need to change the permission"),
        (NO_NAME, "Max retries exceeded with url"),
        (requests.exceptions.ReadTimeout(), "ReadTimeout"),
        (KeyError("Content-Type"), "Content-Type"),
    ],
)
def test_a_failed_download_ends_with_its_reason_and_what_to_do(tmp_path, monkeypatch, error, reason):
    def fail(_):
        raise error

    pretend_gdown(monkeypatch, fail)
    with pytest.raises(InputError) as caught:
        fetch("miniimagenet", None, tmp_path)
    said = str(caught.value)
    assert said.startswith("cannot download miniimagenet.tar from Google Drive")
    advice = ("fetch.py miniimagenet path/to/miniimagenet.tar", "datasets/prepare.py miniimagenet")
    assert all(part in said for part in (reason, *advice))
    assert "\n" not in said
    assert list((tmp_path / "datasets").iterdir()) == []


@pytest.mark.parametrize("broken", ["a web page", "tar, cut in a member"])
def test_a_download_that_is_no_archive_is_removed(tmp_path, monkeypatch, broken):
    pretend_gdown(monkeypatch, BROKEN[broken][0])
    with pytest.raises(InputError, match="Google Drive sent no usable archive"):
        fetch("cub", None, tmp_path)
    assert list((tmp_path / "datasets").iterdir()) == []


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_download_is_extracted_and_removed(tmp_path, monkeypatch, is_complete):
    (tmp_path / "datasets").mkdir()
    pretend_gdown(monkeypatch, lambda out: tar(out, ("cub/a", b"x")))
    if is_complete:  # by a call that was stopped before it extracted it
        tar(tmp_path / "datasets" / "cub.tar.part", ("cub/a", b"x"))
        pretend_gdown(monkeypatch, lambda _: pytest.fail("downloaded again"))
    fetch("cub", None, tmp_path)
    assert tree(tmp_path) == {"datasets/cub/a": b"x"}


# --- Command line -----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def restore_signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("arguments", [["imagenet"], [], ["cub", "a.tar", "b.tar"], ["-x"]])
def test_bad_arguments_end_with_one_line(tmp_path, monkeypatch, arguments):
    monkeypatch.setattr(module, "fetch", lambda *_: pytest.fail("accepted"))
    status, _, said = run("fetch.py", *arguments, cwd=tmp_path)
    assert (status, said.count("\n")) == (2, 1)
    if arguments == ["imagenet"]:
        assert all(name in said for name in PUBLISHED)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("when", ["download", "extraction"])
def test_a_stopped_command_ends_with_130_and_keeps_its_download(tmp_path, monkeypatch, number, when):
    monkeypatch.setattr(module, "PROJECT", tmp_path)
    into = tmp_path / "datasets"

    def download(out):
        if when == "download":
            out.with_name("cub.tar.part1234.part").write_text("half")
            os.kill(os.getpid(), number)
        tar(out, ("cub/a", b"x"))

    pretend_gdown(monkeypatch, download)
    if when == "extraction":
        monkeypatch.setattr(archives.Archive, "chunks", lambda *_: os.kill(os.getpid(), number))
    status, _, said = run("fetch.py", "cub", cwd=tmp_path)
    assert (status, said.count("\n"), said[:12]) == (130, 2, "\ninterrupted")
    assert [path.name for path in into.iterdir()] == [
        "cub.tar.part1234.part" if when == "download" else "cub.tar.part"  # what the next call resumes
    ]


@pytest.mark.parametrize("kind", ["pretrain", "trained"])
def test_the_shell_scripts_pass_their_arguments_on(tmp_path, kind):
    project = tmp_path / "project"
    project.mkdir()
    script = shutil.copy(ROOT / f"download_{kind}_model.sh", project)
    environment = {**os.environ, "PYTHON": "echo"}
    done = subprocess.run(["bash", script, "a b.tar"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == f"{project}/datasets/fetch.py {kind}_model a b.tar\n"


@pytest.mark.parametrize(("free", "is_new", "warned"), [(6e6, True, True), (8e6, True, False), (6e6, False, False)])
def test_an_installation_that_the_disk_may_be_too_small_for_is_warned_of(tmp_path, free, is_new, warned):
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name, does in ((".venv/bin/python", ""), ("df", f"echo head; echo disk 9 9 {free:.0f} 9 /")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    for name in ("a.txt", *([] if is_new else [".venv/installed-from-a.txt"])):  # of an earlier a.txt
        (tmp_path / name).write_text(name)
    script = f'set -euo pipefail; PATH="$PWD:$PATH"; . "{ROOT}/install.sh"; install a.txt'
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("warning: 6.1 GB of disk space are free; .venv needs about 7 GB") == warned


def git(*arguments: object, cwd: Path = ROOT) -> str:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone")
    return subprocess.run(["git", *map(str, arguments)], cwd=cwd, capture_output=True, text=True).stdout


def test_a_clone_with_autocrlf_has_scripts_that_run(tmp_path):
    git("-c", "core.autocrlf=true", "clone", "-q", "--depth", "1", ROOT.as_uri(), tmp_path / "clone")
    scripts = [*(tmp_path / "clone").rglob("*.sh"), tmp_path / "clone" / ".ci" / "run"]
    assert len(scripts) > 3
    assert not [path.name for path in scripts if b"\r" in path.read_bytes()]


def test_git_ignores_data_and_what_builds_leave_but_no_source():
    ignored = [
        "datasets/.FC100.lock",
        "datasets/.FC100.part/a",
        ".a.tar.lock",
        ".a.tar.extracting/a",
        "datasets/cub/a.jpg",
    ]
    tracked = ["datasets/a.py", "datasets/recipes/a.py", "pictures/a.py"]
    assert git("check-ignore", *ignored, *tracked).split() == ignored
