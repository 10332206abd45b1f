"""The networks of timm as encoders, on its tiny test networks; the flags of backbones, and each of their errors."""

import argparse
import builtins
import json
import re
import time

import pytest
import torch
from helpers import normal_images, relative, succeed
from torch import nn
from torch.nn import functional as F

from dataloader.arguments import add_data_arguments
from engine.arguments import encoder_suffix
from engine.command_line import make_parser
from Models import DeepEMD, timm_encoder
from Models.arguments import add_model_arguments, add_weights_arguments, build_model, open_model
from Models.backbones import make_encoder, plan_backbone
from Models.conv4 import Conv4
from Models.weights import load_encoder_weights
from utils import InputError

timm = pytest.importorskip("timm")
TimmEncoder = timm_encoder.TimmEncoder

# What the last map of each has: channels, and pixels for one of its cells.
FAMILIES = {
    "test_vit": (64, 16),
    "test_vit2": (64, 16),
    "test_resnet": (96, 32),
    "test_convnext": (64, 32),
    "test_efficientnet": (64, 32),  # behind a head with 256
    "test_mambaout": (64, 32),  # channels last
    "test_nfnet": (192, 32),
    "test_byobnet": (256, 32),
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def encoder_of(model: str, size: int | None = None, **settings) -> TimmEncoder:
    torch.manual_seed(5)
    return TimmEncoder(model, image_size=size, **{"weights": "none", **settings}).eval()


def saved(path, content) -> str:
    torch.save(content, path)
    return str(path)


def parse(*flags: str) -> argparse.Namespace:
    parser = make_parser("test")
    add_data_arguments(parser)
    add_model_arguments(parser)
    add_weights_arguments(parser)
    return parser.parse_args(flags)


# --- maps ---


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("model", FAMILIES)
def test_maps_of_every_family(model, size):
    encoder, (channels, stride) = encoder_of(model, size), FAMILIES[model]
    images = normal_images(1, 2, 3, size, size)
    with torch.no_grad():
        maps, nodes = encoder(images), DeepEMD(encoder=encoder, map_size=2).encode(images)
    edge = size // stride
    assert maps.shape == (2, channels, edge, edge)
    assert (encoder.out_channels, plan_backbone(f"timm:{model}", image_size=size).edge) == (channels, edge)
    pooled = F.adaptive_avg_pool2d(maps, 2).flatten(2)
    assert nodes.shape == (2, channels, 4)
    assert relative(nodes, pooled) < 1e-6
    assert torch.equal(maps[1:], encoder(images)[1:])


@pytest.mark.parametrize("model", ["test_vit", "test_vit2", "deit_tiny_distilled_patch16_224"])
def test_prefix_tokens_are_no_nodes(model):
    """1 for the class, 1 and 4 registers, 2 with the distilled one: the patches follow them, row by row."""
    encoder, images = encoder_of(model, 64), normal_images(1, 2, 3, 64, 64)
    with torch.no_grad():
        tokens = encoder.network.forward_features(images)[:, encoder.network.num_prefix_tokens :]  # (B, N, C)
        found = encoder(images).flatten(2)
    assert relative(found.transpose(1, 2), tokens) < 1e-5


@pytest.mark.parametrize(("model", "layer"), [("test_vit", -3), ("test_vit", 0), ("test_resnet", 1)])
def test_a_layer_gives_its_own_map(model, layer):
    encoder, images = encoder_of(model, 64, layer=layer), normal_images(1, 2, 3, 64, 64)
    with torch.no_grad():
        settings = {"output_fmt": "NCHW", "intermediates_only": True, **NORMED[model]}
        every = encoder.network.forward_intermediates(images, **settings)
        assert relative(encoder(images), every[layer]) < 1e-5
    assert encoder.out_channels == every[layer].shape[1]
    assert encoder.identity()["layer"] == layer % len(every)


NORMED = {"test_vit": {"norm": True}, "test_resnet": {}}


def test_pixels_are_normalised_as_the_model_was_trained():
    encoder = make_encoder("timm:test_vit", image_size=64, weights="none", mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    config = timm.data.resolve_model_data_config(encoder.network)
    assert (encoder.mean, encoder.std) == (config["mean"], config["std"])


def test_dropout_and_drop_path_are_off_in_evaluation():
    encoder = encoder_of("test_vit", 64).train()
    for block in encoder.network.blocks:
        block.drop_path1, block.mlp.drop1 = timm.layers.DropPath(0.5), nn.Dropout(0.5)
    images = normal_images(1, 2, 3, 64, 64)
    assert not torch.equal(encoder(images), encoder(images))
    folded = encoder.folded()
    assert torch.equal(folded(images), folded(images))


def test_batch_norm_is_not_counted_twice():
    with pytest.raises(InputError, match="-checkpoint_activations: timm:test_resnet has batch norm"):
        encoder_of("test_resnet", 64, checkpoint_activations=True)


# --- weights ---


@pytest.mark.parametrize("kind", ["plain", "state_dict", "model", "module.", "safetensors"])
def test_weights_in_a_file(tmp_path, kind):
    state, file = encoder_of("test_vit", 64).network.state_dict(), tmp_path / "w.pth"
    if kind == "safetensors":
        from safetensors.torch import save_file

        file = file.with_suffix(".safetensors")
        save_file(state, file)
    elif kind == "module.":
        saved(file, {f"module.{key}": value for key, value in state.items()})
    else:
        saved(file, state if kind == "plain" else {kind: state, "epoch": 3})
    torch.manual_seed(6)
    encoder = TimmEncoder("test_vit", image_size=64, weights=str(file)).eval()
    assert encoder.weights == str(file)
    assert all(torch.equal(value, state[key]) for key, value in encoder.network.state_dict().items())


def test_a_checkpoint_for_another_image_size_is_refused_with_the_reason(tmp_path):
    path = saved(tmp_path / "w.pth", {"params": encoder_of("test_vit", 64).state_dict()})
    with pytest.raises(
        InputError, match="timm:test_vit: .*pos_embed is .*; such a network takes images of the -image_size"
    ):
        load_encoder_weights(encoder_of("test_vit", 96), path)


def test_a_position_table_is_resampled_for_another_image_size(tmp_path):
    large = encoder_of("test_vit", 160)
    encoder = encoder_of("test_vit", 96, weights=saved(tmp_path / "w.pth", large.network.state_dict()))
    # (1, 1 + N, C), the class token first
    table, wide = (one.network.pos_embed.detach() for one in (encoder, large))
    assert (wide.shape[1], table.shape[1]) == (101, 37)
    assert torch.equal(table[:, 0], wide[:, 0])
    grid = wide[:, 1:].unflatten(1, (10, 10)).permute(0, 3, 1, 2)
    smaller = F.interpolate(grid, (6, 6), mode="bicubic", antialias=True).flatten(2).transpose(1, 2)
    assert relative(table[:, 1:], smaller) < 1e-5
    with torch.no_grad():
        assert encoder(normal_images(1, 1, 3, 96, 96)).shape == (1, 64, 6, 6)


@pytest.mark.parametrize(("model", "classes"), [("test_resnet", 1000), ("test_vit", 7), ("test_efficientnet", 7)])
def test_the_classifier_in_a_file_is_left_out(tmp_path, model, classes):
    network = timm.create_model(model, num_classes=classes, **({"img_size": 64} if model == "test_vit" else {})).eval()
    encoder = encoder_of(model, 64, weights=saved(tmp_path / "w.pth", network.state_dict()))
    images, options = normal_images(1, 2, 3, 64, 64), encoder.options
    with torch.no_grad():
        assert torch.equal(encoder(images), network.forward_intermediates(images, **options)[-1])


@pytest.mark.parametrize("classes", [0, 1000])
def test_tensors_with_other_names_are_taken_in_order(tmp_path, capsys, classes):
    state = timm.create_model("test_efficientnet", num_classes=classes).state_dict()
    renamed = {f"_{number}_{key}": value for number, (key, value) in enumerate(state.items())}
    encoder = encoder_of("test_efficientnet", 64, weights=saved(tmp_path / "w.pth", renamed))
    assert all(torch.equal(value, state[key]) for key, value in encoder.network.state_dict().items())
    assert "other names for its tensors than timm:test_efficientnet, but the same shapes: they are taken in order" in (
        capsys.readouterr().err
    )


@pytest.fixture
def model_folder(tmp_path) -> str:
    """A model in a folder, made for 64 pixels and published without a classifier; and its name."""
    from safetensors.torch import save_file

    config = {"num_classes": 0, "input_size": [3, 64, 64], "fixed_input_size": True, "classifier": "head"}
    config |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "lanczos"}
    content = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": config}
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file(encoder_of("test_vit", 64).network.state_dict(), tmp_path / "model.safetensors")
    return f"local-dir:{tmp_path}"


def test_a_model_in_a_folder(model_folder):
    plan = plan_backbone(f"timm:{model_folder}")
    assert (plan.image_size, plan.edge, plan.map_size, plan.interpolation) == (64, 4, 4, "lanczos")
    encoder, expected = TimmEncoder(model_folder).eval(), encoder_of("test_vit", 64)
    assert (encoder.mean, encoder.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    images = normal_images(1, 2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(encoder(images), expected(images))


def test_a_file_may_have_a_classifier_that_the_model_was_published_without(tmp_path, model_folder):
    state = timm.create_model("test_vit", num_classes=7, img_size=64).state_dict()
    encoder = TimmEncoder(model_folder, weights=saved(tmp_path / "w.pth", state))
    assert all(torch.equal(value, state[key]) for key, value in encoder.network.state_dict().items())


def test_a_network_that_needs_numbers_is_planned_without_a_draw(monkeypatch):
    """Where it cannot be built on the meta device."""
    real = timm_encoder._create

    def create(model, **settings):
        if torch.get_default_device().type == "meta":
            raise InputError("not without numbers")
        return real(model, **settings)

    monkeypatch.setattr(timm_encoder, "_create", create)
    timm_encoder._probe.cache_clear()
    timm_encoder._network.cache_clear()
    state = torch.get_rng_state()
    assert plan_backbone("timm:test_vit", image_size=64).edge == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_random_weights_depend_on_the_seed_alone():
    first = encoder_of("test_vit", 64).identity()
    timm_encoder._probe.cache_clear()
    timm_encoder._network.cache_clear()  # what plans a network draws nothing
    assert encoder_of("test_vit", 64).identity() == first


# --- errors ---


def damaged(folder, kind: str) -> str:
    path = folder / "w.pth"
    state = timm.create_model("test_vit").state_dict()
    if kind == "another network":
        return saved(path, timm.create_model("test_resnet").state_dict())
    if kind == "a deeper network":
        return saved(path, state | {key.replace("blocks.0", "blocks.6"): value for key, value in state.items()})
    if kind == "an incomplete one":
        return saved(path, {key: value for key, value in state.items() if not key.startswith("blocks.1.")})
    if kind == "a pickle":
        return saved(path, {"model": nn.Linear(2, 2)})
    if kind == "one of ours":
        return saved(path, {"params": state})
    if kind == "a list":
        return saved(path, [1])
    path = path.with_suffix(".safetensors") if kind == "safetensors" else path
    path.write_bytes(b"no tensors")
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("another network", "not hold the weights of timm:test_vit: it lacks .* and .* more; it has unknown conv1"),
        ("a deeper network", "does not hold the weights of timm:test_vit: it has unknown blocks.6"),
        ("an incomplete one", "does not hold the weights of timm:test_vit: it lacks blocks.1"),
        ("a pickle", "it would run torch.nn.modules.linear.Linear, which is refused"),
        ("one of ours", "was trained here: name it with -model_dir"),
        ("a list", "holds no weights by name; it holds a list"),
        ("text", "it is damaged or in another format"),
        ("safetensors", "is damaged, or not a safetensors file"),
    ],
)
def test_files_of_other_things_are_refused(tmp_path, kind, message):
    with pytest.raises(InputError, match=message) as error:
        encoder_of("test_vit", 64, weights=damaged(tmp_path, kind))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("model", ["test_resnet.r160_in1k", "test_vit"])
def test_without_a_network_the_flag_for_files_is_named(model):
    with pytest.raises(
        InputError, match=f"timm:{model} cannot be opened: .* set -backbone_weights to a file, or to none"
    ):
        TimmEncoder(model, image_size=64)


def test_a_hub_that_cannot_be_reached_is_not_waited_for(monkeypatch):
    def unknown(*_):
        raise OSError("Name or service not known")

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(timm_encoder, "getproxies", dict)
    monkeypatch.setattr(timm_encoder.socket, "getaddrinfo", unknown)
    start = time.monotonic()
    with pytest.raises(InputError, match="set -backbone_weights to a file"):
        TimmEncoder("test_vit", image_size=64)
    assert time.monotonic() - start < 5
    assert constants.HF_HUB_OFFLINE is False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-backbone resnet13", "unknown backbone 'resnet13'; choose resnet12"),
        ("-backbone vit_small_patch16_224", "A model of the timm library is timm:vit_small_patch16_224"),
        ("-backbone timm", "-backbone timm needs a model of the library, as in timm:"),
        ("-backbone conv4:x", "Conv4 is one network: leave out ':x'"),
        ("-backbone timm:test_vot", "has no model 'test_vot'; the nearest: test_vit"),
        ("-backbone timm:test_vit.r161", "has no weights 'test_vit.r161'; the nearest: test_vit.r160_in1k"),
        ("-backbone timm:DINOv2_vits14", "has no model 'DINOv2_vits14'; the nearest: vit_base_patch14_dinov2"),
        ("-backbone timm:test_resnet -image_size 16", "-image_size 16 does not suit timm:test_resnet, which"),
        ("-backbone timm:zzzzzzzz", "has no model 'zzzzzzzz'; list them with timm.list_models"),
        ("-backbone timm:local-dir:nowhere", "not found: nowhere/config.json. Check the name of the folder"),
        ("-backbone timm:hf-hub:nobody/nothing", "Check the name and the network, or give a name of timm"),
        ("-backbone timm:test_vit -image_size 100", "multiples of 16, the size of its patches, such as 96 or 112"),
        ("-backbone timm:test_convnext -image_size 16", "-image_size 16 does not suit timm:test_convnext, which"),
        ("-backbone timm:test_vit -backbone_layer 6", "timm:test_vit has 6 layers, 0 to 5 or -1 to -6"),
        ("-backbone timm:test_vit -backbone_weights gone.pth", "-backbone_weights gone.pth: there is no such file"),
        ("-backbone timm:test_vit -map_size 11", "-map_size 11 is larger than the feature map, which is 10 x 10"),
        ("-backbone timm:test_vit -image_size 336 -map_size 0", "441 nodes .* at most 400 are allowed. .*-map_size"),
        ("-image_size 336", "441 nodes of an image are too many to match; .* Pool the map with -map_size"),
        ("-map_size 6", "-map_size 6 is larger than the feature map, which is 5 x 5 for -image_size 84"),
        ("-deepemd grid -map_size 3", "-map_size requires -deepemd fcn; with -deepemd grid, the nodes are patches"),
        ("-backbone_layer -2", "-backbone_layer is for timm backbones; ResNet12 gives its last map"),
        ("-backbone conv4 -backbone_weights hub", "-backbone_weights is for timm backbones, and this is Conv4"),
    ],
)
def test_flags_are_checked_when_they_are_read(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        parse(*flags.split())
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_without_timm_its_installation_is_named(monkeypatch, capsys):
    real = builtins.__import__

    def without(name, *rest):
        if name == "timm":
            raise ImportError("No module named 'timm'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    timm_encoder._network.cache_clear()
    with pytest.raises(SystemExit):
        parse("-backbone", "timm:test_vit")
    assert "-backbone timm:... requires the timm library (No module named 'timm'): pip install timm" in (
        capsys.readouterr().err
    )
    assert parse("-backbone", "conv4").image_size == 84


# --- flags ---


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", (84, 0, "bilinear")),
        ("-backbone conv4", (84, 0, "bilinear")),
        ("-backbone timm:test_vit", (160, 5, "bicubic")),
        ("-backbone timm:test_vit -image_size 32", (32, 2, "bicubic")),
        ("-backbone timm:test_vit -map_size 0 -interpolation nearest", (160, 0, "nearest")),
        ("-backbone timm:test_vit -deepemd grid", (160, 0, "bicubic")),
        ("-backbone timm:test_resnet", (160, 5, "bilinear")),
        ("-backbone timm:test_resnet -backbone_layer 1 -image_size 64", (64, 5, "bilinear")),
        ("-backbone timm:vit_small_patch14_dinov2.lvd142m", (224, 5, "bicubic")),  # made for 518
        ("-backbone timm:crossvit_9_240", (240, 5, "bicubic")),  # takes no other size
        ("-backbone timm:hiera_tiny_224", (224, 5, "bicubic")),  # has no norm for its maps
    ],
)
def test_defaults_depend_on_the_backbone(flags, expected):
    args = parse(*flags.split())
    assert (args.image_size, args.map_size, args.interpolation) == expected


