"""Files of nodes: what is accepted, and the sentence for what is not."""

import numpy as np
import pytest
import torch

from dataloader.features import FeatureSet, read_features, write_features
from utils import InputError

RANDOM = np.random.RandomState(0)
NODES = RANDOM.standard_normal((6, 4, 3)).astype(np.float32)
LABELS = np.array([0, 0, 1, 1, 2, 2])


def test_a_file_is_read_as_it_was_written(tmp_path):
    names, files = ["a, b", "caf\udce9", "c"], [f"x/{k}.png" for k in range(6)]
    train = {"train_nodes": torch.ones(2, 4, 3), "train_labels": [0, 1]}
    written = FeatureSet(torch.from_numpy(NODES).half(), LABELS.tolist(), names, files, **train)
    for _ in range(2):
        write_features(tmp_path / "f.npz", written)
    found = read_features(tmp_path / "f.npz")
    assert torch.equal(found.nodes, written.nodes)
    assert found.nodes.dtype == torch.float16
    assert torch.equal(found.train_nodes, written.train_nodes)
    assert (found.labels, found.class_names, found.paths) == (written.labels, names, files)
    assert found.train_labels == [0, 1]
    assert len(found) == found.fingerprint()["images"] == 6
    assert [path.name for path in tmp_path.iterdir()] == ["f.npz"]


@pytest.mark.parametrize("kind", ["<f2", "<f4", ">f4", "<f8"])
@pytest.mark.parametrize("numbers", [np.uint8([7, 9, 200]), np.int64([-5, 0, 2**40]), np.uint64([0, 1, 2**63])])
def test_any_floats_and_any_labels_of_any_program(tmp_path, kind, numbers):
    nodes = np.asfortranarray(NODES[:, :, 0].astype(kind))
    np.savez_compressed(tmp_path / "f.npz", nodes=nodes, labels=numbers[LABELS], more="ignored")
    found = read_features(tmp_path / "f.npz")
    assert found.nodes.shape == (6, 4, 1)
    assert found.nodes.dtype == (torch.float16 if kind == "<f2" else torch.float32)
    assert np.array_equal(found.nodes[:, :, 0].numpy(), NODES[:, :, 0].astype(kind))
    assert (found.labels, found.class_names) == (LABELS.tolist(), [str(number) for number in numbers])
    with pytest.raises(InputError, match="no array files"):
        found.relative_paths()


def test_class_names_are_by_label(tmp_path):
    np.savez(tmp_path / "f.npz", nodes=NODES, labels=2 * LABELS, class_names=np.array([b"a", b"b", b"c", b"d", b"e"]))
    assert read_features(tmp_path / "f.npz").class_names == ["a", "c", "e"]


@pytest.mark.parametrize("kind", ["U", "S"])
def test_labels_may_be_names(tmp_path, kind):
    names = np.array(["bird", "ant", "cat"]).astype(kind)
    np.savez(tmp_path / "f.npz", nodes=NODES, labels=names[LABELS], train_nodes=NODES, train_labels=names[LABELS])
    found = read_features(tmp_path / "f.npz")
    assert (found.labels, found.class_names) == ([1, 1, 0, 0, 2, 2], ["ant", "bird", "cat"])
    assert found.train_labels == found.labels


def test_square_maps_are_pooled(tmp_path):
    nodes = np.random.RandomState(0).standard_normal((6, 4, 22, 22)).astype(np.float16)
    np.savez(tmp_path / "f.npz", nodes=nodes.reshape(6, 4, -1), labels=LABELS, train_nodes=nodes.reshape(6, 4, -1)[:2])
    found = read_features(tmp_path / "f.npz", map_size=2)
    cells = nodes.astype(np.float64).reshape(6, 4, 2, 11, 2, 11).mean((3, 5)).reshape(6, 4, 4)
    assert np.allclose(found.nodes.numpy(), cells, atol=1e-6)
    assert torch.equal(found.train_nodes, found.nodes[:2])
    np.savez(tmp_path / "token.npz", nodes=nodes.reshape(6, 4, -1)[:, :, 1:], labels=LABELS)
    for file, size in (("f.npz", 23), ("token.npz", 2)):
        with pytest.raises(InputError, match=f"-map_size {size} needs the cells of a square map"):
            read_features(tmp_path / file, map_size=size)


BROKEN = NODES.copy()
BROKEN[3, 0, 0] = np.inf
FAULTS = [
    ({"nodes": None}, "there is no array nodes; there are: labels"),
    ({"labels": None}, "there is no array labels"),
    ({"nodes": NODES[0, 0]}, r"nodes must have the shape \(images, C, N\).*its shape is \(3,\)"),
    ({"nodes": NODES[:, :0]}, "nodes must have the shape"),
    ({"nodes": LABELS}, "nodes must hold floating-point numbers; its type is int64"),
    ({"nodes": BROKEN}, "nodes has values that are not finite in float32, first in image 3"),
    ({"nodes": NODES * 1e300}, "nodes has values that are not finite in float32"),
    ({"nodes": NODES.astype(object)}, "nodes is an array of Python objects"),
    ({"labels": LABELS[:5]}, r"labels must have the shape \(6,\)"),
    ({"labels": LABELS[:, None]}, r"labels must have the shape \(6,\)"),
    ({"labels": LABELS / 2}, "labels must hold whole numbers, or the names of classes; its type is float64"),
    ({"labels": np.array(list("aabbcc")), "class_names": ["a", "b", "c"]}, "names of classes.*leave it out"),
    ({"nodes": np.ones((6, 4, 441), np.float32)}, "441 nodes of an image are too many to match.*Pool.*-map_size"),
    ({"class_names": ["a", "b"]}, "class_names has 2 names, and the labels are 0 to 2"),
    ({"class_names": ["a", "b", "c"], "labels": LABELS - 1}, "the labels are -1 to 1"),
    ({"class_names": ["a", "b", "b"]}, "class_names has 'b' for two labels"),
    ({"class_names": [1, 2, 3]}, "class_names must be a list of text"),
    ({"files": ["a"]}, "files has 1 names for the 6 images"),
    ({"files": np.array(["a"] * 6, dtype=object)}, "files is an array of Python objects"),
    ({"train_labels": LABELS}, "train_labels requires train_nodes"),
    ({"train_nodes": NODES[:, :2]}, "train_nodes has 2 channels; nodes has 4"),
    ({"train_nodes": NODES, "train_labels": LABELS[:2]}, "train_labels must have the shape"),
]


@pytest.mark.parametrize(("arrays", "sentence"), FAULTS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_fault_names_its_array(tmp_path, arrays, sentence):
    arrays = {name: array for name, array in {"nodes": NODES, "labels": LABELS, **arrays}.items() if array is not None}
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(InputError, match=sentence) as raised:
        read_features(tmp_path / "f.npz")
    assert str(raised.value).startswith(f"-features {tmp_path / 'f.npz'}: ")
    assert "\n" not in str(raised.value)


def test_other_files_are_named(tmp_path):
    np.savez(tmp_path / "whole", nodes=NODES, labels=LABELS)
    np.save(tmp_path / "one.npy", NODES)
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    flipped = bytearray(content)
    flipped[200] ^= 255
    (tmp_path / "flipped").write_bytes(flipped)
    (tmp_path / "text").write_text("nodes")
    for name, sentence in {
        "none": "there is no such file",
        ".": "it cannot be read",
        "one.npy": "a single array",
        "cut": "it is damaged",
        "flipped": "nodes is damaged",
        "text": "no .npz file",
    }.items():
        with pytest.raises(InputError, match=sentence):
            read_features(tmp_path / name)
