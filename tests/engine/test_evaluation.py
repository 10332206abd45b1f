"""Evaluation, with a model small enough to reason about."""

import argparse
import itertools
import json
import math
from collections import Counter

import pytest
import torch
from torch import nn
from tqdm import tqdm

from engine import cache, evaluation
from engine.cache import NodeTable, PixelCache, free_memory
from engine.distributed import Ranks
from engine.evaluation import DivergenceError, Evaluation, Evaluator, Recorder, Score, encode_images
from engine.stopping import Stopped, StopRequest
from Models import DeepEMD
from utils import mean_confidence_interval, named_generator

CPU = torch.device("cpu")


class Samples(torch.utils.data.Dataset):
    """Sample i is the vector of i. Its view is random or not, as told. Records what it is asked for."""

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
    """Classifies as many queries correctly as the number of the first support image."""

    device_ids = ()

    def __init__(self):
        super().__init__()
        self.draws, self.encoded = [], []

    def folded(self):
        return self

    def settle(self):
        pass

    def encode(self, images):
        self.encoded.append(len(images))
        return images.unsqueeze(2)  # (B, C, 1)

    def match(self, support, query, *, way, shot, solver, generator):
        self.draws += [torch.rand((), generator=one).item() for one in generator]
        right = support[:, 0, 0, 0].unsqueeze(1)  # (E, 1)
        number = torch.arange(query.shape[1])
        return nn.functional.one_hot((number % way + (number >= right)) % way, way).float()


class Episodes(list):
    """Episodes given one by one."""

    epoch, fixed_seeds = 0, None


class Endless:
    """More episodes than can be drawn, all the same. Counts those drawn."""

    epoch, fixed_seeds, drawn = 0, None, 0

    def __len__(self):
        return 10**12

    def __getitem__(self, k):
        self.drawn += 1
        assert self.drawn < 1000
        return episode(0, 5, 6, 7, 8, 9)


SHAPE = {"way": 2, "shot": 1, "device": CPU, "seed": 3}


def episode(*indices):
    return [(index, 100 + index) for index in indices]


def with_hits(*counts):
    """Episodes of four queries each, with that many of them classified correctly."""
    return Episodes(episode(count, 9, 9, 9, 9, 9) for count in counts)


# --- results ---


def test_evaluation_counts_hits_and_seeds_each_episode():
    model, evaluator = FixedLogits(), Evaluator(Samples(), episode_batch=2, **SHAPE)
    result = evaluator(model, with_hits(4, 2, 0))
    assert result.accuracies == [100, 50, 0]
    assert result.accuracy == 50
    assert str(result).startswith("50.00 +- 46.20")
    # The draws of episode k depend on the seed, the epoch and k, whatever group it is in.
    assert model.draws == [torch.rand((), generator=named_generator(3, "sfc", 0, k)).item() for k in range(3)]
    first, model.draws = model.draws, []
    Evaluator(Samples(), episode_batch=3, **SHAPE)(model, with_hits(0, 4))
    assert model.draws == first[:2]
    model.draws, second = [], with_hits(0, 4)
    second.epoch = 1
    evaluator(model, second)
    assert not set(model.draws) & set(first)


@pytest.mark.parametrize("episode_batch", [1, 8])
def test_the_interval_is_that_of_all_episodes(episode_batch):
    """Ten right and ten wrong, one after the other: their deviation is 50, that of the last groups is 0."""
    result = Evaluator(Samples(), episode_batch=episode_batch, **SHAPE)(FixedLogits(), with_hits(*[4] * 10, *[0] * 10))
    assert result.accuracy == 50
    assert result.interval == pytest.approx(1.96 * 50 / math.sqrt(20))


def test_the_running_mean_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(
        evaluation, "progress_bar", lambda title, **settings: tqdm(desc=title, mininterval=0, **settings)
    )
    Evaluator(Samples(), episode_batch=1, **SHAPE)(FixedLogits(), with_hits(4, 2))
    shown = capsys.readouterr().err
    assert "acc 100.00 +- 0.00 %" in shown
    assert "acc 75.00 +- 34.65 %" in shown


