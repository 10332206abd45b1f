"""Pictures of matches, episodes, runs and evaluations. Nothing here computes a flow, a weight or a logit of its own."""