@pytest.mark.parametrize(
    ("flags", "built", "reported"),
    [
        ("-backbone_weights none", "none", "none"),
        ("-model_dir none", "none", "none"),
        ("-model_dir none -backbone_weights FILE", "FILE", "FILE"),
        ("-backbone_weights FILE", "FILE", "FILE"),
        ("-model_dir TRAINED", "none", "TRAINED"),
        ("-model_dir TRAINED -backbone_weights none", "none", "TRAINED"),
    ],
)
def test_where_the_weights_of_a_timm_model_come_from(tmp_path, capsys, flags, built, reported):
    trained = encoder_of("test_vit", 32).state_dict()
    names = {
        "FILE": saved(tmp_path / "file.pth", encoder_of("test_vit", 32).network.state_dict()),
        "TRAINED": saved(tmp_path / "trained.pth", {"params": trained}),
    }
    words = [names.get(word, word) for word in flags.split()]
    args = parse("-backbone", "timm:test_vit", "-image_size", "32", "-solver", "simplex", *words)
    torch.manual_seed(0)
    model, weights = open_model(args, device=torch.device("cpu"), device_ids=())
    assert model.encoder.weights == names.get(built, built)
    assert weights == names.get(reported, reported)
    assert f"weights: {weights}\n" in capsys.readouterr().err
    same = all(torch.equal(value, trained[key]) for key, value in model.encoder.state_dict().items())
    assert same == (reported != "none")