def test_a_round_costs_the_same_however_many_went_before(monkeypatch):
    summed = []

    def interval(accuracies):
        summed.append(len(accuracies))
        return mean_confidence_interval(accuracies)

    monkeypatch.setattr(evaluation, "mean_confidence_interval", interval)
    Evaluator(Samples(), episode_batch=1, **SHAPE)(FixedLogits(), with_hits(*range(5), *range(5)))
    assert summed == [10]


def test_equal_hits_are_equal_accuracies():
    """Float means of thirds differ in their last digit by the order in which they are added."""
    counts = [1, 2, 3, 3, 2, 1, 1, 3, 2, 2, 1, 3, 1]

    def accuracy(order):
        evaluator = Evaluator(Samples(), **{**SHAPE, "way": 3})
        return evaluator(FixedLogits(), Episodes(episode(k, 9, 9, *[9] * 3) for k in order)).accuracy

    assert len({accuracy(order) for order in (counts, counts[::-1], sorted(counts))}) == 1
    assert accuracy([1]) == 100 / 3


@pytest.mark.parametrize("fails", [True, False])
def test_features_that_are_not_finite_are_reported(fails):
    class Diverged(FixedLogits):
        def encode(self, images):
            return super().encode(images) * (math.nan if fails else 1)

        def match(self, support, query, **settings):
            return torch.full((len(query), query.shape[1], 2), math.nan)

    with pytest.raises(DivergenceError, match="not finite: .*diverged"):
        Evaluator(Samples(), **SHAPE)(Diverged(), with_hits(0))


@pytest.mark.parametrize("worth", [math.nan, 1.0])
def test_a_solver_that_reports_late_is_asked_before_the_weights_are_blamed(worth):
    """Only if the logits are not finite: to ask means to wait for the device."""

    class Late(FixedLogits):
        def match(self, support, query, **settings):
            return worth * super().match(support, query, **settings)

        def settle(self):
            raise ArithmeticError("no solution on the device")

    evaluator = Evaluator(Samples(), **SHAPE)
    if math.isfinite(worth):
        assert evaluator(Late(), with_hits(4)).accuracy == 100
        return
    with pytest.raises(ArithmeticError, match="no solution on the device"):
        evaluator(Late(), with_hits(4))


def test_the_network_asks_its_solver_on_every_device(monkeypatch):
    asked = []
    monkeypatch.setattr("Models.deepemd.settle", lambda *device: asked.append(device))
    DeepEMD().to("meta").settle()
    assert asked == [()]


# --- what is encoded, loaded and drawn when ---


@pytest.mark.parametrize("episode_batch", [1, 2, 8])
@pytest.mark.parametrize("is_random", [False, True])
@pytest.mark.parametrize("feature_cache", ["auto", "off"])
def test_each_image_is_encoded_once(episode_batch, is_random, feature_cache):
    episodes = Episodes(episode(k % 5, 5, 6, 7, 8, 9) for k in range(7))
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
        evaluator(model, Episodes([episode(0, 5, 6, 7, 8, 9)] * 3))
    assert len(data.asked) == 36
    assert not evaluator.pixels


@pytest.mark.parametrize("num_workers", [0, 3])
def test_a_full_cache_gives_up_its_oldest_images(monkeypatch, num_workers):
    """Its size is known with the first nodes: the workers load no later group before."""
    monkeypatch.setattr(cache, "CACHE_SHARE", 1.0)
    monkeypatch.setattr(cache, "free_memory", lambda device: 20 * 2 * 4)  # room for the nodes of 20 images
    # Groups of two episodes walk over 40 images, 8 at a time, of which 4 are those of the group before; then back.
    walk = [*range(0, 34, 2), *range(34, -1, -2)]
    episodes, model = Episodes([episode(*range(k, k + 6)) for k in walk]), FixedLogits()
    result = Evaluator(Samples(), num_workers=num_workers, episode_batch=2, **SHAPE)(model, episodes)
    assert result.accuracies == [25.0 * min(k, 4) for k in walk]
    # On the way back, the 20 newest images are still there: 20 to 39; then 0 to 19 are encoded once more.
    assert sum(model.encoded) == 40 + 20


