"""Hugging Face transformers: what a family is (`archs/`), and how its layers are swapped (`patch.py`)."""
