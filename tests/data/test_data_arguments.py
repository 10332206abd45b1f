"""The flags of the data."""

import pytest
from data_helpers import open_split

from dataloader import make_view
from dataloader.arguments import add_data_arguments, add_episode_arguments, draw_episodes
from engine.command_line import make_parser
from utils import InputError


def parse(*words: str):
    parser = make_parser("data")
    add_data_arguments(parser)
    add_episode_arguments(parser)
    return parser.parse_args(words)


def test_defaults_of_the_flags():
    data = {"dataset": "miniimagenet", "data_dir": "datasets", "num_workers": None, "verify_images": False}
    views = {"deepemd": "fcn", "image_size": 84, "interpolation": "bilinear", "patch_list": (2, 3), "patch_ratio": 2.0}
    patches, episodes = {"num_patch": 9, "fixed_patches": False}, {"way": 5, "shot": 1, "query": 15}
    assert vars(parse()) == data | views | patches | episodes


def test_help_says_each_default_once(capsys):
    with pytest.raises(SystemExit):
        parse("-h")
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: 2,3)" in text
    assert text.count("(default: ") == 12  # all but the two switches
    assert "(default: miniimagenet)" in text


def test_draw_episodes(folder):
    args = parse("-dataset", "folder", "-way", "3", "-query", "2", "-fixed_patches")
    data = open_split("folder", folder)
    validation = draw_episodes(args, data, 4, seed=1, name="val")
    training = draw_episodes(args, data, 4, seed=1, name="val", train=True)
    assert [len(episode) for episode in validation] == [9] * 4
    assert [index for index, _ in validation[2]] == [index for index, _ in training[2]]
    assert len(validation.fixed_seeds) == len(data)
    assert training.fixed_seeds is None  # -fixed_patches is for evaluation
    with pytest.raises(InputError, match="folder, val episodes: 7-way episodes need 7 classes"):
        draw_episodes(parse("-dataset", "folder", "-way", "7"), data, 4, seed=1, name="val")


@pytest.mark.parametrize(
    ("flag", "largest", "message"),
    [
        ("image_size", "1024", "'1025' is not a whole number from 16 to 1024"),
        *((flag, "1000", "is not a whole number from 1 to 1000") for flag in ("way", "shot", "query", "num_patch")),
        ("patch_ratio", "100", "is not a number from 1 to 100"),
        ("patch_list", "31,6", "makes 1010 patches of an image; at most 1000 are allowed"),
    ],
)
def test_numbers_of_images_and_patches_have_bounds(capsys, flag, largest, message):
    parse(f"-{flag}", largest)
    too_large = "31,7" if flag == "patch_list" else str(int(largest) + 1)
    with pytest.raises(SystemExit):
        parse(f"-{flag}", too_large)
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_episodes_that_fit_no_memory_are_refused_before_they_are_drawn(folder):
    view = make_view("sampling", train=False, image_size=1024, num_patch=1000)
    data = open_split("folder", folder, view=view)
    args = parse("-dataset", "folder", "-image_size", "1024", "-way", "5", "-shot", "1", "-query", "5")
    with pytest.raises(InputError, match="of 5 classes with 6 images of 1000 patches needs 88 GiB for its pixels"):
        draw_episodes(args, data, 4, seed=1, name="val")