def test_no_image_of_a_group_loses_its_row():
    """However the images of a group lie in a table that holds no more than them."""
    table, contents = NodeTable(CPU, most=100, capacity=6), {}
    random = torch.Generator().manual_seed(0)
    for _ in range(200):
        wanted = torch.randint(20, (6,), generator=random).tolist()
        contents |= {row: item for item, row in table.reserve_rows(wanted).items()}
        assert [contents[table.place[item]] for item in wanted] == wanted
        assert set(table.place.values()) <= set(range(6))
        assert len(set(table.place.values())) == len(table.place)


def test_decoded_images_are_kept_over_calls():
    data, model = Samples(), FixedLogits()
    evaluator = Evaluator(data, keep_pixels=True, **SHAPE)
    for episodes in ([episode(1, 5, 6, 7, 8, 9)], [episode(1, 5, 6, 7, 8, 9), episode(3, 5, 6, 7, 8, 9)]):
        result = evaluator(model, Episodes(episodes))
    assert data.asked == [1, 5, 6, 7, 8, 9, 3]
    assert result.accuracies == [25, 75]
    assert sum(model.encoded) == 6 + 7  # the weights may have changed, so nodes are not kept
    without = Evaluator(data, **SHAPE)
    for _ in range(2):
        without(model, Episodes([episode(1, 5, 6, 7, 8, 9)]))
    assert len(data.asked) == 7 + 12


@pytest.mark.parametrize(("room", "encoded"), [(6, 6 + 8), (100, 8)])
def test_nodes_are_kept_over_calls_where_they_fit(monkeypatch, room, encoded):
    """A table for 6 images is of no use to groups of 8, which the second call has."""
    monkeypatch.setattr(cache, "CACHE_SHARE", 1.0)
    monkeypatch.setattr(cache, "free_memory", lambda device: room * 2 * 4)
    evaluator, model = Evaluator(Samples(), keep_nodes=True, episode_batch=1, **SHAPE), FixedLogits()
    for images in (range(2, 8), range(0, 8)):
        evaluator(model, Episodes([episode(*images)]))
    assert sum(model.encoded) == encoded


@pytest.mark.parametrize("num_workers", [0, 1])
def test_few_episodes_are_drawn_ahead(num_workers, monkeypatch):
    """Also when no image is missing, and a loader looks for one among all that is to come."""
    monkeypatch.setattr(evaluation, "EPISODES_AHEAD", 32)
    episodes, stop = Endless(), StopRequest()
    groups = itertools.count()

    class Stopping(FixedLogits):
        def match(self, support, query, **settings):
            stop.signal_number = 15 if next(groups) == 9 else 0
            return super().match(support, query, **settings)

    with pytest.raises(Stopped):
        Evaluator(Samples(), num_workers=num_workers, stop=stop, **SHAPE)(Stopping(), episodes)
    assert 10 * 8 <= episodes.drawn <= 10 * 8 + 32


