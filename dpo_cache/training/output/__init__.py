"""What a run writes: its folder, checkpoints, metrics, samples, model card, and lines for trackers."""
