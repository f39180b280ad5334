"""The commands of `aft`, one in a file."""
