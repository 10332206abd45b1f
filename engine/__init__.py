"""The loops that the scripts share. They know tensors, episodes and devices, and nothing of the EMD."""
