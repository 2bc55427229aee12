"""The output of a run: its folder, checkpoints, metrics, samples, model card, and lines for trackers."""
