"""What is drawn of images and flows."""

import numpy as np
import pytest
import torch
from helpers import ODD_NAMES
from matplotlib.image import AxesImage
from matplotlib.text import Text

from Models.matching import Matching, match_nodes
from pictures import match
from pictures.canvas import to_pixels


def test_cells_of_a_pyramid():
    coarse, fine = match.cell_panels(np.zeros((3, 84, 84), np.uint8), [1, 2])
    assert (coarse.places, coarse.boxes) == ([(0.5, 0.5)], [(0, 0, 84, 84)])
    assert fine.places == [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
    assert (len(fine.boxes), fine.boxes[1], fine.boxes[2]) == (4, (42, 0, 84, 42), (0, 42, 42, 84))


@pytest.mark.parametrize(
    "pixels",
    [*(np.zeros(shape, np.uint8) for shape in ((20, 20, 3), (20, 20), (5, 3, 20, 20))), torch.zeros(3, 20, 20)],
)
def test_images_of_another_shape_or_type_are_rejected(pixels):
    with pytest.raises(ValueError, match=r"uint8 of shape \(3, S, S\); these are "):
        match.cell_panels(pixels, [2])
    if pixels.ndim != 4:
        with pytest.raises(ValueError, match=r"uint8 of shape \(P, 3, S, S\); these are "):
            match.patch_panels(np.zeros((20, 20, 3), np.uint8), [(0, 0, 9, 9)], pixels, [1])


def test_strongest_flows():
    flow = np.array([[0.0, 3.0], [1.0, 4.0]])
    assert match.strongest(flow, 2) == ([(1, 1, 0.5), (0, 1, 0.375)], "top 2 of 3 flows: 88 % of the mass")
    both = [(0, 0, 0.5), (1, 1, 0.5)]
    assert match.strongest(np.eye(2), 9) == (both, "all 2 flows: 100 % of the mass")
    assert match.strongest(np.eye(2), 2) == (both, "all 2 flows: 100 % of the mass")


def matched(way: int, cells: int) -> tuple[list, list, Matching]:
    """Random images of ``cells`` x ``cells`` nodes, matched with W others."""
    random = np.random.RandomState(0)
    query, *protos = (
        match.cell_panels(random.randint(0, 255, (3, 12, 12)).astype(np.uint8), [cells]) for _ in range(way + 1)
    )
    nodes = torch.from_numpy(random.rand(way + 1, 8, cells**2).astype(np.float32))
    matching = match_nodes(nodes[1:], nodes[:1], solver="simplex")
    return query, protos, Matching(*(part[0] for part in matching))


def test_a_class_with_any_name_can_be_drawn(capfd, recwarn):
    query, protos, matching = matched(len(ODD_NAMES), 2)
    capfd.readouterr()  # the solver may just have been compiled
    recwarn.clear()
    figure = match.draw_match(query, protos, matching, names=ODD_NAMES, title=ODD_NAMES[0], truth=0, notes=ODD_NAMES)
    assert to_pixels(figure).std() > 0
    assert any("caf?" in text.get_text() for text in figure.findobj(Text))
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize(("way", "truth", "words"), [(3, None, "predicted "), (3, 0, ""), (1, None, None)])
def test_the_prediction_is_in_words(way, truth, words):
    query, protos, matching = matched(way, 3)
    names = [f"class{k}" for k in range(way)]
    figure = match.draw_match(query, protos, matching, names=names, truth=truth, title="title")
    text = "\n".join(text.get_text() for text in figure.findobj(Text))
    best = f"class{int(matching.logits.argmax())}"
    if words is None:
        assert "predicted" not in text
    elif truth is None:
        assert f"title\npredicted {best}" in text
    else:
        right, wrong = f"right: predicted {best}", f"wrong: predicted {best}, true class class0"
        assert (right if best == "class0" else wrong) in text


def test_a_node_is_as_bright_as_its_weight():
    white = match.cell_panels(np.full((3, 10, 10), 255, np.uint8), [2])
    ones, weights = torch.ones(1, 4), torch.tensor([[0.0, 0.75, 2.5, 0.75]])
    matching = Matching(torch.ones(1), torch.eye(4)[None], torch.ones(1, 4, 4), weights, ones)
    figure = match.draw_match(white, [white], matching, names=[""])
    image = figure.findobj(AxesImage)[0].get_array()
    found = [float(image[row, column, 0]) for row in (2, 7) for column in (2, 7)]
    middle = match.DARKEST + (1 - match.DARKEST) / 2
    assert found == pytest.approx([match.DARKEST, middle, 1, middle], abs=1e-6)
