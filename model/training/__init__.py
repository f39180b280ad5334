"""Training: text in, checkpoint folder out. Run as `python -m model.training`."""
