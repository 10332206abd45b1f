"""What is known about each data set: its folder, its layout, its size, its pixel statistics."""

from dataclasses import dataclass, field
from functools import partial

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class DatasetSpec:
    """One data set."""

    layout: str  # a key of dataloader.readers.READERS
    folders: tuple[str, ...]  # the spellings of its folder under the data directory; the first that exists is read
    image_folders: tuple[str, ...] = (".",)  # where, under that folder, the images named by a table may be
    split_folders: dict[str, str] = field(default_factory=dict)  # of splits whose folder has another name
    is_published: bool = False  # used as others have used it: images as stored, whatever their EXIF orientation says
    mean: tuple[float, float, float] | None = None  # of the three channels, for pixels in [0, 1]
    std: tuple[float, float, float] | None = None  # as the mean; both are None where the encoder's own are published
    large_images: bool = False  # the published images are larger than 84 pixels, and smaller ones cost accuracy
    pixels: int | None = None  # along either edge of every published image; None where they vary
    obtain: str = ""  # how to get it, for messages


_PREPARE = "python datasets/prepare.py"
_published = partial(DatasetSpec, is_published=True)
_large = partial(_published, large_images=True)

CATALOG: dict[str, DatasetSpec] = {
    "miniimagenet": _large("csv", ("miniimagenet",), image_folders=("images",), obtain=f"{_PREPARE} miniimagenet"),
    "cub": _large("csv_by_class", ("cub",), image_folders=(".", "images"), obtain=f"{_PREPARE} cub"),
    "tieredimagenet": _large(
        "folders",
        ("tiered_imagenet", "tieredimagenet"),
        obtain=f"{_PREPARE} tieredimagenet -source ILSVRC2012_img_train.tar",
    ),
    "fc100": _published("folders", ("FC100", "fc100"), pixels=32, obtain=f"{_PREPARE} fc100"),
    "cifar_fs": _published(
        "folders",
        ("cifar_fs",),
        split_folders={"train": "meta-train", "val": "meta-val", "test": "meta-test"},
        mean=(0.5071, 0.4866, 0.4409),
        std=(0.2009, 0.1984, 0.2023),
        pixels=32,
        obtain=f"{_PREPARE} cifar_fs",
    ),
    "folder": DatasetSpec("folders", (".",), obtain="put your images in <data_dir>/{train,val,test}/<class>/"),
    "glyphs": DatasetSpec("folders", ("glyphs",), obtain="python datasets/make_glyphs.py"),
}
