"""Where the demo model lies: a tiny Llama that ships with the package and stands in for a missing model.

Knows a folder's place and nothing of what is in it. `scripts/train_demo_model.py` makes the folder.
"""

from pathlib import Path


def demo_model_path() -> Path:
    """Returns the demo model's folder, a Hugging Face folder like any other."""
    return Path(__file__).parents[1] / "demo_model"
