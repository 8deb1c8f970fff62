"""The models that `train.py` trains.

A model is a file here with `RECIPES`, one for each task it learns (see `models.recipe`), and a line in `FILES`. Nothing
else knows it by name.
"""

from importlib import import_module

from models.recipe import Recipe, SlotModel, Task

__all__ = ["FILES", "MODELS", "Recipe", "SlotModel", "Task"]

#: The files with recipes, in the order in which `--help` names their models.
FILES = (
    "slot_attention",
    "slot_mlp",
    "iodine",
    "monet",
    "dspn",
    "set_prediction",
)

#: The recipes by the model's name and the task.
MODELS: dict[str, dict[Task, Recipe]] = {}
for _file in FILES:
    for _recipe in import_module(f"models.{_file}").RECIPES:
        MODELS.setdefault(_recipe.model, {})[_recipe.task] = _recipe