def test_two_sources_of_weights_are_refused(tmp_path):
    trained, file = (saved(tmp_path / name, {}) for name in ("a.pth", "b.pth"))
    args = parse("-backbone", "timm:test_vit", "-image_size", "32", "-model_dir", trained, "-backbone_weights", file)
    with pytest.raises(InputError, match="are two sources of weights: leave one out"):
        open_model(args, device=torch.device("cpu"), device_ids=())


def test_a_checkpoint_of_another_backbone_is_refused_by_its_name(tmp_path):
    trained = saved(tmp_path / "a.pth", {"params": Conv4().state_dict()})
    flags = ["-backbone", "timm:test_vit", "-image_size", "32", "-solver", "simplex", "-model_dir", trained]
    with pytest.raises(InputError, match="does not hold the weights of timm:test_vit"):
        open_model(parse(*flags), device=torch.device("cpu"), device_ids=())


def test_patches_cost_a_pass_each_which_is_said_once(capsys):
    flags = ["-backbone", "timm:test_vit", "-image_size", "32", "-backbone_weights", "none", "-solver", "simplex"]
    for variant in ("fcn", "sampling"):
        build_model(parse(*flags, "-deepemd", variant))
        said = capsys.readouterr().err.count("every patch of an image is a whole pass of timm:test_vit")
        assert said == (variant != "fcn")


