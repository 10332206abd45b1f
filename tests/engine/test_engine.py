"""The loops, on a model small enough to reason about."""

import argparse
import math

import pytest
import torch
from torch import nn
from tqdm import tqdm

from engine import cache, evaluation
from engine.evaluation import DivergenceError, Evaluator
from utils import named_generator

CPU = torch.device("cpu")


class Samples(torch.utils.data.Dataset):
    """Sample i is the vector of i; its view is random or not, as one is told. Counts what it is asked for."""

    def __init__(self, is_random=False):
        self.view = argparse.Namespace(is_random=is_random, patches=1)
        self.asked = []

    def __len__(self):
        return 1000

    def __getitem__(self, item):
        self.asked.append(item)
        index = item[0] if isinstance(item, tuple) else item
        return torch.full((2,), float(index)), index % 2


class FixedLogits(nn.Module):
    """Right for as many queries as the first support image says."""

    def __init__(self):
        super().__init__()
        self.draws, self.encoded = [], []

    def folded(self):
        return self

    def encode(self, images):
        self.encoded.append(len(images))
        return images.unsqueeze(2)  # (B, C, 1)

    def match(self, support, query, *, way, shot, solver, generator):
        self.draws += [torch.rand((), generator=one).item() for one in generator]
        right = support[:, 0, 0, 0].unsqueeze(1)  # (E, 1)
        number = torch.arange(query.shape[1])
        return nn.functional.one_hot((number % way + (number >= right)) % way, way).float()


SHAPE = {"way": 2, "shot": 1, "device": CPU, "seed": 3}


def episode(*indices):
    return [(index, 100 + index) for index in indices]


