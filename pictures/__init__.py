"""Pictures of matches, episodes, runs and evaluations. Nothing here computes a flow, a weight or a logit of its own."""

import logging

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it would report its font cache on standard error
