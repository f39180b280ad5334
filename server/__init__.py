"""Text-generation server for Attention Free Transformers."""
