"""Attacks on the product: hostile checkpoints, recipes, rows and folders, none of which may get through."""