@pytest.mark.parametrize("ahead", [1, 16, 1000])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_loaded_ahead_are_those_of_their_episode(monkeypatch, num_workers, ahead):
    """Groups that miss many images, one, or none, in turn."""
    monkeypatch.setattr(evaluation, "EPISODES_AHEAD", ahead)
    first = [k // 3 % 5 for k in range(60)]
    episodes = Episodes(episode(hits, *([9] * 5 if k % 2 else range(9 * k, 9 * k + 5))) for k, hits in enumerate(first))
    for keep_pixels in (False, True):
        evaluator = Evaluator(Samples(), num_workers=num_workers, episode_batch=2, keep_pixels=keep_pixels, **SHAPE)
        for _ in range(2):
            assert evaluator(FixedLogits(), episodes).accuracies == [25.0 * hits for hits in first]


# --- memory ---


def test_nodes_go_where_there_is_room(monkeypatch):
    """If a device is short of memory, to the host; "cuda" is only a name here."""
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
        table = NodeTable(torch.device("cuda"), most=500)
        table.put([0, 1, 2], real(3, 2, 1), least=10)
        assert made.pop() == expected
        assert table.capacity == expected[0]


def test_large_tables_are_in_float16(monkeypatch, capsys):
    images = torch.randn(64, 640, 4, generator=torch.Generator().manual_seed(0)).relu()  # as encoders leave them
    full = NodeTable(CPU, most=64)
    full.put([*range(64)], images, least=10)
    assert full.nodes.dtype == torch.float32
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(cache, "LARGE_TABLE", images.nbytes - 1)
    half = NodeTable(CPU, most=64)
    half.put([*range(32)], images[:32], least=10)
    half.put([*range(32, 64)], images[32:], least=10)
    assert capsys.readouterr().err == "nodes are kept in float16; in full they would take 0.0 GiB\n"
    assert half.nodes.dtype == torch.float16
    kept = half.get(torch.arange(64).view(2, 32))
    assert kept.dtype == torch.float32
    model = DeepEMD(solver="simplex")
    logits = [model.match(nodes[:5], nodes[5:], way=5, shot=1) for nodes in (images, kept.flatten(0, 1))]
    assert 0 < (logits[0] - logits[1]).abs().max() < 1e-3


def test_nodes_beyond_float16_are_kept_in_full(monkeypatch, capsys):
    monkeypatch.setattr(cache, "LARGE_TABLE", 0)
    small, large = torch.full((2, 3, 1), 65504.0), torch.full((2, 3, 1), 65505.0)
    for beyond in (large, small / 1e7):  # numbers near 0 would lose digits
        table = NodeTable(CPU, most=4)
        table.put([0, 1], beyond, least=4)
        assert (table.nodes.dtype, capsys.readouterr().err) == (torch.float32, "")
    table = NodeTable(CPU, most=4)
    table.put([0, 1], small, least=4)
    table.put([3, 2], large, least=4)
    assert table.get(torch.tensor([[0, 1, 2, 3]]))[0, :, 0, 0].tolist() == [65504, 65504, 65505, 65505]
    assert "warning: nodes reach 65505, which float16 cannot hold" in capsys.readouterr().err


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    tables = []

    class Table(NodeTable):
        def __init__(self, *args, **settings):
            super().__init__(*args, **settings)
            tables.append(self)

    monkeypatch.setattr(evaluation, "NodeTable", Table)
    monkeypatch.setattr(cache, "free_memory", lambda device: 4 * 4 * 8 * 100)  # a quarter for four, of 8 bytes an image
    evaluator = Evaluator(Samples(), ranks=Ranks(0, 1, local_size=4), keep_pixels=True, **SHAPE)
    assert evaluator.pixels.room == 8 * 100
    evaluator(FixedLogits(), with_hits(1))
    assert tables[0].capacity == 100


def test_memory_of_a_container_counts(monkeypatch, tmp_path):
    assert free_memory(CPU) > 0
    (tmp_path / "memory.max").write_text("2000\n")
    (tmp_path / "memory.current").write_text("500\n")
    monkeypatch.setattr(cache, "Path", lambda _, name: tmp_path / name)
    assert free_memory(CPU) == 1500
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) > 1500


def test_unused_memory_of_the_allocator_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_memory(torch.device("cuda")) == 1300


def test_pixels_are_kept_while_there_is_room():
    pixels = PixelCache(room=2 * 8)
    for first in (0, 2):
        items = [first, first + 1]
        pixels.assemble(cache.Batch(items, [0, 1], items), torch.zeros(2, 2), keep=True)
    assert list(pixels) == [0, 1]


@pytest.mark.parametrize(("patches", "most"), [(None, 256), (13, 19), (300, 1)])
def test_a_gpu_is_given_batches_of_few_sizes(monkeypatch, patches, most):
    """ "cuda" is only a name here."""
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **settings: self)
    model = FixedLogits()
    model.encode = lambda images: (sizes.add(len(images)), images.double().flatten(1)[:, :3, None])[1]
    sizes: set[int] = set()
    shape = (3, 1, 1) if patches is None else (patches, 3, 1, 1)
    for count in range(1, most + 2):
        images = torch.randint(256, (count, *shape), dtype=torch.uint8)
        nodes = encode_images(model, images, device=torch.device("cuda"))
        assert torch.equal(nodes[..., 0], images.double().flatten(1)[:, :3])
    assert len(sizes) <= evaluation.ENCODE_SIZES
    assert max(sizes) == most
    sizes.clear()
    encode_images(model, torch.zeros(3, *shape), device=CPU)
    assert sizes == ({3} if most > 3 and patches is None else {1})


