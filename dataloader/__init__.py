"""From folders of images to batches and episodes."""

from dataloader.arguments import add_data_arguments, add_episode_arguments, draw_episodes, open_dataset
from dataloader.catalog import CATALOG
from dataloader.dataset import ImageDataset
from dataloader.episodes import EpisodeSampler, SeededBatches, SeededEpisodes, Task, episode_labels
from dataloader.views import VIEWS, make_view

__all__ = [
    "CATALOG",
    "VIEWS",
    "EpisodeSampler",
    "ImageDataset",
    "SeededBatches",
    "SeededEpisodes",
    "Task",
    "add_data_arguments",
    "add_episode_arguments",
    "draw_episodes",
    "episode_labels",
    "make_view",
    "open_dataset",
]
