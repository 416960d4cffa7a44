"""Recipes: the contract, and the recipes of the general-purpose environments. Each domain keeps its own."""

from headwater.recipes.base import EnvironmentRecipe, Problem, Recipe, available, find

__all__ = ["EnvironmentRecipe", "Problem", "Recipe", "available", "find"]
