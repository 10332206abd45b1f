"""FC100 and CIFAR-FS, from CIFAR-100: the official pickles, or images as ``{train,test}/<class>/<file>.png``."""

import io
import pickle
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import PurePosixPath
from typing import Any

from archives import reading
from download import Remote
from PIL import Image
from sources import Content, Entry, Source, is_image

from dataloader.catalog import CATALOG
from recipes.common import Plan, Recipe, Target, last_parts, published_plan, split_of_class

PARTS = ("train", "test")
ARCHIVE, DIGEST = "cifar-100-python.tar.gz", "md5:eb9058c3a382ffc7106e4002c42a8d85"


def plan(name: str, source: Source, entries: list[Entry], crop: bool) -> Plan:
    split_of = split_of_class(name)
    images = {}
    for entry in entries:
        part, label, file = last_parts(entry.name, 3)
        if part in PARTS and label in split_of and is_image(file):
            split = split_of[label]
            folder = CATALOG[name].split_folders.get(split, split)
            images[entry.name] = Target(f"{folder}/{label}/{file}", split, label)
    return published_plan(name, images)


def adapt(source: Source) -> Source:
    pickles = {entry.name for entry in source.entries() if PurePosixPath(entry.name).name in (*PARTS, "meta")}
    return CifarPickles(source, pickles) if len(pickles) == 3 else source


class CifarPickles(Source):
    """The official ``cifar-100-python``, as if it were ``{train,test}/<class>/<file>.png``."""

    def __init__(self, source: Source, wanted: set[str]) -> None:
        super().__init__(source.where)
        content = {name.rpartition("/")[2]: data for name, data in source.read(wanted)}
        self.images: dict[str, tuple[str, int]] = {}
        self.pixels: dict[str, Any] = {}
        with reading(source.where):
            names = _unpickle(content["meta"])["fine_label_names"]
            for part in PARTS:
                table = _unpickle(content[part])
                if table["data"].dtype != "uint8" or min(table["fine_labels"], default=0) < 0:
                    raise ValueError(f"the pixels in {part} are not bytes, or a label is negative")
                self.pixels[part] = table["data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                rows = zip(range(len(self.pixels[part])), table["filenames"], table["fine_labels"], strict=True)
                self.images |= {f"{part}/{names[label]}/{file}": (part, row) for row, file, label in rows}

    def entries(self) -> list[Entry]:
        return [Entry(name, 2300) for name in self.images]  # an average PNG

    def read(self, wanted: Collection[str]) -> Iterator[Content]:
        for name, (part, row) in self.images.items():
            if name in wanted:
                buffer = io.BytesIO()
                Image.fromarray(self.pixels[part][row]).save(buffer, "PNG")
                yield name, buffer.getvalue()


def _unpickle(content: bytes) -> dict[str, Any]:
    return _PlainUnpickler(io.BytesIO(content), encoding="latin1").load()


class _PlainUnpickler(pickle.Unpickler):
    """Arrays and plain values. A pickle that names anything else is refused before that is imported."""

    ALLOWED = ("core.multiarray._reconstruct", "_core.multiarray._reconstruct", "ndarray", "dtype")  # in numpy

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes; the codec's name may be any module's
            return lambda text, encoding: text.encode("latin1")
        if f"{module}.{name}" not in [f"numpy.{allowed}" for allowed in self.ALLOWED]:
            raise pickle.UnpicklingError(f"it asks to run {module}.{name}, which is refused")
        return super().find_class(module, name)


DOWNLOADS = {ARCHIVE: Remote(f"https://www.cs.toronto.edu/~kriz/{ARCHIVE}", digest=DIGEST)}
RECIPES = {
    name: Recipe(CATALOG[name].folders[0], partial(plan, name), downloads=DOWNLOADS, adapt=adapt)
    for name in ("fc100", "cifar_fs")
}
