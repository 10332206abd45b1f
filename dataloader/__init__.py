"""From folders of images to batches and episodes."""

from dataloader.catalog import CATALOG
from dataloader.dataset import ImageDataset
from dataloader.episodes import EpisodeSampler, SeededBatches, SeededEpisodes, episode_labels
from dataloader.views import make_view

__all__ = [
    "CATALOG",
    "EpisodeSampler",
    "ImageDataset",
    "SeededBatches",
    "SeededEpisodes",
    "episode_labels",
    "make_view",
]