def test_nodes_of_a_data_set_are_not_encoded():
    class Nodes:
        nodes = torch.arange(10).half().view(10, 1, 1)

    model = FixedLogits()
    model.encode = None
    result = Evaluator(Nodes(), episode_batch=2, num_workers=1, **SHAPE)(model, with_hits(4, 2, 0))
    assert result.accuracies == [100, 50, 0]


def encode_all(indices, **more):
    settings = {"device": CPU, "stop": StopRequest(), "ranks": Ranks()}
    return evaluation.encode_dataset(FixedLogits(), Samples(), indices, **settings | more)


def test_a_data_set_is_encoded_in_float16_where_that_can_hold_it():
    for last, dtype in ((100, torch.float16), (2**20 + 1, torch.float32)):
        nodes = encode_all([*range(20), last])
        assert nodes.dtype == dtype
        assert nodes[:, 0, 0].tolist() == [*range(20), last]


def test_ranks_share_the_encoding_of_a_data_set(monkeypatch):
    class Sent(Exception):
        pass

    def send(self, own):
        raise Sent(own)

    monkeypatch.setattr(Ranks, "gather", send)
    sent = []
    for rank in range(3):
        with pytest.raises(Sent) as raised:
            encode_all(range(60), ranks=Ranks(rank, 3))
        sent.append(raised.value.args[0])
    assert [sum(map(len, own)) for _, own in sent] == [24, 20, 16]  # batches of 8, in turn
    monkeypatch.setattr(Ranks, "gather", lambda self, own: sent)
    assert encode_all(range(60), ranks=Ranks(1, 3))[:, 0, 0].tolist() == [*range(60)]


def test_encoding_a_data_set_can_be_stopped():
    stop = StopRequest()
    stop.signal_number = 15
    with pytest.raises(Stopped):
        encode_all(range(60), stop=stop)


# --- records ---

SCORES = [[0.5, 3, 4], [0.25, 4, 4]]


def recorder(path, *, resume=True, episodes=3):
    return Recorder(path, resume=resume, episodes=episodes, queries=4, ranks=Ranks())


class Labelled(Samples):
    """Sample i is of class i modulo 10."""

    labels = [i % 10 for i in range(1000)]


def test_an_evaluation_continues_from_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "SECONDS_BETWEEN_RECORDS", 0.0)
    path, stop, model = tmp_path / "partial.json", StopRequest(), FixedLogits()
    episodes = with_hits(4, 2, 0, 1, 3)
    complete = recorder(tmp_path / "complete.json", episodes=5)
    whole = Evaluator(Labelled(), **SHAPE)(model, episodes, recorder=complete)
    evaluator = Evaluator(Labelled(), episode_batch=2, stop=stop, **SHAPE)
    stop.signal_number = 15
    with pytest.raises(Stopped):
        evaluator(model, episodes, recorder=recorder(path, episodes=5))
    assert len(json.loads(path.read_text())["scores"]) == 2
    stop.signal_number, model.draws = 0, []
    resumed = recorder(path, episodes=5)
    assert evaluator(model, episodes, recorder=resumed) == whole
    assert resumed.confusion == complete.confusion
    assert resumed.confusion.total() == 20
    assert len(model.draws) == 3
    resumed.update(now=True)
    again = recorder(path, episodes=5)  # stopped after the last episode
    assert evaluator(model, episodes, recorder=again) == whole
    assert len(model.draws) == 3
    assert recorder(path, resume=False).scores == []
    again.remove()
    assert not path.exists()


def test_confusion_counts_every_query(tmp_path):
    """Two-way episodes of classes c and 9: queries are of class c and 9 in turn, and hits come first."""
    kept = recorder(tmp_path / "partial.json")
    Evaluator(Labelled(), episode_batch=2, **SHAPE)(FixedLogits(), with_hits(4, 3, 0), recorder=kept)
    # Episode by episode: all right; the last, a 9, taken for a 3; all wrong.
    assert kept.confusion == {(4, 4): 2, (9, 9): 3, (3, 3): 2, (9, 3): 1, (0, 9): 2, (9, 0): 2}
    assert kept.confusion.total() == 12
    unlabelled = recorder(tmp_path / "partial.json")
    Evaluator(Samples(), **SHAPE)(FixedLogits(), with_hits(4), recorder=unlabelled)
    assert unlabelled.confusion == {}


