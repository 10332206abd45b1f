"""Building data sets from small sources in the official formats; downloads from a server on the loopback."""

import hashlib
import io
import json
import os
import pickle
import re
import signal
import sys
import tarfile
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import data_helpers
import download as downloads
import folders
import numpy as np
import prepare as module
import pytest
import recipes
import sources
from download import Remote, download
from folders import exclusive
from PIL import Image
from prepare import main

from dataloader import published
from dataloader.catalog import CATALOG
from dataloader.readers import read_split
from utils import InputError


def picture(seed: int, size: tuple[int, int] = (32, 32), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def tar_bytes(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def save(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def unpack(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        save(folder / name, content)
    return folder


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def tree(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the manifest."""
    return {name: content for name, content in data_helpers.tree(folder).items() if name != folders.MANIFEST}


def build(name: str, out: Path, *flags: object, source: object = None) -> None:
    main([name, "-out", str(out), *(["-source", str(source)] if source else []), *map(str, flags)])


def refused(name: str, out: Path, *flags: object, source: object = None) -> str:
    with pytest.raises(InputError) as caught:
        build(name, out, *flags, source=source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def publish(monkeypatch, classes: dict[str, dict[str, int | None]], **more) -> None:
    monkeypatch.setattr(published, "published_classes", lambda name: classes)
    totals = {split: sum(n or 0 for n in counts.values()) or None for split, counts in classes.items()}
    monkeypatch.setattr(published, "published_images", lambda name, split: totals.get(split))
    for name, value in more.items():
        monkeypatch.setattr(published, name, value)


# --- CIFAR-100 --------------------------------------------------------------------------------------------------------

CIFAR = {
    f"{part}/{label}/{label}_s_{number:06d}.png": picture(1000 * number + len(label) + (part == "test"))
    for label in ("apple", "bear", "castle")
    for part, numbers in (("train", range(3)), ("test", range(3, 5)))
    for number in numbers
}


def cifar_pickles(images: dict[str, bytes] = CIFAR) -> dict[str, bytes]:
    names = sorted({name.split("/")[1] for name in images})
    found = {"meta": pickle.dumps({"fine_label_names": names}, protocol=2)}
    for part in ("train", "test"):
        of_part = sorted((name for name in images if name.startswith(part)), key=hash)
        pixels = [np.asarray(Image.open(io.BytesIO(images[name]))).transpose(2, 0, 1).ravel() for name in of_part]
        table = {
            "filenames": [name.split("/")[2] for name in of_part],
            "fine_labels": [names.index(name.split("/")[1]) for name in of_part],
            "data": np.stack(pixels),
        }
        found[part] = pickle.dumps(table, protocol=2)
    return {f"cifar-100-python/{name}": content for name, content in found.items()}


@pytest.fixture
def cifar(tmp_path, monkeypatch) -> Path:
    """A source of all images that are published."""
    publish(monkeypatch, {"train": {"apple": 5}, "val": {"bear": 5}, "test": {"castle": 5}})
    return zipped(tmp_path / "cifar.zip", CIFAR)


def cifar_sources(folder: Path) -> dict[str, Path]:
    archive = tar_bytes(cifar_pickles(), "w:gz")
    return {
        "zip": zipped(folder / "cifar100.zip", {f"cifar100/{name}": content for name, content in CIFAR.items()}),
        "tree": unpack(folder / "tree", {**CIFAR, "train/apple/._x.png": b"", "train/unknown/a.png": b"x"}),
        "archive": save(folder / "cifar-100-python.tar.gz", archive),
        "pickles": unpack(folder / "unpacked", cifar_pickles()),
        "root of torchvision": save(folder / "root" / "cifar-100-python.tar.gz", archive).parent,
    }


@pytest.mark.parametrize("name", ["fc100", "cifar_fs"])
def test_cifar_is_the_same_from_every_source(tmp_path, cifar, name):
    folders = {"train": "train", "val": "val", "test": "test"} | CATALOG[name].split_folders
    label = {"train": "apple", "val": "bear", "test": "castle"}
    for kind, source in cifar_sources(tmp_path).items():
        out = tmp_path / "out" / kind
        build(name, out, source=source)
        expected = {path.split("/", 1)[1]: content for path, content in CIFAR.items()}
        built = tree(out / CATALOG[name].folders[0])
        assert {path.split("/", 1)[1]: content for path, content in built.items()} == expected, kind
        for split, folder in folders.items():
            paths, _, names = read_split(CATALOG[name], str(out), split)
            assert (len(paths), names) == (5, [label[split]])
            assert all(path.startswith(f"{out / CATALOG[name].folders[0] / folder}/") for path in paths)


def test_several_sources_are_read_as_one(tmp_path, cifar):
    one = {name: content for name, content in CIFAR.items() if name.startswith("train")}
    other = {name: content for name, content in CIFAR.items() if name not in one}
    given = [str(unpack(tmp_path / "one", one)), str(unpack(tmp_path / "other", other))]
    main(["fc100", "-source", *given, "-out", str(tmp_path)])
    assert sorted(tree(tmp_path / "FC100").values()) == sorted(CIFAR.values())
    main(["fc100", "-source", *given, given[0], "-out", str(tmp_path / "again")])
    assert tree(tmp_path / "again" / "FC100") == tree(tmp_path / "FC100")


def test_the_manifest_records_what_was_built(tmp_path, cifar):
    build("fc100", tmp_path, source=cifar)
    record = json.loads((tmp_path / "FC100" / folders.MANIFEST).read_text())
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in tree(tmp_path / "FC100").items()}
    assert record["sha256"] == folders.tree_hash(digests)
    assert record["splits"]["val"] == {"classes": 1, "images": 5, "per_class": {"bear": 5}}
    assert (record["dataset"], record["source"], record["recipe"]) == ("fc100", "cifar.zip", module.RECIPE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FC100", "cifar.zip"]


def test_a_second_run_changes_nothing_and_other_options_are_refused(tmp_path, cifar, capsys):
    build("fc100", tmp_path, source=cifar)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "FC100").rglob("*")}
    build("fc100", tmp_path, source=cifar)
    assert "complete, built from cifar.zip: nothing to do" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "FC100").rglob("*")}
    assert "built with other options" in refused("fc100", tmp_path, "-allow_missing", source=cifar)
    for name, content in (("x.png", b"x"), (folders.MANIFEST, b"[" * 100_000)):
        save(tmp_path / "other" / "FC100" / name, content)
        message = refused("fc100", tmp_path / "other", source=cifar)
        assert "was not built by this script. Remove it to rebuild" in message
    assert (tmp_path / "other" / "FC100" / "x.png").read_bytes() == b"x"


def test_recipes_build_the_folders_that_the_scripts_read():
    known = {name: recipe.folder for name, recipe in module.RECIPES.items() if name in CATALOG}
    assert known == {name: CATALOG[name].folders[0] for name in CATALOG if name not in ("folder", "glyphs")}


def test_dry_run_writes_nothing(tmp_path, cifar, capsys):
    build("fc100", tmp_path / "out", "-dry_run", source=cifar)
    assert "1/1/1 classes, 5/5/5 images" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    build("cub", tmp_path / "out", "-dry_run")
    assert "would download https://data.caltech.edu" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["interrupt", "kill"])
def test_a_stopped_run_is_resumed(tmp_path, cifar, monkeypatch, how):
    make, made = module._make, []

    def interrupted(name, *rest):
        if len(made) == 7:
            if how == "kill":
                save(rest[2].with_name(rest[2].name + ".part"), b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            raise KeyboardInterrupt
        made.append(name)
        return make(name, *rest)

    monkeypatch.setattr(module, "_make", interrupted)
    monkeypatch.setattr(module, "available_cores", lambda: 1)
    arguments = ["fc100", "-source", str(cifar), "-out", str(tmp_path)]
    if how == "kill":
        child = os.fork()
        if not child:
            main(arguments)
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    else:
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert not (tmp_path / "FC100").exists()
    with pytest.raises(InputError, match="no such folder"):
        read_split(CATALOG["fc100"], str(tmp_path), "train")
    again = []
    monkeypatch.setattr(module, "_make", lambda name, *rest: again.append(name) or make(name, *rest))
    main(arguments)
    assert len(again) == len(CIFAR) - 7
    assert len(tree(tmp_path / "FC100")) == len(CIFAR)
    assert not list(tmp_path.glob(".FC100*"))


def test_unfinished_work_of_another_source_is_not_used(tmp_path, cifar):
    save(tmp_path / ".FC100.part" / "train" / "apple" / "apple_s_000000.png", b"of something else")
    save(tmp_path / ".FC100.part" / module.STATE, b'{"source": "else"}')
    build("fc100", tmp_path, source=cifar)
    assert tree(tmp_path / "FC100")["train/apple/apple_s_000000.png"] == CIFAR["train/apple/apple_s_000000.png"]


def test_a_data_set_is_built_by_one_process_at_a_time(tmp_path, cifar):
    with data_helpers.locked_by_another_process(tmp_path / "out" / "FC100"):
        assert "Wait for it to finish" in refused("fc100", tmp_path / "out", source=cifar)
    build("fc100", tmp_path / "out", source=cifar)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["FC100"]


def test_a_set_that_another_process_has_just_finished_is_kept(tmp_path, cifar, monkeypatch, capsys):
    arguments = ["fc100", "-source", str(cifar), "-out", str(tmp_path)]

    def after_another_process(target):
        monkeypatch.setattr(module, "exclusive", exclusive)
        main(arguments)
        return exclusive(target)

    monkeypatch.setattr(module, "exclusive", after_another_process)
    main(arguments)
    assert "is complete, built from cifar.zip" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["FC100", "cifar.zip"]


# --- Sources that are not as they should be ---------------------------------------------------------------------------


def without(*names: str) -> dict[str, bytes]:
    return {name: content for name, content in CIFAR.items() if not name.startswith(names)}


def test_an_incomplete_source_is_refused_unless_allowed(tmp_path, cifar, capsys):
    lacking = zipped(tmp_path / "a.zip", without("test/bear/bear_s_000003.png", "train/castle", "test/castle"))
    message = refused("fc100", tmp_path, source=lacking)
    assert "no image of the test class castle, 4 of 5 images of the val class bear" in message
    assert "-allow_missing" in message
    assert not (tmp_path / "FC100").exists()
    build("fc100", tmp_path, "-allow_missing", source=lacking)
    assert "will be incomplete" in capsys.readouterr().err
    assert len(tree(tmp_path / "FC100")) == 9
    assert json.loads((tmp_path / "FC100" / folders.MANIFEST).read_text())["lacks"][0].startswith("no image")


@pytest.mark.parametrize(
    "asked", ["numpy.f2py.__main__ ndarray", "numpy.ma.core _reconstruct", "numpy save", "os system"]
)
def test_a_pickle_is_refused_before_anything_it_names_is_imported(tmp_path, cifar, asked):
    before = {*sys.modules}
    bad = {"cifar-100-python/meta": b"\x80\x02c" + asked.replace(" ", "\n").encode() + b"\n."}
    message = refused("fc100", tmp_path, source=save(tmp_path / "a.tar", tar_bytes(cifar_pickles() | bad)))
    assert f"asks to run {asked.replace(' ', '.')}, which is refused" in message
    assert {*sys.modules} == before


def test_pickles_of_bytes_are_read_and_their_codec_is_not_imported():
    assert recipes.cifar._unpickle(pickle.dumps({"a": b"\xff\x00x"}, protocol=2)) == {"a": b"\xff\x00x"}
    pushed = b"\x80\x02c_codecs\nencode\n" + b"X\x01\0\0\0a" + b"X\x04\0\0\0idna" + b"\x86R."
    before = sys.modules.pop("encodings.idna", None)
    assert recipes.cifar._unpickle(pushed) == b"a"
    assert "encodings.idna" not in sys.modules
    if before:
        sys.modules["encodings.idna"] = before


@pytest.mark.parametrize("meta", [{"fine_label_names": 3}, {"fine_label_names": []}, {}, [], b""])
def test_pickles_that_are_not_those_of_cifar_end_with_one_line(tmp_path, cifar, meta):
    files = cifar_pickles() | {"cifar-100-python/meta": pickle.dumps(meta)}
    source = save(tmp_path / "a.tar", tar_bytes(files))
    assert "is broken or incomplete" in refused("fc100", tmp_path / "out", source=source)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("key", "change", "found"),
    [
        ("data", lambda pixels: pixels.astype(float), "are not bytes"),
        ("fine_labels", lambda labels: [-1] * len(labels), "a label is negative"),
        ("filenames", lambda files: ["\0" + file for file in files], "embedded null byte"),
        ("filenames", lambda files: ["\ud800" + file for file in files], "surrogates not allowed"),
        ("data", None, "needs more memory than there is"),
    ],
)
def test_tables_that_are_not_those_of_cifar_end_with_one_line(tmp_path, cifar, key, change, found):
    files = cifar_pickles()
    table = pickle.loads(files["cifar-100-python/train"])
    changed = pickle.dumps(table | {key: change(table[key])}) if change else b""
    terabyte = b"cnumpy\nndarray\n((I999999999999999\ntcnumpy\ndtype\n(S'u1'\ntRtR."
    files["cifar-100-python/train"] = changed or terabyte
    source = save(tmp_path / "a.tar", tar_bytes(files))
    assert found in refused("fc100", tmp_path / "out", "-allow_missing", source=source)
    assert not (tmp_path / "out" / "FC100").exists()


def test_a_name_that_an_archive_holds_twice_is_written_once(tmp_path, cifar, monkeypatch):
    source = tmp_path / "a.tar"
    with tarfile.open(source, "w") as archive:
        for name, content in 2 * list(CIFAR.items()):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    made, make = [], module._make
    monkeypatch.setattr(module, "_make", lambda name, *rest: made.append(name) or make(name, *rest))
    build("fc100", tmp_path, source=source)
    assert sorted(made) == sorted(CIFAR)
    assert len(tree(tmp_path / "FC100")) == len(CIFAR)


def test_a_full_disk_leaves_whole_images_under_their_names(tmp_path, cifar, monkeypatch):
    write = Path.write_bytes

    def fill(path, content):
        write(path, content[:9] if "bear" in path.name else content)
        if "bear" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    with pytest.raises(OSError, match="No space left"):
        build("fc100", tmp_path, source=cifar)
    kept = {name: content for name, content in tree(tmp_path / ".FC100.part").items() if name.endswith(".png")}
    assert 0 < len(kept) < len(CIFAR)
    assert all(content in CIFAR.values() for content in kept.values())


def test_a_run_that_wrote_no_image_leaves_nothing(tmp_path, cifar):
    for source in ("nowhere", zipped(tmp_path / "other.zip", {"a/b.png": b"x"}), save(tmp_path / "x.zip", b"PK")):
        refused("fc100", tmp_path / "out", source=source)
        assert list((tmp_path / "out").iterdir()) == []


def test_broken_sources_end_with_one_line(tmp_path, cifar):
    good = tar_bytes({f"cifar/{name}": content for name, content in CIFAR.items()})
    packed = zipped(tmp_path / "good.zip", CIFAR).read_bytes()
    spoilt = bytearray(packed)
    spoilt[200] ^= 1
    no_images = {"train/apple/apple_s_000000.png": b"no image", "test/bear/bear_s_000003.png": b""}
    for content, expected in (
        (good[: len(good) // 2], "is broken or incomplete"),
        (packed[: len(packed) // 2], "neither a tar nor a zip archive"),
        (bytes(spoilt), "is broken or incomplete .Bad CRC-32"),
        (
            tar_bytes({f"{k}/{name}": CIFAR[name] for name in CIFAR for k in "xy"}),
            "has duplicate images: .* and 12 more",
        ),
        (
            tar_bytes({f"x/{name}": no_images.get(name, content) for name, content in CIFAR.items()}),
            r"apple_s_000000.png is not a readable image \(cannot identify image file\), .*bear_s_000003.png is not",
        ),
        (tar_bytes(cifar_pickles() | {"cifar-100-python/test": b"\x80\x02"}), "is broken or incomplete"),
        (tar_bytes({"a/b/c.png": b""}), "no image of this data set"),
        (b"no archive at all", "neither a tar nor a zip archive"),
    ):
        out = tmp_path / hashlib.sha256(content).hexdigest()
        message = refused("fc100", out, source=save(out / "source", content))
        assert re.search(expected, message), (message, expected)
        assert not (out / "FC100").exists()
    expected = f"cannot write {tmp_path}/cifar.zip/.FC100.lock ({tmp_path}/cifar.zip is a file, not a folder)"
    assert refused("fc100", cifar, source=cifar) == expected
    assert "there is no file or folder" in refused("fc100", tmp_path, source=tmp_path / "nowhere")
    assert "ILSVRC2012_img_train.tar from image-net.org" in refused("tieredimagenet", tmp_path)


def test_flags_of_other_data_sets_are_refused(tmp_path, capsys):
    for arguments, expected in (
        (["fc100", "-size", "20"], "-size requires one of cub, miniimagenet, tieredimagenet"),
        (["fc100", "-no_crop"], "-no_crop requires cub"),
        (["imagenet"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2
        assert expected in capsys.readouterr().err


# --- ImageNet ---------------------------------------------------------------------------------------------------------

# As in ImageNet, numbers are neither consecutive nor in the order of their names: 7 comes before 10.
NUMBERS = {"n01532829": (2, 7, 10, 18, 103), "n01558993": (1, 5, 60, 61, 700), "n01704323": (3, 4, 5, 6, 8)}
PLACES = {"n01532829": (1, 3, 5), "n01558993": (2, 3, 4), "n01704323": (1, 2, 5)}
IMAGENET = {
    (wnid, number): picture(number, (60 + number % 7, 50), "JPEG")
    for wnid, numbers in NUMBERS.items()
    for number in numbers
}
OTHER_CLASS = {("n09999999", 1): picture(1, kind="JPEG")}
MINI = {
    f"images/{wnid}{place:08d}.jpg": IMAGENET[wnid, NUMBERS[wnid][place - 1]]
    for wnid in PLACES
    for place in PLACES[wnid]
}


@pytest.fixture
def imagenet(monkeypatch):
    classes = {split: {wnid: 3} for split, wnid in zip(("train", "val", "test"), NUMBERS, strict=True)}
    names = {wnid: wnid for wnid in NUMBERS} | dict(zip(("house finch", "robin", "triceratops"), NUMBERS, strict=True))
    publish(monkeypatch, classes, miniimagenet_numbers=lambda: PLACES, wnids=lambda name: names)
    monkeypatch.setattr(recipes.imagenet, "PER_CLASS", 3)
    monkeypatch.setattr(recipes.imagenet, "MOST_PER_CLASS", 5)


def imagenet_files(pattern: str) -> dict[str, bytes]:
    return {pattern.format(wnid, number): content for (wnid, number), content in (IMAGENET | OTHER_CLASS).items()}


def tar_of_tars() -> bytes:
    images = {wnid: {} for wnid in (*NUMBERS, "n09999999")}
    for (wnid, number), content in (IMAGENET | OTHER_CLASS).items():
        images[wnid][f"{wnid}_{number}.JPEG"] = content
    return tar_bytes({f"{wnid}.tar": tar_bytes(of_class) for wnid, of_class in images.items()})


def parquet(
    path: Path, rows: list[tuple[bytes, str | None, int | str]], names: list[str] | None = None, boxes=None
) -> Path:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    columns = {
        "image": pa.array([{"bytes": content, "path": name} for content, name, _ in rows]),
        "label": pa.array([label for _, _, label in rows]),
    }
    if boxes:
        columns["bbox"] = pa.array(boxes)
    table = pa.table(columns)
    if names:
        facts = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(facts)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)
    return path


def imagenet_parquet(folder: Path) -> Path:
    """Shuffled rows in two shards, names with the class doubled."""
    rows = [
        (content, f"{w}_{n}_{w}.JPEG", sorted(NUMBERS).index(w) if w in NUMBERS else 3)
        for (w, n), content in sorted((IMAGENET | OTHER_CLASS).items(), key=lambda item: hash(item[1]))
    ]
    names = ["house finch, linnet", "robin", "triceratops", "other"]
    validation = (picture(99, kind="JPEG"), "ILSVRC2012_val_00000001_n01532829.JPEG", 0)
    parquet(folder / "data" / "train-00000-of-00002.parquet", rows[:7], names)
    parquet(folder / "data" / "train-00001-of-00002.parquet", rows[7:], names)
    parquet(folder / "data" / "validation-00000-of-00001.parquet", [validation], names)
    return folder


def imagenet_sources(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    kaggle = imagenet_files("ILSVRC/Data/CLS-LOC/train/{0}/{0}_{1}.JPEG")
    other = {"ILSVRC/Annotations/n01532829_2.xml": b"", "ILSVRC/Data/CLS-LOC/val/ILSVRC2012_val_00000001.JPEG": b""}
    class_tars = {
        f"{wnid}.tar": tar_bytes({f"{wnid}_{n}.JPEG": IMAGENET[wnid, n] for n in NUMBERS[wnid]}) for wnid in NUMBERS
    }
    return {
        "tar of tars": save(folder / "ILSVRC2012_img_train.tar", tar_of_tars()),
        "kaggle": zipped(folder / "kaggle.zip", kaggle | other),
        "tar": save(folder / "train.tar", tar_bytes(kaggle)),
        "tgz": save(folder / "train.tgz", tar_bytes(kaggle, "w:gz")),
        "folder": unpack(folder / "tree", kaggle | other),
        "class tars": unpack(folder / "tars", class_tars),
        "parquet": imagenet_parquet(folder / "hub"),
    }


def test_miniimagenet_is_the_same_from_every_source(tmp_path, imagenet):
    for kind, source in imagenet_sources(tmp_path / "from").items():
        build("miniimagenet", tmp_path / kind, source=source)
        built = tree(tmp_path / kind / "miniimagenet")
        tables = {name: built.pop(name).decode() for name in list(built) if name.endswith(".csv")}
        assert built == MINI, kind
        assert tables["split/val.csv"].splitlines() == [
            "filename,label",
            *(f"n01558993{place:08d}.jpg,n01558993" for place in PLACES["n01558993"]),
        ]
        paths, _, names = read_split(CATALOG["miniimagenet"], str(tmp_path / kind), "train")
        assert (len(paths), names) == (3, ["n01532829"])


def test_miniimagenet_notices_lost_files(tmp_path, imagenet, capsys):
    files = imagenet_files("{0}/{0}_{1}.JPEG")
    del files["n01532829/n01532829_7.JPEG"]
    message = refused("miniimagenet", tmp_path, source=unpack(tmp_path / "from", files))
    assert "2 of 3 images of the train class n01532829" in message


CHOSEN = [(content, *key) for key, content in IMAGENET.items() if NUMBERS[key[0]].index(key[1]) + 1 in PLACES[key[0]]]


@pytest.mark.parametrize(
    ("naming", "note"), [("imagenet", None), ("published", None), ("none", "is not verified"), ("other", "another one")]
)
def test_miniimagenet_is_built_from_parquet_files_whatever_their_names(tmp_path, imagenet, capsys, naming, note):
    """600 images a class, chosen by somebody else; its test split is not part of miniImageNet."""
    name = {
        "imagenet": lambda wnid, number: f"{wnid}_{number}.JPEG",
        "published": lambda wnid, number: f"{wnid}{NUMBERS[wnid].index(number) + 1:08d}.jpg",
        "none": lambda wnid, number: None,
        "other": lambda wnid, number: f"{wnid}_{NUMBERS[wnid].index(number) * 2}.JPEG",
    }[naming]
    rows = [(content, name(wnid, number), list(NUMBERS).index(wnid)) for content, wnid, number in CHOSEN]
    names = ["house finch", "n01558993", "Triceratops"]
    parquet(tmp_path / "hub" / "train-00000-of-00001.parquet", rows[:5], names)
    parquet(tmp_path / "hub" / "validation-00000-of-00001.parquet", rows[5:], names)
    parquet(tmp_path / "hub" / "test-00000-of-00001.parquet", [(picture(5), None, 0)], names)
    build("miniimagenet", tmp_path, source=tmp_path / "hub")
    built = {path: content for path, content in tree(tmp_path / "miniimagenet").items() if "split" not in path}
    assert sorted(built.values()) == sorted(MINI.values())
    assert len(read_split(CATALOG["miniimagenet"], str(tmp_path), "test")[0]) == 3
    assert (built == MINI) == (note is None)
    printed = capsys.readouterr().err
    assert note in printed if note else "note:" not in printed


def test_tieredimagenet_holds_every_image_of_its_classes_shrunk(tmp_path, imagenet, monkeypatch):
    publish(monkeypatch, {split: {wnid: None} for split, wnid in zip(("train", "val", "test"), NUMBERS, strict=True)})
    monkeypatch.setattr(published, "published_images", lambda name, split: 5)
    for kind, source in imagenet_sources(tmp_path / "from").items():
        build("tieredimagenet", tmp_path / kind, "-size", "40", source=source)
        root = tmp_path / kind / "tiered_imagenet"
        assert sorted(tree(root)) == sorted(
            f"{split}/{wnid}/{wnid}_{number}.JPEG"
            for split, wnid in zip(("train", "val", "test"), NUMBERS, strict=True)
            for number in NUMBERS[wnid]
        ), kind
        with Image.open(root / "train" / "n01532829" / "n01532829_10.JPEG") as image:
            assert image.size == (round(63 * 40 / 50), 40)
    source = tmp_path / "from" / "ILSVRC2012_img_train.tar"
    for size, same in ((["-size", "0"], True), ([], True), (["-size", "49"], False)):
        out = tmp_path / "".join(("size", *size))
        build("tieredimagenet", out, *size, source=source)
        content = (out / "tiered_imagenet/val/n01558993/n01558993_60.JPEG").read_bytes()
        assert (content == IMAGENET["n01558993", 60]) is same


# --- CUB --------------------------------------------------------------------------------------------------------------

BIRDS = {
    f"{label}/{label[4:]}_{n:04d}_{n}.jpg": picture(n, (90, 70), "JPEG")
    for label in ("001.Auk", "002.Wren", "003.Gull")
    for n in (1, 2)
}
BOX = (10.0, 20.0, 30.0, 40.0)  # x, y, width, height


def cub_files(**changed: str) -> dict[str, bytes]:
    images = list(enumerate(BIRDS, 1))
    tables = {
        "images.txt": "".join(f"{n} {name}\n" for n, name in images),
        "bounding_boxes.txt": "".join(f"{n} {' '.join(map(str, BOX))}\n" for n, _ in images),
        "image_class_labels.txt": "".join(f"{n} {int(name[:3])}\n" for n, name in images),
    } | changed
    files = {f"CUB_200_2011/images/{name}": content for name, content in BIRDS.items()}
    return files | {f"CUB_200_2011/{name}": text.encode() for name, text in tables.items() if text}


@pytest.fixture
def cub(monkeypatch):
    publish(monkeypatch, {"train": {"002.Wren": 2}, "val": {"001.Auk": 2}, "test": {"003.Gull": 2}})


def test_cub_is_cropped_to_its_boxes_unless_told_otherwise(tmp_path, cub):
    files = cub_files()
    for kind, source in {
        "tgz": save(tmp_path / "CUB_200_2011.tgz", tar_bytes(files, "w:gz")),
        "folder": unpack(tmp_path / "from", files),
    }.items():
        build("cub", tmp_path / kind, source=source)
        built = tree(tmp_path / kind / "cub")
        assert {name for name in built if name.endswith(".jpg")} == {f"images/{name}" for name in BIRDS}
        with Image.open(tmp_path / kind / "cub" / "images/002.Wren/Wren_0001_1.jpg") as image:
            assert image.size == (30, 40)
            whole = np.asarray(Image.open(io.BytesIO(BIRDS["002.Wren/Wren_0001_1.jpg"])), dtype=float)
            assert abs(np.asarray(image, dtype=float) - whole[20:60, 10:40]).mean() < 4  # JPEG of noise, twice
        assert read_split(CATALOG["cub"], str(tmp_path / kind), "train")[2] == ["002.Wren"]
        build("cub", tmp_path / kind / "whole", "-no_crop", source=source)
        built = tree(tmp_path / kind / "whole" / "cub")
        assert all(built[f"images/{name}"] == content for name, content in BIRDS.items())


def test_missing_or_wrong_tables_of_cub_are_named(tmp_path, cub):
    for number, (changed, expected) in enumerate(
        (
            ({"bounding_boxes.txt": ""}, "('bounding_boxes.txt'): images.txt needs"),
            ({"images.txt": ""}, "('images.txt'): images.txt needs"),
            ({"bounding_boxes.txt": "1 2 3\n"}, "'id x y width height'"),
            ({"bounding_boxes.txt": "1 10 20 30 40\n"}, "has no bounding box"),
            (
                {"bounding_boxes.txt": "".join(f"{n} 80 20 30 40\n" for n in range(1, 7))},
                "not within the image's 90 x 70 pixels",
            ),
        )
    ):
        source = save(tmp_path / f"{number}.tar", tar_bytes(cub_files(**changed)))
        assert expected in refused("cub", tmp_path, source=source)
    assert not (tmp_path / "cub").exists()


def test_cub_is_built_from_parquet_files(tmp_path, cub):
    """Boxes as left, upper, right, lower; classes by number or name; no file names."""
    corners = [10, 20, 40, 60]
    names = sorted({name.split("/")[0] for name in BIRDS})
    rows = [(content, None, names.index(name.split("/")[0])) for name, content in BIRDS.items()]
    parquet(tmp_path / "hub" / "train-0.parquet", rows[:3], names, [corners] * 3)
    parquet(tmp_path / "hub" / "test-0.parquet", rows[3:], names, [corners] * 3)
    build("cub", tmp_path, source=tmp_path / "hub")
    with Image.open(tmp_path / "cub/images/001.Auk/train-0_00001.jpg") as image:
        assert image.size == (30, 40)
    assert len(read_split(CATALOG["cub"], str(tmp_path), "test")[0]) == 2
    parquet(tmp_path / "hub" / "test-0.parquet", rows[3:], None, [[60, 20, 30, 40]] * 3)  # x, y, width, height
    assert "left, upper, right, lower" in refused("cub", tmp_path / "wrong", source=tmp_path / "hub")


def test_omniglot_is_split_by_script(tmp_path, monkeypatch):
    monkeypatch.setattr(recipes.omniglot, "DRAWINGS", {"train": 6, "val": 4, "test": 6})
    files = [
        {f"images_background_small{n}/{script}/character01/{k}.png": picture(k) for script in scripts for k in (1, 2)}
        for n, scripts in (
            (1, ("Balinese", "Early_Aramaic", "Greek", "Korean", "Latin")),
            (2, ("Greek", "Japanese_(katakana)", "Latin", "Sanskrit", "Tagalog")),
        )
    ]
    zips = [zipped(tmp_path / f"images_background_small{n}.zip", content) for n, content in enumerate(files, 1)]
    main(["omniglot", "-source", *map(str, zips), "-out", str(tmp_path / "a")])
    build("omniglot", tmp_path / "b", source=tmp_path)
    assert tree(tmp_path / "a" / "omniglot") == tree(tmp_path / "b" / "omniglot")
    for split, scripts in (("train", "JST"), ("val", "BE"), ("test", "GKL")):
        names = read_split(CATALOG["folder"], str(tmp_path / "a" / "omniglot"), split)[2]
        assert "".join(name[0] for name in names) == scripts
    assert "0 of 6 train drawings" in refused("omniglot", tmp_path / "c", source=zips[0])


# --- Downloads --------------------------------------------------------------------------------------------------------

CONTENT = np.random.default_rng(0).bytes(300_000)


class Server(ThreadingHTTPServer):
    """Serves ``files`` with ranges. ``drop`` cuts answers off after so many bytes, as often as it says."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.status: dict[str, int] = {}
        self.redirect: dict[str, str] = {}
        self.drop, self.drops, self.ranges = 0, 0, True
        self.seen: list[tuple[str, str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:  # noqa: N802 - the library's name
        server, path, asked = self.server, self.path, self.headers.get("Range")
        server.seen.append((self.command, path, dict(self.headers)))
        if path in server.status or path not in server.files | server.redirect:
            self.send_error(server.status.get(path, 404))
        elif path in server.redirect:
            self.answer(302, ("Location", server.redirect[path]))
        elif not (asked and server.ranges):
            self.answer(200, body=server.files[path])
        else:
            content = server.files[path]
            start, _, end = asked.removeprefix("bytes=").partition("-")
            body = content[int(start) : int(end or len(content)) + 1]
            found = f"{start}-{int(start) + len(body) - 1}" if body else "*"
            self.answer(206 if body else 416, ("Content-Range", f"bytes {found}/{len(content)}"), body=body)

    def answer(self, status: int, *headers: tuple[str, str], body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        if body and self.server.drops:
            self.server.drops -= 1
            body = body[: self.server.drop]
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.001)
    for name in ("HF_TOKEN", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def digest(content: bytes, kind: str = "sha256") -> str:
    return f"{kind}:{hashlib.new(kind, content).hexdigest()}"


def test_download_survives_lost_connections(tmp_path, server):
    server.files["/a"] = CONTENT
    server.drop, server.drops = 100_000, 2
    path = download(Remote(server.url + "/a", len(CONTENT), digest(CONTENT, "md5")), tmp_path / "a")
    assert path.read_bytes() == CONTENT
    assert [seen[2].get("Range") for seen in server.seen] == [None, "bytes=65536-", "bytes=131072-"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("ranges", [True, False])
def test_download_continues_what_a_killed_process_left(tmp_path, server, ranges):
    server.files["/a"], server.ranges = CONTENT, ranges
    save(tmp_path / "a.part", CONTENT[:123_456])
    assert download(Remote(server.url + "/a", digest=digest(CONTENT)), tmp_path / "a").read_bytes() == CONTENT
    assert server.seen[0][2]["Range"] == "bytes=123456-"


def test_a_partial_file_may_be_complete_or_of_another_file(tmp_path, server):
    server.files["/a"] = CONTENT
    remote = Remote(server.url + "/a", digest=digest(CONTENT))
    save(tmp_path / "a.part", CONTENT)
    assert download(remote, tmp_path / "a").read_bytes() == CONTENT
    save(tmp_path / "b.part", CONTENT + b"longer")
    assert download(remote, tmp_path / "b").read_bytes() == CONTENT


def test_a_download_of_something_else_is_removed(tmp_path, server):
    server.files["/a"] = b"<html>quota exceeded</html>"
    for remote, expected in (
        (Remote(server.url + "/a", digest=digest(CONTENT)), "the sha256 .* instead of"),
        (Remote(server.url + "/a", size=len(CONTENT)), "27 bytes instead of 300000"),
    ):
        with pytest.raises(InputError, match=expected):
            download(remote, tmp_path / "a")
        assert not list(tmp_path.iterdir())


def test_a_refusal_is_final_and_an_overloaded_server_is_asked_again(tmp_path, server):
    server.status |= {"/terms": 403, "/broken": 503, "/gone": 410}
    for path, expected in (
        ("/terms", r"HTTP 403 Forbidden\). Accept the terms"),
        ("/none", r"HTTP 404 Not Found\). Check the name in -source and HF_ENDPOINT"),
        ("/gone", r"HTTP 410 Gone\). Check the name"),
        ("/broken", "attempts failed .*503"),
    ):
        with pytest.raises(InputError, match=expected):
            download(Remote(server.url + path, refused="Accept the terms"), tmp_path / "a")
    assert len([seen for seen in server.seen if seen[1] == "/broken"]) == downloads.ATTEMPTS
    with pytest.raises(InputError, match="attempts failed .*refused"):
        download(Remote("http://127.0.0.1:9/a"), tmp_path / "a")


def hub(server: Server, monkeypatch, repository: str, revision: str, folder: Path) -> None:
    """Serve a folder as Hugging Face serves a data set: facts in the listing, content behind a redirection."""
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    files = data_helpers.tree(folder)
    facts = {name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)} for name, data in files.items()}
    siblings = [{"rfilename": name, "lfs": lfs} for name, lfs in facts.items()] + [{"rfilename": "README.md"}]
    listing = json.dumps({"sha": revision, "siblings": siblings}).encode()
    server.files[f"/api/datasets/{repository}/revision/{revision}?blobs=true"] = listing
    for name, content in files.items():
        path = f"/datasets/{repository}/resolve/{revision}/{name}"
        server.redirect[path] = f"http://localhost:{server.server_port}/cdn/{name}"
        server.files[f"/cdn/{name}"] = content


def test_miniimagenet_downloads_from_the_hub(tmp_path, imagenet, server, monkeypatch):
    rows = [(content, f"{wnid}_{number}.JPEG", wnid) for content, wnid, number in CHOSEN]
    for number in range(3):
        parquet(tmp_path / "hub" / "data" / f"train-{number:05d}.parquet", rows[3 * number : 3 * number + 3])
    parquet(tmp_path / "hub" / "data" / "test-00000.parquet", [(picture(5), None, "n01532829")])
    repository, revision = module.RECIPES["miniimagenet"].hub.split("@")
    hub(server, monkeypatch, repository, revision, tmp_path / "hub")
    monkeypatch.setenv("HF_TOKEN", "secret")
    kept = []

    def count_and_download(remote, path):
        kept.append(len(list(path.parent.glob("*"))))
        return download(remote, path)

    monkeypatch.setattr(sources, "download", count_and_download)
    server.drop, server.drops = 2000, 1
    build("miniimagenet", tmp_path / "out")
    assert {path: content for path, content in tree(tmp_path / "out" / "miniimagenet").items() if "jpg" in path} == MINI
    assert kept == [0, 0, 0]  # one file at a time
    assert all("Range" in headers for _, path, headers in server.seen if "test-" in path)  # listed only
    tokens = {path.startswith("/cdn"): headers.get("Authorization") for _, path, headers in server.seen}
    assert tokens == {False: "Bearer secret", True: None}
    record = json.loads((tmp_path / "out" / "miniimagenet" / folders.MANIFEST).read_text())
    assert revision in record["source"]


def test_a_file_without_a_hash_on_the_hub_is_refused(tmp_path, imagenet, server, monkeypatch):
    parquet(tmp_path / "hub" / "train-0.parquet", [(picture(5), None, "n01532829")])
    hub(server, monkeypatch, "ILSVRC/imagenet-1k", "main", tmp_path / "hub")
    server.files[LISTING] = server.files[LISTING].replace(b'"lfs"', b'"blobId"')
    message = refused("tieredimagenet", tmp_path, source="hf://datasets/ILSVRC/imagenet-1k")
    assert "lists no parquet files with their SHA-256" in message


LISTING = "/api/datasets/ILSVRC/imagenet-1k/revision/main?blobs=true"


@pytest.mark.parametrize(("status", "at"), [(401, "listing"), (403, "listing"), (401, "file"), (403, "content")])
def test_every_refusal_of_the_hub_advises_on_the_token(tmp_path, imagenet, server, monkeypatch, status, at):
    parquet(tmp_path / "hub" / "train-0.parquet", [(picture(5), None, "n01532829")])
    hub(server, monkeypatch, "ILSVRC/imagenet-1k", "main", tmp_path / "hub")
    monkeypatch.setenv("HF_TOKEN", "old\n")
    path = "/datasets/ILSVRC/imagenet-1k/resolve/main/train-0.parquet"
    server.status[{"listing": LISTING, "file": path, "content": "/cdn/train-0.parquet"}[at]] = status
    message = refused("tieredimagenet", tmp_path / "out", source="hf://datasets/ILSVRC/imagenet-1k")
    assert f"HTTP {status}" in message
    assert f"accept the terms at {server.url}/datasets/ILSVRC/imagenet-1k" in message
    assert "HF_TOKEN to it (the present one is refused)" in message
    assert list((tmp_path / "out").iterdir()) == []


NOBODY = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("endpoint", "token", "expected"),
    [
        (NOBODY, "", "6 attempts failed .*refused"),
        *((endpoint, "", "Check HF_ENDPOINT") for endpoint in ("huggingface.co", "ftp://x", "http://", "http://[::1")),
        *((NOBODY, token, "Check HF_ENDPOINT and HF_TOKEN") for token in ("gehei\u00dfnis\u2026", "two\nlines")),
    ],
)
def test_a_hub_that_cannot_be_asked_ends_with_one_line(tmp_path, server, monkeypatch, endpoint, token, expected):
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("HF_TOKEN", token)
    assert re.search(expected, refused("tieredimagenet", tmp_path, source="hf://datasets/a b/\x7f"))


def test_a_listing_of_another_kind_is_named(tmp_path, imagenet, server, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    for content in (b"<html>", b"[]", b"{}", b'{"siblings": [1]}', b"\xff", b"[" * 100_000):
        server.files[LISTING] = content
        message = refused("tieredimagenet", tmp_path, source="hf://datasets/ILSVRC/imagenet-1k")
        assert "is not a list of files" in message


def test_a_download_is_resumed_and_verified_before_it_is_built_from(tmp_path, cub, server, monkeypatch):
    server.files["/CUB.tgz"] = content = tar_bytes(cub_files(), "w:gz")
    for wanted in ("md5:0", digest(content, "md5")):
        remote = Remote(server.url + "/CUB.tgz", size=len(content), digest=wanted)
        recipe = module.RECIPES["cub"]._replace(downloads={"CUB_200_2011.tgz": remote})
        monkeypatch.setitem(module.RECIPES, "cub", recipe)
        save(tmp_path / ".cub.part" / module.DOWNLOADS / "CUB_200_2011.tgz.part", content[:500])
        if wanted == "md5:0":
            assert "instead of 0" in refused("cub", tmp_path)
            assert not (tmp_path / "cub").exists()
        else:
            build("cub", tmp_path)
    assert [seen[2]["Range"] for seen in server.seen] == 2 * ["bytes=500-"]
    assert len(tree(tmp_path / "cub")) == len(BIRDS) + 3
    assert not list(tmp_path.glob(".cub*"))


def test_parquet_without_its_library_names_what_to_install(tmp_path, imagenet, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    save(tmp_path / "hub" / "a.parquet", b"PAR1")
    assert "pip install -r requirements-data.txt" in refused("miniimagenet", tmp_path, source=tmp_path / "hub")


def test_parquet_files_may_have_any_text_beside_the_schema():
    for text in (b"[" * 100_000, b"[]", b"{", b"\xff"):
        assert sources._class_names(SimpleNamespace(metadata={b"huggingface": text})) == []


def test_broken_parquet_ends_with_one_line(tmp_path, imagenet):
    good = parquet(tmp_path / "good" / "train-0.parquet", [(picture(5), None, "n01532829")] * 9).read_bytes()
    for content, expected in ((good[: len(good) // 2], "is broken"), (b"PAR1" * 9, "is broken")):
        source = save(tmp_path / "broken" / "train-0.parquet", content)
        assert expected in refused("miniimagenet", tmp_path, source=source)
    other = tmp_path / "other.parquet"
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a"]}), other)
    assert "needs the columns image and label" in refused("miniimagenet", tmp_path, source=other)
