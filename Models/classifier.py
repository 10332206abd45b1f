"""The pre-training head (DeepEMD paper, section 4.4, "feature pre-training")."""

from torch import Tensor, nn

from Models.encoder import Encoder


class Classifier(nn.Module):
    """An encoder with one linear layer on the globally averaged feature: ``(B, 3, H, W) -> (B, num_classes)``."""

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.fc = nn.Linear(encoder.out_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.encoder(images).mean(dim=(-2, -1)))