def test_a_map_is_pooled_behind_its_pyramid_and_patches_are_not():
    encoder = Conv4().eval()
    images = normal_images(1, 2, 3, 80, 80)  # a map of 5 x 5
    with torch.no_grad():
        maps = encoder(images)
        nodes = DeepEMD(encoder=encoder, map_size=3, feature_pyramid=(2,)).encode(images)
        expected = [F.adaptive_avg_pool2d(maps, size).flatten(2) for size in (2, 3)]
        assert relative(nodes, torch.cat(expected, dim=2)) < 1e-6
        patches = normal_images(2, 2, 4, 3, 16, 16)
        assert DeepEMD(encoder=encoder, map_size=3).encode(patches).shape == (2, 64, 4)
        with pytest.raises(ValueError, match="map_size 6 is larger than the feature map"):
            DeepEMD(encoder=encoder, map_size=6).encode(images)


def test_run_folders_of_two_models_differ():
    names = ["conv4", "timm:a", "timm:a.b", "timm:hf-hub:a/b", "timm:hf-hub:a-b", "timm:hf-hub-a-b"]
    suffixes = [encoder_suffix(argparse.Namespace(backbone=name)) for name in names]
    assert len(set(suffixes)) == len(names)
    assert suffixes[:3] == ["-conv4", "-timm-a", "-timm-a.b"]


