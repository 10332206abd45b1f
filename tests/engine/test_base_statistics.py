"""Statistics of training nodes in the scripts: where they come from, where they are kept, and who reads them."""

import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import run, succeed, write_images
from torch.nn import functional as F

from dataloader.dataset import ImageDataset
from dataloader.views import make_view
from engine import statistics
from engine.evaluation import encode_images
from engine.run import RunFolder
from engine.statistics import PER_CLASS, prepare_statistics
from Models import DeepEMD
from Models.encoder import Encoder
from Models.statistics import NodeStatistics
from utils import STATISTICS_FILE, InputError

CPU = torch.device("cpu")
SMALL = ["-dataset", "folder", "-gpu", "cpu", "-image_size", "16", "-query", "2", "-way", "3", "-num_workers", "0"]
SMALL += ["-solver", "simplex", "-backbone", "conv4"]


class Colours(Encoder):
    out_channels, stride = 3, 8

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))

    def maps(self, images):
        return F.avg_pool2d(images, 8) * self.scale.view(3, 1, 1)

    def folded(self):
        return self


@pytest.fixture
def place(folder, tmp_path, monkeypatch) -> Path:
    """A data directory that may be changed, beside which a script works."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, tmp_path / "data")
    return tmp_path


def dataset(place: Path, split: str = "train") -> ImageDataset:
    view = make_view("fcn", train=False, image_size=16, patch_list=(2,), patch_ratio=2.0, num_patch=1)
    return ImageDataset("folder", split, data_dir=str(place / "data"), view=view)


def prepared(model: DeepEMD, place: Path, weights: str = "none", file: object = None, opened=None, **more) -> str:
    """The hash of the statistics that a model is given; ``opened`` counts how often the training images were."""

    def open_train():
        if opened is not None:
            opened.append(1)
        return dataset(place)

    args = Namespace(norm=model.settings.norm, statistics=file and str(file), dataset="folder", image_size=16)
    prepare_statistics(args, model, weights, device=CPU, open_train=open_train, num_workers=0, **more)
    return model.statistics_hash


def colours(norm: str = "standard", scale: float = 1.0) -> DeepEMD:
    model = DeepEMD(encoder=Colours(), norm=norm)
    model.encoder.scale.data.fill_(scale)
    return model


def all_nodes(model: DeepEMD, images: ImageDataset) -> torch.Tensor:
    return encode_images(model, torch.stack([images[k][0] for k in range(len(images))]), device=CPU)


def test_they_are_those_of_the_training_images_and_are_kept(place):
    model, opened = colours(), []
    found = prepared(model, place, opened=opened)
    expected = NodeStatistics.of(all_nodes(model, dataset(place)))  # no class has more images than are drawn
    torch.testing.assert_close(model.settings.statistics.mean, expected.mean)
    torch.testing.assert_close(model.settings.statistics.deviation, expected.deviation)
    (kept,) = Path("checkpoint/statistics").iterdir()
    assert NodeStatistics.read(kept).sha256 == found
    NodeStatistics(torch.zeros(3), torch.ones(3)).write(kept)
    again = colours("base")
    assert prepared(again, place) == NodeStatistics.read(kept).sha256 != found  # read, not computed


def test_test_images_change_nothing_and_training_images_do(place):
    before = prepared(colours(), place)
    for split in ("test", "val"):
        for name in ("class0", "class3"):
            write_images(place / "data" / split / name, 9, seed=77)
    shutil.rmtree("checkpoint")
    assert prepared(colours(), place) == before
    (kept,) = Path("checkpoint/statistics").iterdir()
    write_images(place / "data/train/class0", 9, seed=78)
    assert prepared(colours(), place) != before
    assert prepared(colours(scale=2.0), place) != before
    assert len(set(Path("checkpoint/statistics").iterdir()) - {kept}) == 2


def test_twenty_images_of_a_class_are_drawn_by_name(place):
    images = dataset(place)
    images.labels = [0] * 25 + [1] * 17
    images.class_names = ["a", "b"]
    drawn = statistics.drawn_images(images)
    assert drawn == statistics.drawn_images(images)
    of_first = [index for index, _ in drawn if index < 25]
    assert len(of_first) == len(set(of_first)) == PER_CLASS
    assert sorted(index for index, _ in drawn if index >= 25) == list(range(25, 42))
    images.labels = [0] * 25 + [1] * 16 + [2]
    assert [pair for pair in statistics.drawn_images(images) if pair[0] < 25] == drawn[:PER_CLASS]


def test_a_file_that_is_named_comes_before_one_beside_the_weights_and_that_before_the_cache(place, capsys):
    files = {}
    for number, name in enumerate(["named.npz", f"run/{STATISTICS_FILE}"]):
        files[name] = NodeStatistics(torch.zeros(3) + number, torch.ones(3))
        files[name].write(place / name)
    computed, opened = prepared(colours(), place), []
    beside = files[f"run/{STATISTICS_FILE}"].sha256
    for weights in ("run", "run/max_acc.pth"):
        assert prepared(colours(), place, weights, opened=opened) == beside
        assert prepared(colours(), place, weights, "named.npz", opened=opened) == files["named.npz"].sha256
    assert f"statistics of -norm standard: run/{STATISTICS_FILE}" in capsys.readouterr().err
    assert prepared(colours(), place, "elsewhere.pth", opened=[]) == computed
    assert not opened
    # A folder of images comes before what is beside the weights, and training wants fresh ones.
    assert prepared(colours(), place, "run", "data/train") == computed
    assert prepared(colours(scale=3.0), place, "run", fresh=True) != beside


def test_other_norms_need_nothing(place, capsys):
    opened = []
    for norm in ("center", "none"):
        assert prepared(colours(norm), place, opened=opened) is None
    assert not opened
    prepared(colours("none"), place, file="nowhere")
    assert "-statistics has no effect with -norm none" in capsys.readouterr().err


def test_a_damaged_cache_is_computed_again(place, capsys):
    found = prepared(colours(), place)
    (kept,) = Path("checkpoint/statistics").iterdir()
    kept.write_bytes(b"PK")
    assert prepared(colours(), place) == found == NodeStatistics.read(kept).sha256
    assert re.search(r"warning: .* They are computed again", capsys.readouterr().err)
    with pytest.raises(InputError, match="-statistics nowhere: there is no such file or folder"):
        prepared(colours(), place, file="nowhere")
    (place / f"data/{STATISTICS_FILE}").write_bytes(b"PK")
    with pytest.raises(InputError, match=STATISTICS_FILE):  # of a run: it must not be replaced in silence
        prepared(colours(), place, "data")


def test_meta_training_keeps_what_its_first_weights_gave(place, monkeypatch):
    flags = [*SMALL, "-data_dir", "data", "-norm", "standard", "-val_solver", "simplex", "-pretrain_dir", "none"]
    flags += ["-val_frequency", "1", "-val_episode", "2", "-test_episode", "2", "-lr", "0.1"]
    succeed("train_meta.py", *flags, "-max_epoch", 1, cwd=place)
    folder = place / "checkpoint/folder/fcn/1shot-3way-conv4"
    first = NodeStatistics.read(folder / STATISTICS_FILE)
    # Neither a resumed run nor eval.py computes others from the weights that were trained meanwhile.
    used, real = [], DeepEMD.use_statistics
    monkeypatch.setattr(DeepEMD, "use_statistics", lambda self, found: used.append(found.sha256) or real(self, found))
    monkeypatch.setattr(DeepEMD, "fit_statistics", None)
    succeed("train_meta.py", *flags, "-max_epoch", 2, "-resume", cwd=place)
    again = run("eval.py", *SMALL, "-data_dir", "data", "-test_episode", 2, "-model_dir", folder, cwd=place)
    assert again.status == 0, again.err
    assert "-norm standard" in again.err.splitlines()[1]
    assert set(used) == {first.sha256}
    assert len(used) == 2
    RunFolder(folder, {})  # another run there
    assert not (folder / STATISTICS_FILE).exists()
    assert NodeStatistics.read(folder / "previous-1" / STATISTICS_FILE).sha256 == first.sha256


def test_pretraining_validates_by_the_statistics_of_the_weights_of_the_moment(place, monkeypatch):
    seen, real = [], DeepEMD.fit_statistics

    def fit(self, nodes):
        real(self, nodes)
        seen.append((self.statistics_hash, NodeStatistics.of(all_nodes(self.folded(), dataset(place))).mean))
        torch.testing.assert_close(self.settings.statistics.mean, seen[-1][1])

    monkeypatch.setattr(DeepEMD, "fit_statistics", fit)
    flags = [*SMALL, "-data_dir", "data", "-norm", "base", "-num_episode", "2", "-bs", "21", "-lr", "0.01"]
    succeed("train_pretrain.py", *flags, "-max_epoch", 2, cwd=place)
    assert len(seen) == len({digest for digest, _ in seen}) == 2
    assert not (place / "checkpoint/statistics").exists()
    NodeStatistics(torch.zeros(64), torch.ones(64)).write(place / "file.npz")
    refused = run("train_pretrain.py", *flags, "-max_epoch", 1, "-extra_dir", "b", "-statistics", "file.npz", cwd=place)
    assert (refused.status, refused.err.splitlines()[-1]) == (
        1,
        "error: -statistics file.npz: this must be a folder of images, and there is none",
    )


def test_results_name_the_statistics(place):
    flags = [*SMALL, "-data_dir", "data", "-norm", "standard", "-test_episode", "2", "-model_dir", "none", "-json", "-"]
    found = {}
    for number in range(2):
        NodeStatistics(torch.zeros(64), torch.ones(64) + number).write(place / "some.npz")
        out = succeed("eval.py", *flags, "-statistics", "some.npz", cwd=place)
        found[re.search(r'"statistics": "(\w{64})"', out)[1]] = out
    assert len(found) == 2
    transductive = run("eval.py", *flags, "-statistics", "data", cwd=place)
    assert "error: -statistics data: 42 of its images are classified" in transductive.err
    assert len(list((place / "checkpoint/eval").glob("results-*.json"))) == 2  # two results, of the same flags


def test_predictions_by_standardised_nodes(place):
    flags = ["-dataset", "folder", "-model_dir", "none", "-gpu", "cpu", "-image_size", "16", "-norm", "standard"]
    flags += ["-solver", "simplex", "-backbone", "conv4"]
    known = ["-support", "data/test", "-query", "data/val/class0"]
    missing = run("predict.py", *flags, *known, cwd=place)
    assert missing.status == 1
    assert missing.err.splitlines()[-1].startswith("error: -norm standard needs statistics, and there are no training")
    empty = run("predict.py", *flags, *known, "-statistics", "data/none", cwd=place)
    assert "-statistics data/none: there is no such file or folder" in empty.err
    (place / "empty").mkdir()
    empty = run("predict.py", *flags, *known, "-statistics", "empty", cwd=place)
    assert empty.err.splitlines()[-1] == "error: -statistics empty: there are no images in this folder"

    # Images at any depth; the prototypes carry what was found.
    first = succeed(
        "predict.py", *flags, *known, "-statistics", "data/train", "-save", "kept.pth", "-json", "-", cwd=place
    )
    kept = ["-prototypes", "kept.pth", "-query", "data/val/class0", "-json", "-"]
    assert succeed("predict.py", *flags, *kept, cwd=place) == first
    assert succeed("predict.py", *flags, *kept, "-statistics", "data/train", cwd=place) == first
    other = run("predict.py", *flags, *kept, "-statistics", "data/val", cwd=place)
    assert "-prototypes kept.pth: made with other statistics, which are in the file. Leave -statistics out" in other.err
    other = run("predict.py", *flags, *kept, "-norm", "center", cwd=place)
    assert "-prototypes kept.pth: made with other flags; set -norm standard" in other.err
    content = torch.load(place / "kept.pth", weights_only=True)
    for damage in ({}, {"mean": torch.zeros(64)}, {"mean": torch.zeros(3), "deviation": torch.zeros(3)}):
        torch.save({**content, "statistics": damage}, place / "bad.pth")
        bad = run("predict.py", *flags, "-prototypes", "bad.pth", *kept[2:], cwd=place)
        assert "error: -prototypes bad.pth is damaged, or not a file of -save" in bad.err


def test_a_folder_is_drawn_from_as_one_class(place, monkeypatch):
    monkeypatch.setattr(statistics, "OF_FOLDER", 10)
    images = ImageDataset.of_files(
        [str(path) for path in sorted(Path("data").rglob("*.png"))], view=dataset(place).view
    )
    assert len(images) == 3 * 42
    drawn = [index for index, _ in statistics.drawn_images(images)]
    assert len(set(drawn)) == 10
    assert np.ptp(drawn) > 42  # from all of it
