"""What is known about each data set: its folder, its layout, its size, its pixel statistics."""

from dataclasses import dataclass, field

SPLITS = ("train", "val", "test")

_CIFAR_MEAN = (0.5071, 0.4866, 0.4409)
_CIFAR_STD = (0.2009, 0.1984, 0.2023)


@dataclass(frozen=True)
class DatasetSpec:
    """One data set.

    Attributes:
        layout: a key of :data:`dataloader.readers.READERS`.
        folders: the spellings of its folder under the data directory; the first that exists is read.
        image_folders: where, under that folder, the images named by a csv file may be.
        split_folders: the folder of a split, where its name is not that of the split.
        classes: published number of classes per split; empty where any number is fine.
        mean, std: of the three channels, for pixels in [0, 1]; None where the encoder's own are published.
        large_images: the published images are larger than 84 pixels; smaller ones cost accuracy, so they bring a warning.
        pixels: along either edge of every published image; None where they vary.
        obtain: how to get it, for messages.
    """

    layout: str
    folders: tuple[str, ...]
    image_folders: tuple[str, ...] = (".",)
    split_folders: dict[str, str] = field(default_factory=dict)
    classes: dict[str, int] = field(default_factory=dict)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    large_images: bool = False
    pixels: int | None = None
    obtain: str = ""

    @property
    def is_published(self) -> bool:
        """Its images are used as others have used them: as stored, whatever their EXIF orientation says."""
        return bool(self.classes)


def _counts(train: int, val: int, test: int) -> dict[str, int]:
    return dict(zip(SPLITS, (train, val, test), strict=True))


CATALOG: dict[str, DatasetSpec] = {
    "miniimagenet": DatasetSpec(
        layout="csv",
        folders=("miniimagenet",),
        image_folders=("images",),
        classes=_counts(64, 16, 20),
        large_images=True,
        obtain="python datasets/prepare.py miniimagenet",
    ),
    "cub": DatasetSpec(
        layout="csv_by_class",
        folders=("cub",),
        image_folders=(".", "images"),
        classes=_counts(100, 50, 50),
        large_images=True,
        obtain="python datasets/prepare.py cub",
    ),
    "tieredimagenet": DatasetSpec(
        layout="folders",
        folders=("tiered_imagenet", "tieredimagenet"),
        classes=_counts(351, 97, 160),
        large_images=True,
        obtain="python datasets/prepare.py tieredimagenet -source ILSVRC2012_img_train.tar",
    ),
    "fc100": DatasetSpec(
        layout="folders",
        folders=("FC100", "fc100"),
        classes=_counts(60, 20, 20),
        pixels=32,
        obtain="python datasets/prepare.py fc100",
    ),
    "cifar_fs": DatasetSpec(
        layout="folders",
        folders=("cifar_fs",),
        split_folders={"train": "meta-train", "val": "meta-val", "test": "meta-test"},
        classes=_counts(64, 16, 20),
        mean=_CIFAR_MEAN,
        std=_CIFAR_STD,
        pixels=32,
        obtain="python datasets/prepare.py cifar_fs",
    ),
    "folder": DatasetSpec(
        layout="folders", folders=(".",), obtain="put your images in <data_dir>/{train,val,test}/<class>/"
    ),
    "glyphs": DatasetSpec(layout="folders", folders=("glyphs",), obtain="python datasets/make_glyphs.py"),
}