# --- every script ---


@pytest.mark.parametrize(
    ("name", "flags"),
    [("timm:test_vit", ["-backbone_weights", "none", "-map_size", "0"]), ("conv4", ["-map_size", "1"])],
)
def test_every_script_takes_a_backbone(tmp_path, folder, name, flags):
    """Each stage by the command that the one before printed; then what was trained, by its folder alone."""
    data = ["-dataset", "folder", "-data_dir", folder]
    small = ["-gpu", "cpu", "-image_size", 32, "-query", 1, "-way", 2, "-num_workers", 0, "-solver", "simplex"]
    counts = ["-max_epoch", 1, "-num_episode", 1, "-bs", 512]
    out = succeed("train_pretrain.py", *data, *small, *counts, "-backbone", name, *flags, cwd=tmp_path)
    suffix = name.replace(":", "-")
    for counts in (["-max_epoch", 1, "-val_frequency", 1, "-val_episode", 1, "-test_episode", 2], []):
        command = next(line for line in out.splitlines() if line.startswith("next: "))
        assert "-backbone_weights" not in command
        assert suffix in command
        out = succeed(*command.split()[2:], *counts, cwd=tmp_path)
    run = tmp_path / f"checkpoint/folder/fcn/1shot-2way-{suffix}"
    results = json.loads((tmp_path / "checkpoint/eval/results.json").read_text())
    assert results["encoder"]["backbone"] == (name if ":" in name else "Conv4")
    assert results["flags"]["map_size"] == int(flags[-1])
    assert results["accuracy"] == json.loads((run / "results.json").read_text())["accuracy"]
    trained, images = ["-model_dir", run, "-gpu", "cpu", "-solver", "simplex"], sorted(folder.rglob("*.png"))
    succeed("visualize.py", "pair", *images[:2], *trained, cwd=tmp_path)
    found = succeed(
        "predict.py", "-support", folder / "test", "-query", images[0], *trained, "-json", "-", cwd=tmp_path
    )
    assert json.loads(found)[0]["class"]
    again = ["-shots", "1,2", "-episodes", 1, "-query", 1, "-way", 2, "-num_workers", 0, "-kshots", "mean"]
    table = succeed("benchmarks.heads", "-heads", "deepemd,proto", *again, *data, *trained, cwd=tmp_path)
    assert "| 2 | proto |" in table
