"""Episodes and batches."""

import numpy as np
import pytest
import torch
from helpers import GOLDEN

from dataloader import EpisodeSampler, SeededBatches, SeededEpisodes, episode_labels
from utils import InputError, named_generator


def test_sampler_golden():
    with np.load(GOLDEN / "sampler.npz") as figures:
        labels, batches = figures["labels"], figures["batches"]
        sizes = int(figures["n_batch"]), int(figures["way"]), int(figures["per_class"])
        seed = int(figures["seed"])
    generator = torch.Generator().manual_seed(seed)
    assert list(EpisodeSampler(labels, *sizes, generator)) == batches.tolist()
    torch.manual_seed(seed)  # without a generator of its own, torch's global one
    assert list(EpisodeSampler(labels.tolist(), *sizes)) == batches.tolist()


def test_episode_layout():
    labels = torch.arange(6).repeat_interleave(4)
    for batch in EpisodeSampler(labels, 3, 5, 4, torch.Generator().manual_seed(0)):
        assert len(set(batch)) == 20
        rows = labels[torch.tensor(batch)].view(4, 5)
        assert (rows == rows[0]).all()
    assert episode_labels(3, 2).tolist() == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("way", "per_class", "message"),
    [
        (7, 2, "7-way episodes need 7 classes; .* has 6"),
        (5, 5, "at least 5 images in every class .* has 4"),
        (0, 1, "no episodes of 0 classes with 1 images"),
        (1.5, 1, "no episodes of 1.5 classes .* whole numbers"),
        (2, float("nan"), "with nan images"),
    ],
)
def test_impossible_episodes(way, per_class, message):
    with pytest.raises(InputError, match=message):
        EpisodeSampler(torch.arange(6).repeat_interleave(4), 1, way, per_class)


LABELS = torch.arange(6).repeat_interleave(4)


def seeded_episodes(episodes: int = 5, **settings) -> SeededEpisodes:
    return SeededEpisodes(EpisodeSampler(LABELS, episodes, 3, 2), **{"seed": 1, "name": "test", **settings})


def test_seeded_episodes_are_a_function_of_seed_name_epoch_and_index():
    episodes = seeded_episodes()
    drawn = list(episodes)
    assert len(episodes) == len(drawn) == 5
    assert [episodes[k] for k in (4, 0, 4)] == [drawn[4], drawn[0], drawn[4]]  # in any order, however often
    torch.manual_seed(7)  # whatever the global generator has drawn
    assert seeded_episodes(episodes=2)[1] == drawn[1]  # and however many there are
    for other in (seeded_episodes(seed=2), seeded_episodes(name="val")):
        assert all(other[k] != drawn[k] for k in range(5))
    episodes.set_epoch(3)
    later = list(episodes)
    assert all(before != after for before, after in zip(drawn, later, strict=True))
    fresh = seeded_episodes()
    fresh.epoch = 3
    assert fresh[2] == later[2]
    assert len({tuple(index for index, _ in episode) for episode in drawn + later}) == 10
    assert len({seed for episode in drawn + later for _, seed in episode}) == 60


def test_seeded_episodes_have_the_layout_of_an_episode():
    episode = seeded_episodes()[3]
    generator = named_generator(1, "test", 0, "episode", 3)
    assert [index for index, _ in episode] == EpisodeSampler(LABELS, 0, 3, 2).draw(generator)
    rows = LABELS[torch.tensor([index for index, _ in episode])].view(2, 3)
    assert (rows == rows[0]).all()
    assert all(isinstance(index, int) and isinstance(seed, int) for index, seed in episode)


@pytest.mark.parametrize("sampler", [seeded_episodes(), SeededBatches(14, 3, seed=1, name="train")])
@pytest.mark.parametrize("k", [5, -1])
def test_no_such_batch(sampler, k):
    with pytest.raises(IndexError):
        sampler[k]


def test_nothing_is_drawn_in_advance():
    episodes = seeded_episodes(episodes=10**11)
    assert len(episodes) == 10**11
    assert episodes[10**11 - 1] != episodes[0] == next(iter(episodes))
    assert len(next(iter(EpisodeSampler(LABELS, 10**11, 3, 2)))) == 6


def test_fixed_views():
    episodes = seeded_episodes(fixed_views=len(LABELS))
    first = list(episodes)
    assert [[index for index, _ in episode] for episode in first] == [
        [index for index, _ in episode] for episode in seeded_episodes()
    ]
    episodes.set_epoch(1)
    seed_of = {}
    for index, seed in (pair for episode in [*first, *episodes] for pair in episode):
        assert seed_of.setdefault(index, seed) == seed
    assert len(set(seed_of.values())) == len(seed_of) > 12
    more = seeded_episodes(fixed_views=1000).fixed_seeds
    assert all(more[index] == seed for index, seed in seed_of.items())  # however many images there are
    expected = torch.randint(2**62, (24,), generator=named_generator(1, "test", "views"))
    assert all(expected[index] == seed for index, seed in seed_of.items())


def test_seeded_batches():
    def batches(**settings) -> SeededBatches:
        return SeededBatches(14, 4, **{"seed": 1, "name": "train", **settings})

    shuffled = batches()
    drawn = list(shuffled)
    order = [index for batch in drawn for index, _ in batch]
    assert [len(batch) for batch in drawn] == [4, 4, 4, 2]
    assert len(shuffled) == 4
    assert sorted(order) == list(range(14)) != order
    assert order == torch.randperm(14, generator=named_generator(1, "train", 0, "order")).tolist()
    assert len({seed for batch in drawn for _, seed in batch}) == 14
    torch.manual_seed(7)
    assert [shuffled[k] for k in (3, 0)] == [drawn[3], drawn[0]]
    assert batches()[2] == drawn[2]
    shuffled.set_epoch(1)
    later = list(shuffled)
    assert [index for batch in later for index, _ in batch] != order
    assert len({seed for batch in drawn + later for _, seed in batch}) == 28
    shuffled.epoch = 0
    assert list(shuffled) == drawn
    for other in (batches(seed=2), batches(name="other")):
        assert all(other[k] != drawn[k] for k in range(4))


def test_labels_of_another_shape_are_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"one number per image, a shape \(B,\); these have the shape \(3, 2\)"):
        EpisodeSampler(torch.zeros(3, 2), 1, 1, 1)