def test_confusion_is_gathered_over_ranks(monkeypatch, tmp_path):
    other = [Score(0.5, 2, 4)], Counter({(7, 7): 2, (7, 8): 2})
    monkeypatch.setattr(Ranks, "gather", lambda self, own: [own, (0, *other)])
    kept = recorder(tmp_path / "partial.json")
    evaluator = Evaluator(Labelled(), episode_batch=1, ranks=Ranks(0, 2), **SHAPE)
    result = evaluator(FixedLogits(), with_hits(4, 2), recorder=kept)
    assert result.accuracies == [100, 50]
    assert kept.confusion == {(4, 4): 2, (9, 9): 2, (7, 7): 2, (7, 8): 2}


@pytest.mark.parametrize(
    "content",
    [
        "",
        json.dumps({"scores": SCORES, "seconds": 1, "confusion": [[0, 0, 7]]}),
        json.dumps({"scores": SCORES, "seconds": 1, "confusion": [[0, 0, 6], [0, 1, 2]]}),
        json.dumps({"scores": SCORES, "seconds": 1, "confusion": [[0, 0, 7.0], [0, 1, 1]]}),
        json.dumps({"scores": SCORES, "seconds": 1, "confusion": [[0, 0, 7, 1]]}),
        json.dumps({"scores": SCORES, "seconds": 1, "confusion": 3}),
        "[]",
        "3",
        "null",
        '{"scores": []}',
        '{"scores": 3, "seconds": 1, "confusion": []}',
        '{"scores": [], "seconds": -1, "confusion": []}',
        '{"scores": [], "seconds": NaN, "confusion": []}',
        '{"scores": [[0.5, 3]], "seconds": 1, "confusion": []}',
        '{"scores": [[0.5, 3, 4, 4]], "seconds": 1, "confusion": []}',
        '{"scores": [["0.5", 3, 4]], "seconds": 1, "confusion": []}',
        '{"scores": [[0.5, 5, 4]], "seconds": 1, "confusion": []}',
        '{"scores": [[0.5, -1, 4]], "seconds": 1, "confusion": []}',
        '{"scores": [[0.5, 2.5, 4]], "seconds": 1, "confusion": []}',
        '{"scores": [[0.5, 3, 5]], "seconds": 1, "confusion": []}',
        '{"scores": [[NaN, 3, 4]], "seconds": 1, "confusion": []}',
        '{"scores": [[1e999, 3, 4]], "seconds": 1, "confusion": []}',
        '{"scores": [[1' + "0" * 400 + ', 3, 4]], "seconds": 1, "confusion": []}',
        json.dumps({"scores": SCORES * 2, "seconds": 1, "confusion": []}),
        '{"scores": ' + "[" * 100_000,
        '{"scores": [[0.5, 3, 4]], "sec',
    ],
)
def test_a_damaged_record_is_set_aside(tmp_path, capsys, content):
    path = tmp_path / "partial-1.json"
    path.write_text(json.dumps({"scores": SCORES, "seconds": 1, "confusion": []}))
    assert recorder(path).scores == [Score(*row) for row in SCORES]
    path.write_text(content)
    found = recorder(path)
    assert (found.scores, found.seconds < 1, path.exists()) == ([], True, False)
    assert (tmp_path / "partial-1.damaged").read_text() == content
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {path} is damaged")


def test_a_record_that_cannot_be_read_is_set_aside(tmp_path, capsys):
    path = tmp_path / "partial-1.json"
    path.mkdir()
    found = recorder(path)
    found.update(now=True)
    assert json.loads(path.read_text())["scores"] == found.scores == []
    assert "cannot read" in capsys.readouterr().err


def test_a_summary_of_scores():
    assert Evaluation.of([Score(*row) for row in SCORES]) == (
        0.375,
        87.5,
        pytest.approx(1.96 * 12.5 / 2**0.5),
        [75, 100],
    )
