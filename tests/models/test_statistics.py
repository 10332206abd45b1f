"""Statistics of training nodes: what they are, their files, and the spaces of the norms base and standard."""

import io
import pickle
import re

import numpy as np
import pytest
import torch

from Models import DeepEMD
from Models.encoder import Encoder
from Models.statistics import NodeStatistics, normalised
from utils import InputError


def nodes(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_statistics_are_those_of_numpy():
    given = 3 * nodes(40, 6, 5) + torch.arange(6).view(6, 1)
    found = NodeStatistics.of(given)
    by_channel = given.double().numpy().transpose(1, 0, 2).reshape(6, -1)
    np.testing.assert_allclose(found.mean, by_channel.mean(1), rtol=1e-5)
    np.testing.assert_allclose(found.deviation, by_channel.std(1), rtol=1e-5)
    in_batches = NodeStatistics.of(iter(given.split(7)))
    torch.testing.assert_close(in_batches.mean, found.mean)
    torch.testing.assert_close(in_batches.deviation, found.deviation)


def test_a_large_offset_does_not_drown_the_deviation():
    found = NodeStatistics.of(1e4 + nodes(50, 3, 8))
    torch.testing.assert_close(found.deviation, nodes(50, 3, 8).transpose(0, 1).flatten(1).std(1), rtol=2e-2, atol=0)


def test_a_dead_channel_has_a_floor():
    given = nodes(40, 4, 5)
    given[:, 2] = 7.0
    found = NodeStatistics.of(given)
    unfloored = given.transpose(0, 1).flatten(1).std(1, correction=0)
    assert found.deviation[2] == pytest.approx(1e-3 * float(unfloored.mean()), rel=1e-5)
    torch.testing.assert_close(found.deviation[[0, 1, 3]], unfloored[[0, 1, 3]])


def test_training_nodes_have_mean_0_and_length_1_in_the_space_of_the_fit():
    given = nodes(200, 6, 5) * torch.tensor([1e-2, 1.0, 5.0, 1.0, 30.0, 1.0]).view(6, 1) + 3
    statistics = NodeStatistics.of(given)
    standard = normalised(given, "standard", statistics)
    torch.testing.assert_close(standard.std((0, 2), correction=0), torch.ones(6), rtol=1e-4, atol=0)
    torch.testing.assert_close(normalised(given, "base", statistics), given - statistics.mean.view(6, 1))
    assert normalised(given, "none", statistics) is given
    for norm in ("base", "standard"):
        shift, unit = statistics.unit_shift_and_scale(norm, given)
        fitted = (given - shift) / unit
        assert float(fitted.square().sum(1).mean()) == pytest.approx(1, rel=1e-4)
        assert float(fitted.mean((0, 2)).abs().max()) < 1e-4


def test_a_file_keeps_all_digits(tmp_path):
    statistics = NodeStatistics.of(nodes(9, 6, 5))
    statistics.write(tmp_path / "a" / "kept.npz")
    again = NodeStatistics.read(tmp_path / "a" / "kept.npz")
    assert torch.equal(again.mean, statistics.mean)
    assert torch.equal(again.deviation, statistics.deviation)
    assert again.sha256 == statistics.sha256 != NodeStatistics.of(nodes(9, 6, 5, seed=1)).sha256


@pytest.mark.parametrize(
    ("mean", "deviation", "message"),
    [
        ([0.0, np.nan], [1.0, 1.0], "mean must be finite numbers, one a channel"),
        ([0.0, 1.0], [1.0, np.inf], "deviation must be finite numbers"),
        ([0.0, 1.0], [1.0, 0.0], "deviation be above 0"),
        ([0.0, 1.0], [1.0, -1.0], "deviation be above 0"),
        ([0.0], [1.0, 1.0], "got 1 and 2 channels"),
        ([[0.0]], [[1.0]], "one a channel; it is float32 (1, 1)"),
        ([], [], "got 0 and 0 channels"),
        (["a"], [1.0], "can't convert"),
        ([0.0], None, "deviation is not a file in the archive"),
    ],
)
def test_files_of_bad_numbers_are_refused(tmp_path, mean, deviation, message):
    arrays = {"mean": mean, "deviation": deviation}
    np.savez(tmp_path / "bad.npz", **{name: np.array(values) for name, values in arrays.items() if values is not None})
    with pytest.raises(InputError, match=rf"bad\.npz is not a file of statistics.*{re.escape(message)}"):
        NodeStatistics.read(tmp_path / "bad.npz")


class Trap:
    def __reduce__(self):
        return (open, ("executed", "w"))


@pytest.mark.parametrize("kind", ["text", "pickle", "pickled array", "cut", "empty", "one array"])
def test_other_files_are_refused_and_nothing_in_them_is_executed(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    np.savez(buffer, mean=np.zeros(3), deviation=np.ones(3))
    if kind == "pickled array":
        np.savez("bad.npz", mean=np.array([Trap()], dtype=object), deviation=np.ones(1))
    elif kind == "one array":
        with open("bad.npz", "wb") as file:
            np.save(file, np.zeros(3))
    else:
        whole = {
            "text": b"mean,deviation",
            "pickle": pickle.dumps(Trap()),
            "cut": buffer.getvalue()[:300],
            "empty": b"",
        }
        (tmp_path / "bad.npz").write_bytes(whole[kind])
    with pytest.raises(InputError, match=r"bad\.npz"):
        NodeStatistics.read(tmp_path / "bad.npz")
    assert not (tmp_path / "executed").exists()
    with pytest.raises(InputError, match=r"cannot read the statistics in .*none\.npz"):
        NodeStatistics.read(tmp_path / "none.npz")


def test_nodes_without_statistics_are_refused():
    for given in (torch.zeros(0, 3, 4), [], nodes(1, 3, 1).expand(5, 3, 4)):
        with pytest.raises(ValueError, match=r"no nodes|all nodes of the training images are the same"):
            NodeStatistics.of(given)
    with pytest.raises(InputError, match=r"^-norm base needs the mean and deviation .*-statistics FOLDER or FILE"):
        normalised(nodes(2, 3, 4), "base", None)
    with pytest.raises(InputError, match="of 5 channels, and the nodes have 3"):
        normalised(nodes(2, 3, 4), "standard", NodeStatistics(torch.zeros(5), torch.ones(5)))


class Patches(Encoder):
    """The mean colours of 8 x 8 pixels, in four channels of very different scales; only the dimmest shows the class."""

    out_channels, stride = 4, 8

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0, 1e-3]))

    def maps(self, images):
        maps = torch.nn.functional.avg_pool2d(images, 8)
        return torch.cat([maps, maps[:, :1] - maps[:, 1:2]], 1) * self.scale.view(4, 1, 1)

    def folded(self):
        return self


def test_a_model_takes_only_statistics_of_its_encoder(tmp_path):
    model = DeepEMD(encoder=Patches(), norm="standard")
    with pytest.raises(InputError, match="-norm standard needs"):
        model.match(nodes(2, 4, 3), nodes(2, 4, 3), way=2, shot=1)
    with pytest.raises(InputError, match="the statistics are of 3 channels; the nodes of this encoder have 4"):
        model.use_statistics(NodeStatistics(torch.zeros(3), torch.ones(3)))
    NodeStatistics(torch.zeros(3), torch.ones(3)).write(tmp_path / "three.npz")
    with pytest.raises(InputError, match=r"three\.npz: the statistics are of 3 channels"):
        model.read_statistics(tmp_path / "three.npz")
    before = model.state_dict().keys()
    model.fit_statistics(nodes(9, 4, 3))
    assert model.state_dict().keys() == before  # a checkpoint is what it was
    assert model.folded().statistics_hash == model.statistics_hash == NodeStatistics.of(nodes(9, 4, 3)).sha256
    model.use_statistics(None)
    assert model.settings.statistics is None
