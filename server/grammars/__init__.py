"""Grammars read, and tried in a process of their own. Nothing here imports torch: that process starts in a moment."""
