"""Training: text in, checkpoint folder out. Run as `aft train`."""