class Batches(list):
    """Batches of indices that are told the epoch, as fit() does."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch


# --- evaluation ---


def test_evaluation_counts_hits_and_seeds_each_episode():
    model, evaluator = FixedLogits(), Evaluator(Samples(), episode_batch=2, **SHAPE)
    result = evaluator(model, [episode(k, 9, 9, 9, 9, 9) for k in (4, 2, 0)])
    assert result.accuracies == [100, 50, 0]
    assert result.accuracy == 50
    assert str(result).startswith("50.00 +- 46.20")
    # The draws of episode k depend on the seed, the epoch and k, whatever group it is in.
    assert model.draws == [torch.rand((), generator=named_generator(3, "sfc", 0, k)).item() for k in range(3)]
    first, model.draws = model.draws, []
    Evaluator(Samples(), episode_batch=3, **SHAPE)(model, [episode(k, 9, 9, 9, 9, 9) for k in (0, 4)])
    assert model.draws == first[:2]


def test_the_running_mean_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(
        evaluation, "progress_bar", lambda title, **settings: tqdm(desc=title, mininterval=0, **settings)
    )
    Evaluator(Samples(), episode_batch=1, **SHAPE)(FixedLogits(), [episode(k, 9, 9, 9, 9, 9) for k in (4, 2)])
    assert "acc 75.00 +- 34.65 %" in capsys.readouterr().err


def test_equal_hits_are_equal_accuracies():
    """Float means of thirds differ in their last digit by the order in which they are added."""
    counts = [1, 2, 3, 3, 2, 1, 1, 3, 2, 2, 1, 3, 1]

    def accuracy(order):
        return Evaluator(Samples(), **{**SHAPE, "way": 3})(
            FixedLogits(), [episode(k, 9, 9, *[9] * 3) for k in order]
        ).accuracy

    assert len({accuracy(order) for order in (counts, counts[::-1], sorted(counts))}) == 1
    assert accuracy([1]) == 100 / 3


@pytest.mark.parametrize("episode_batch", [1, 2, 8])
@pytest.mark.parametrize("is_random", [False, True])
@pytest.mark.parametrize("feature_cache", ["auto", "off"])
def test_each_image_is_encoded_once(episode_batch, is_random, feature_cache):
    episodes = Batches(episode(k % 5, 5, 6, 7, 8, 9) for k in range(7))
    episodes.fixed_seeds = torch.arange(10)  # the seeds are those of the images here, so random views repeat as well
    data, model = Samples(is_random), FixedLogits()
    settings = {"episode_batch": episode_batch, "feature_cache": feature_cache, **SHAPE}
    result = Evaluator(data, **settings)(model, episodes)
    assert result.accuracies == [25.0 * k for k in (0, 1, 2, 3, 4, 0, 1)]
    assert len(data.asked) == sum(model.encoded) == (10 if feature_cache == "auto" else 42)
    assert all(isinstance(item, tuple) == is_random for item in data.asked)


def test_random_views_are_loaded_for_every_use():
    data, model = Samples(is_random=True), FixedLogits()
    evaluator = Evaluator(data, keep_pixels=True, **SHAPE)
    for _ in range(2):
        evaluator(model, [episode(0, 5, 6, 7, 8, 9)] * 3)
    assert len(data.asked) == 36
    assert not evaluator.pixels


def test_a_cache_that_is_full_starts_anew(monkeypatch):
    monkeypatch.setattr(cache, "CACHE_SHARE", 1.0)
    monkeypatch.setattr(cache, "free_memory", lambda device: 20 * 2 * 4)  # room for the nodes of 20 images
    episodes = [episode(*range(k, k + 6)) for k in range(0, 60, 2)] * 2
    data, model = Samples(), FixedLogits()
    result = Evaluator(data, episode_batch=2, **SHAPE)(model, episodes)
    assert result.accuracies == [25.0 * min(k, 4) for k in range(0, 60, 2)] * 2
    assert 66 < len(data.asked) < len(episodes) * 6 / 2


def test_nodes_go_where_there_is_room(monkeypatch):
    """A device that is short of memory leaves them to the host; "cuda" is a name only here."""
    made = []
    real = torch.empty

    def empty(*shape, pin_memory=False, device=CPU, **settings):
        made.append((shape[0], pin_memory))
        return real(*shape, **settings)

    monkeypatch.setattr(torch, "empty", empty)
    for on_device, on_host, expected in (
        (500, 500, (500, False)),
        (100, 500, (500, True)),
        (50, 20, (50, False)),
        (5, 2, (10, False)),
    ):
        room = {"cuda": 4 * 8 * on_device, "cpu": 4 * 8 * on_host}  # of which a quarter may be taken
        monkeypatch.setattr(cache, "free_memory", lambda device, room=room: room[device.type])
        table = evaluation._NodeTable(torch.device("cuda"), most=500)
        table.put(0, real(3, 2, 1), least=10)
        assert made.pop() == expected
        assert table.capacity == expected[0]


def test_decoded_images_are_kept_over_calls():
    data, model = Samples(), FixedLogits()
    evaluator = Evaluator(data, keep_pixels=True, **SHAPE)
    for episodes in ([episode(1, 5, 6, 7, 8, 9)], [episode(1, 5, 6, 7, 8, 9), episode(3, 5, 6, 7, 8, 9)]):
        result = evaluator(model, episodes)
    assert data.asked == [1, 5, 6, 7, 8, 9, 3]
    assert result.accuracies == [25, 75]
    assert sum(model.encoded) == 6 + 7  # the weights may have changed, so nodes are not kept
    without = Evaluator(data, **SHAPE)
    for _ in range(2):
        without(model, [episode(1, 5, 6, 7, 8, 9)])
    assert len(data.asked) == 7 + 12


def test_memory_of_a_container_counts(monkeypatch, tmp_path):
    real = evaluation.free_memory(CPU)
    assert real > 0
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.current").write_text("500\n")
    monkeypatch.setattr(evaluation, "Path", lambda _, name: tmp_path / name)
    assert evaluation.free_memory(CPU) == 1500
    (tmp_path / "memory.max").write_text("max\n")
    assert evaluation.free_memory(CPU) > 1500


def test_episodes_are_drawn_as_they_are_needed():
    class Endless:
        drawn = 0

        def __len__(self):
            return 10**12

        def __getitem__(self, k):
            self.drawn += 1
            return episode(0, 5, 6, 7, 8, 9)

    episodes, model = Endless(), FixedLogits()
    model.match = lambda *args, **settings: (_ for _ in ()).throw(ArithmeticError("stop here"))
    with pytest.raises(ArithmeticError, match="stop here"):
        Evaluator(Samples(), **SHAPE)(model, episodes)
    assert episodes.drawn <= 100


@pytest.mark.parametrize("fails", [True, False])
def test_features_that_are_not_finite_are_said_to_be(fails):
    class Diverged(FixedLogits):
        def encode(self, images):
            return super().encode(images) * math.nan

        def match(self, support, query, **settings):
            if fails:
                raise ArithmeticError("problem 0 of 4")
            return torch.full((len(query), query.shape[1], 2), math.nan)

    with pytest.raises(DivergenceError, match="not finite: .*diverged"):
        Evaluator(Samples(), **SHAPE)(Diverged(), [episode(0, 5, 6, 7, 8, 9)])
