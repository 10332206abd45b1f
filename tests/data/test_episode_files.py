"""Episodes in a JSON file, by the names of their images."""

import json

import pytest
import torch

from dataloader import EpisodeSampler, ImageDataset, SeededEpisodes, make_view
from dataloader.episode_files import episodes_digest, read_episodes, write_episodes
from dataloader.features import FeatureSet
from utils import InputError

DRAWS = {"seed": 3, "name": "test"}
SHAPE = {"way": 3, "shot": 2}


@pytest.fixture
def images(folder):
    return ImageDataset("folder", "test", data_dir=str(folder), view=make_view("fcn", train=False))


@pytest.fixture
def episodes(images):
    return SeededEpisodes(EpisodeSampler(images.labels, 4, 3, 5), **DRAWS)


@pytest.fixture
def path(tmp_path, images, episodes):
    write_episodes(tmp_path / "e.json", episodes, images, **SHAPE, with_seeds=True)
    return tmp_path / "e.json"


def test_episodes_are_read_as_they_were_written(path, images, episodes):
    found = read_episodes(path, images, **DRAWS)
    assert (found.way, found.shot, found.query) == (3, 2, 3)
    assert list(found) == list(episodes)  # the seeds of the views as well
    assert episodes_digest(found) == episodes_digest(episodes)
    few = read_episodes(path, images, most=3, **DRAWS)
    assert list(few) == list(episodes)[:3]
    assert episodes_digest(few) == episodes_digest(episodes)


def test_the_file_lists_classes_and_their_files(path, images, episodes):
    first, drawn = json.loads(path.read_text())[0], episodes[0]
    indices = torch.tensor([index for index, _ in drawn]).view(5, 3)  # (images of a class, way)
    names = images.relative_paths()
    assert names[0] == "class0/0000.png"
    for number, name in enumerate(first["classes"]):
        files = [names[index] for index in indices[:, number]]
        assert (first["support"][number], first["query"][number]) == (files[:2], files[2:])
        assert all(file.startswith(f"{name}/") for file in files)


def test_nodes_with_files_have_the_same_episodes(path, images, episodes):
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    paths = [images.relative_paths()[k] for k in order]
    nodes = FeatureSet(torch.ones(len(images), 1, 1), [images.labels[k] for k in order], images.class_names, paths)
    found = read_episodes(path, nodes, **DRAWS)
    for one, other in zip(found, episodes, strict=True):
        assert [paths[index] for index, _ in one] == [images.relative_paths()[index] for index, _ in other]


def test_images_of_one_name_are_refused_before_a_file_is_written(path, images, episodes):
    nodes = FeatureSet(torch.ones(len(images), 1, 1), images.labels, images.class_names, ["a.png"] * len(images))
    with pytest.raises(InputError, match="-episodes_out: some images of the data have the same name"):
        write_episodes(path, episodes, nodes, way=3, shot=2, with_seeds=False)


def test_views_have_seeds_without_those_of_the_file(path, images):
    content = json.loads(path.read_text())
    for episode in content:
        del episode["view_seeds"]
    path.write_text(json.dumps(content), encoding="utf-8-sig")  # with the mark that programs on Windows put first
    found = read_episodes(path, images, **DRAWS)
    assert list(found) == list(read_episodes(path, images, **DRAWS))
    assert len({seed for episode in found for _, seed in episode}) == 4 * 15
    fixed = read_episodes(path, images, fixed_views=len(images), **DRAWS)
    drawn = SeededEpisodes(EpisodeSampler(images.labels, 4, 3, 5), fixed_views=len(images), **DRAWS)
    assert list(fixed) == list(drawn)


def change(*keys, to):
    def apply(content):
        *path, last = keys
        for key in path:
            content = content[key]
        content[last] = to

    return apply


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (change(1, "classes", 0, to="what"), "episode 1: there is no class 'what' in the data"),
        (change(1, "classes", 0, to=7), 'episode 1: "classes" must be a list of names; an episode is'),
        (change(1, "support", 0, 1, to="class9/x.png"), "episode 1: there is no file 'class9/x.png' in the data"),
        (change(1, "support", 0, to=[]), 'episode 1: "support" must have a list of files for each of the 3 classes'),
        (change(2, "query", to=[]), 'episode 2: "query" must have a list'),
        (change(2, to=[]), 'episode 2: "classes" must be a list of names'),
        (lambda content: content[3]["query"][0].pop(), 'episode 3: "query" has 2 to 3 files for a class'),
        (lambda content: [row.pop() for row in content[3]["query"]], "episode 3 3-way 2-shot with 2 queries per class"),
        (
            lambda content: content[0]["classes"].reverse(),
            "episode 0: 'class./.*' is of class 'class.', not of 'class.'",
        ),
        (lambda content: content[0]["query"][1].__setitem__(0, content[0]["support"][1][0]), "is in it twice"),
        (lambda content: content.clear(), "a list of one or more episodes"),
    ],
)
def test_a_fault_names_its_episode(path, images, fault, sentence):
    content = json.loads(path.read_text())
    fault(content)
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=sentence) as raised:
        read_episodes(path, images, **DRAWS)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("text", ["", "[", "3", '{"a": 1}'])
def test_other_files_are_named(path, images, text):
    path.write_text(text)
    with pytest.raises(InputError, match=r"e\.json"):
        read_episodes(path, images, **DRAWS)
