"""Text-generation server for Attention Free Transformers."""

from pathlib import Path

BUNDLED_MODEL = Path(__file__).parent.parent / "weights" / "aft-conv-stories"
