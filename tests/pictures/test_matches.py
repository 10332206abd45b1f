"""Images as the network sees them, and episodes, matched."""

import numpy as np
import pytest
import torch
from helpers import write_images
from PIL import Image

import visualize
from dataloader.arguments import open_dataset
from dataloader.views import make_view
from Models import DeepEMD
from pictures import matches


@pytest.mark.parametrize("deepemd", ["grid", "sampling"])
def test_boxes_are_those_of_the_view(glyphs, deepemd):
    args = visualize.build_parser().parse_args(
        ["episode", "-dataset", "glyphs", "-data_dir", str(glyphs), "-deepemd", deepemd, "-image_size", "16"]
    )
    dataset = open_dataset(args, "test", train=False)
    (viewed,) = matches.view_items(dataset, [(3, 77)])
    pixels, _ = dataset[3, 77]
    assert torch.equal(viewed.pixels, pixels)
    with torch.random.fork_rng():
        torch.manual_seed(77)
        boxes = dataset.view.boxes((viewed.image.shape[1], viewed.image.shape[0]))
    overview, *mosaics = matches.panels_of(viewed, dataset.view, len(boxes))
    assert overview.boxes == [tuple(map(float, box[:4])) for box in boxes]
    assert np.array_equal(overview.pixels, np.asarray(viewed.image))
    shown = [
        panel.pixels[int(upper) : int(lower), int(left) : int(right)]
        for panel in mosaics
        for left, upper, right, lower in panel.boxes
    ]
    assert np.array_equal(np.stack(shown), np.moveaxis(pixels.numpy(), 1, -1))


def test_boxes_of_a_large_image_shrink_with_it():
    view = make_view("grid", train=False, image_size=16, patch_list=(2,), patch_ratio=1)
    viewed = matches.view_image(Image.new("RGB", (960, 480)), view, 1)
    overview, _ = matches.panels_of(viewed, view, 4)
    assert overview.pixels.shape == (240, 480, 3)
    assert overview.boxes[3] == (240, 120, 480, 240)
    assert overview.places[3] == (0.75, 0.75)


def test_the_support_image_nearest_to_the_prototype_is_shown(tmp_path, monkeypatch):
    """Of shots A B A, the mean is nearest to the first; of B A A, to the second."""
    view = make_view("fcn", train=False, image_size=16)
    for seed, name in enumerate("ab"):
        write_images(tmp_path / name, 1, seed=seed)
    a, b = (matches.view_image(Image.open(tmp_path / name / "0000.png"), view, 1) for name in "ab")
    torch.manual_seed(0)
    model = DeepEMD(kshot="mean", solver="simplex").folded()
    support = [a, b, b, a, a, a]  # shots of class 0: A B A; of class 1: B A A
    episode = matches.match_episode(model, view, [*support, b, b], way=2, shot=3, device=torch.device("cpu"))
    assert episode.nearest == [0, 1]
    drawn = []
    monkeypatch.setattr(matches, "draw_match", lambda *given, **named: drawn.append((given, named)))
    episode.draw(0, names=["x", "y"], title="", flows=3, truth=0)
    (((query, protos, _), named),) = drawn
    is_a = [np.array_equal(panels[0].pixels.transpose(2, 0, 1), a.pixels) for panels in (query, *protos)]
    assert is_a == [False, True, True]
    assert "shot 1 of 3" in named["notes"][0]
    assert "shot 2 of 3" in named["notes"][1]


def test_queries_that_are_drawn_include_wrong_ones():
    logits = torch.eye(2).repeat(5, 1)
    assert matches.choose_queries(logits, 2) == [0, 1, 2, 3]
    logits[7], logits[9], logits[5] = (logits[row].flip(0) for row in (7, 9, 5))
    assert matches.choose_queries(logits, 2) == [0, 5, 7, 9]
    assert matches.choose_queries(torch.eye(2).flip(0), 2) == [0, 1]
