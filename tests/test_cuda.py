"""What only a GPU can show. Skipped where there is none; where two are needed and one is there, it is named twice."""

import json
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import ROOT, finish, formula_weights, normal_images, relative, start, torchrun
from torch import nn
from torch.nn import functional as F

from dataloader import EpisodeSampler, ImageDataset, SeededEpisodes, make_view
from engine import cache, evaluation
from engine.evaluation import Evaluator
from engine.start import set_seed
from engine.training import FitSettings, StepGuard, make_optimizer
from Models import Classifier, DeepEMD
from Models.emd import SOLVERS, ProblemError, emd, scale_to_mass, settle, simplex_cuda
from Models.matching import cosine_similarity_map, cross_reference_weights
from Models.sfc import fit_prototypes

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
TWO = [0, 1] if torch.cuda.device_count() > 1 else [0, 0]
TINY = ["-image_size", "16", "-query", "2", "-way", "2", "-dataset", "folder", "-num_workers", "0"]
LABELS = torch.tensor([0, 1, 0, 1])


@pytest.fixture(autouse=True)
def full_precision():
    """TF32 has ten bits, too few to compare with the CPU."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


def network(**settings) -> DeepEMD:
    model = DeepEMD(**settings)
    formula_weights(model.encoder, 1)
    return model


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("nodes", [9, 25])
def test_solver_equals_the_cpu(solver, nodes):
    if solver == "qpth":
        pytest.importorskip("qpth")
    random = torch.Generator().manual_seed(nodes)
    cost = torch.rand(6, nodes, nodes, generator=random)
    weights = [torch.rand(6, nodes, generator=random) + 0.05 for _ in range(2)]
    found = []
    for device in (CPU, GPU):
        inputs = [tensor.to(device).requires_grad_() for tensor in (cost, *weights)]
        value, flow = emd(inputs[0], *(scale_to_mass(weight, nodes) for weight in inputs[1:]), solver=solver)
        assert (value.device, flow.device) == (device, device)
        value.sum().backward()
        gradients = [torch.zeros(()) if tensor.grad is None else tensor.grad.cpu() for tensor in inputs]
        found.append([value.detach().cpu(), flow.cpu(), *gradients])
    for ours, expected in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, expected, atol=2e-2 if solver == "qpth" else 1e-4, rtol=1e-3)


# --- simplex on the device ----------------------------------------------------------------------------------------------


def problems(batch: int, n: int, m: int, seed: int = 0) -> list[torch.Tensor]:
    """Costs, supplies and demands of nodes with a common part, as features have it, on the CPU."""
    draw = torch.Generator().manual_seed(seed)
    common = torch.randn(64, 1, generator=draw).abs()
    nodes = [(common + torch.randn(batch, 1, 64, k, generator=draw)).relu() for k in (n, m)]
    cost = 1 - cosine_similarity_map(*nodes)[:, 0, 0]
    weights = cross_reference_weights(*nodes)[:, 0, 0], cross_reference_weights(*nodes[::-1])[:, 0, 0]
    return [cost, *(scale_to_mass(weight, n) for weight in weights)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (9, 25), (25, 25), (33, 32), (40, 41), (64, 64)])
def test_the_kernel_certifies_its_answers(size, dtype):
    given = [part.to(GPU, dtype).contiguous() for part in problems(256, *size)]
    assert simplex_cuda.is_usable(GPU, *size, dtype)
    solution = simplex_cuda.solve_tensors(*given)
    assert not solution.status.any()
    assert simplex_cuda.certificate_fault(*given, solution) is None
    expected = emd(*problems(256, *size), solver="simplex").value
    torch.testing.assert_close(solution.value.cpu().float(), expected, atol=1e-5, rtol=1e-5)


def test_a_call_and_its_gradient_never_wait():
    given = [part.to(GPU).requires_grad_() for part in problems(100, 25, 25)]
    emd(*given, solver="simplex").value.sum().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        emd(*given, solver="simplex").value.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(part.grad.isfinite().all() for part in given)


def test_a_thread_that_is_new_to_the_device_can_solve():
    given = [part.to(GPU) for part in problems(100, 25, 25)]
    expected = emd(*given, solver="simplex").value
    with ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: emd(*given, solver="simplex").value).result(), expected)


def test_matching_a_group_of_episodes_waits_once(folder):
    model = network(solver="simplex").to(GPU)
    data = ImageDataset("folder", "test", data_dir=str(folder), view=make_view("fcn", train=False, image_size=32))
    episodes = SeededEpisodes(EpisodeSampler(data.labels, 4, 5, 4), seed=1, name="test")
    evaluator = Evaluator(data, way=5, shot=1, device=GPU, seed=1)
    episodes = SeededEpisodes(EpisodeSampler(data.labels, 4, 5, 4), seed=1, name="test")
    nodes = torch.rand(4, 20, 640, 25, device=GPU)
    with torch.no_grad():
        evaluator._score(model, nodes, episodes, 0, None)  # compiles
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                evaluator._score(model, nodes, episodes, 0, None)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(wait.message) for wait in waits]


def test_problems_that_are_none_are_nan_until_settled():
    given = [part.to(GPU) for part in problems(5, 9, 9)]
    given[0][3, 1, 1] = torch.nan
    value = emd(*given, solver="simplex").value
    assert value.isnan().tolist() == [False, False, False, True, False]
    with pytest.raises(ProblemError, match="not finite"):
        settle(GPU)
    settle(GPU)


@pytest.mark.parametrize("head", ["deepemd", "cosine"])
def test_the_fit_as_a_graph_is_the_fit_step_by_step(monkeypatch, head):
    settings = {"way": 3, "shot": 3, "lr": 10.0, "steps": 12, "batch_size": 4, "head": head, "solver": "simplex"}
    support = (torch.randn(2, 9, 64, 9, generator=torch.Generator().manual_seed(1)) + 0.5).relu()
    order = torch.stack([torch.randperm(9, generator=torch.Generator().manual_seed(k)) for k in range(12)])
    replays = []
    real = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or real(graph))
    found = fit_prototypes(support.to(GPU), permutations=order, **settings)
    assert len(replays) == 36 - 2 * 3
    assert len(set(map(id, replays))) == 2
    expected = fit_prototypes(support, permutations=order, **settings)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)


def evaluate(folder: Path, device: torch.device, **settings) -> evaluation.Evaluation:
    view = make_view("fcn", train=False, image_size=32)
    data = ImageDataset("folder", "test", data_dir=str(folder), view=view)
    episodes = SeededEpisodes(EpisodeSampler(data.labels, 12, 5, 4), seed=1, name="test")
    model = network(sfc_update_step=3, **settings).to(device)
    return Evaluator(data, way=5, shot=2, device=device, seed=1, num_workers=2, episode_batch=4)(model, episodes)


@pytest.mark.parametrize("solver", ["opencv", "simplex", "ipm"])
def test_evaluation_equals_the_cpu(folder, solver):
    found, expected = (evaluate(folder, device, solver=solver) for device in (GPU, CPU))
    assert abs(found.loss - expected.loss) < 1e-3 * expected.loss
    assert abs(found.accuracy - expected.accuracy) < 1


def test_evaluation_on_two_devices(folder):
    found, expected = evaluate(folder, GPU, device_ids=TWO, solver="ipm"), evaluate(folder, GPU, solver="ipm")
    assert abs(found.loss - expected.loss) < 1e-3 * expected.loss


def test_nodes_in_pinned_host_memory(folder, monkeypatch):
    expected = evaluate(folder, GPU)
    tables = []
    real = cache.NodeTable.get

    def get(self, rows):
        tables.append(self.nodes)
        return real(self, rows)

    monkeypatch.setattr(cache.NodeTable, "get", get)
    monkeypatch.setattr(cache, "free_memory", lambda device: 1 << 30 if device.type == "cpu" else 0)
    found = evaluate(folder, GPU)
    assert all(table.is_pinned() for table in tables)
    assert found == expected


def convolution_dtypes(module: nn.Module) -> set[torch.dtype]:
    found = set()
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            part.register_forward_hook(lambda _, inputs, out: found.add(out.dtype))
    return found


@pytest.mark.parametrize("device_ids", [[0], TWO], ids=["one device", "two devices"])
@pytest.mark.parametrize("stage", ["pre-training", "episodes"])
def test_bfloat16_reaches_every_convolution(device_ids, stage):
    model = network(amp="bfloat16", device_ids=device_ids).to(GPU).train()
    found = convolution_dtypes(model)
    images = normal_images(5, 8, 3, 32, 32).to(GPU)
    if stage == "episodes":
        assert model.encode(images).dtype == torch.float32
    else:
        classifier = Classifier(model.encoder, 4).to(GPU)
        spread = nn.DataParallel(classifier, device_ids) if len(device_ids) > 1 else classifier
        assert spread(images).dtype == torch.float32
    assert found == {torch.bfloat16}


@pytest.mark.parametrize("amp", ["float16", "bfloat16"])
def test_half_precision_training_step(amp):
    model = network(amp=amp, solver="simplex").to(GPU).train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer, _ = make_optimizer(model, FitSettings(max_epoch=1, lr=0.01, step_size=1, gamma=0.5))
    guard = StepGuard(model, optimizer, torch.amp.GradScaler("cuda", enabled=amp == "float16"))
    images = normal_images(5, 6, 3, 32, 32).to(GPU)
    for number in range(8):  # the scale may have to fall first
        guard.scaler.scale(F.cross_entropy(model(images, way=2, shot=1), LABELS.to(GPU))).backward()
        guard.step(f"step {number}")
    assert guard.progress.skipped < 8
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert not any(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_compiled_training_and_evaluation():
    images = normal_images(5, 6, 3, 32, 32).to(GPU)
    results = []
    for compiled in (True, False):
        model = network(compiled=compiled, solver="simplex").to(GPU).train()
        logits = model(images, way=2, shot=1)
        F.cross_entropy(logits, LABELS.to(GPU)).backward()
        with torch.no_grad():
            nodes = model.folded().encode(images)
        results.append((logits.detach(), nodes, model.encoder.layer4[0].conv3.weight.grad))
    for found, expected in zip(*results, strict=True):
        assert relative(found, expected) < 1e-3


def test_ipm_from_two_threads_of_a_fresh_process():
    """Whose first linear algebra on the GPU is asked for by both at once, as DataParallel does."""
    code = (
        "import torch; from concurrent.futures import ThreadPoolExecutor; from Models.emd import emd\n"
        "cost, one = torch.rand(4, 9, 9, device='cuda'), torch.ones(4, 9, device='cuda')\n"
        "with ThreadPoolExecutor(2) as pool:\n"
        "    a, b = pool.map(lambda _: emd(cost, one, one, solver='ipm').value, range(2))\n"
        "assert torch.equal(a, b)"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("solver", ["opencv", "ipm"])
@pytest.mark.parametrize("queries", [1, 5])
def test_uneven_cuts_of_data_parallel(solver, queries):
    """An odd number of images and of queries, and a single query, for which one device has nothing to do."""
    images = normal_images(5, 2 + queries, 3, 32, 32).to(GPU)
    with torch.no_grad():
        found, expected = (
            network(device_ids=ids, solver=solver).to(GPU).eval()(images, way=2, shot=1) for ids in (TWO, [0])
        )
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@two_gpus
def test_evaluation_by_two_processes_on_gpus(folder, tmp_path):
    words = ["eval.py", *TINY, "-model_dir", "none", "-test_episode", "8", "-data_dir", folder, "-json", "-"]
    alone, both = (json.loads(finish(start(words, tmp_path, *launcher)).out) for launcher in ([], torchrun(2)))
    assert both["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    assert both["accuracy"] == pytest.approx(alone["accuracy"], abs=1)


@two_gpus
def test_synchronised_batch_norm_is_that_of_one_process(folder, tmp_path):
    """The gradient of a batch divided between two GPUs, which is the momentum after one step."""
    words = ["train_pretrain.py", *TINY, "-max_epoch", "1", "-num_episode", "2", "-bs", "42", "-data_dir", folder]
    momenta = []
    for name, launcher, flags in (("one", [], []), ("two", torchrun(2), ["-sync_bn"])):
        done = finish(start([*words, "-extra_dir", name, *flags], tmp_path, *launcher))
        assert done.status == 0, done.err
        path = tmp_path / "checkpoint/pre_train/folder/42-0.1000-30-0.20" / name / "last.pth"
        state = torch.load(path, weights_only=True)["state"]["optimizer"]["state"]
        momenta.append([entry["momentum_buffer"] for entry in state.values()])
    for one, two in zip(*momenta, strict=True):
        assert relative(two, one) < 1e-2


def test_deterministic_steps_repeat_to_the_bit():
    images = normal_images(5, 6, 3, 32, 32).to(GPU)
    gradients = []
    try:
        set_seed(1, deterministic=True)
        for _ in range(2):
            model = network(solver="simplex").to(GPU).train()
            F.cross_entropy(model(images, way=2, shot=1), LABELS.to(GPU)).backward()
            gradients.append(model.encoder.layer1[0].conv1.weight.grad)
    finally:
        set_seed(1)
    assert torch.equal(*gradients)
