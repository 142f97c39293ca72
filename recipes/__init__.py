"""Recipes: the data factories and settings that train what this project ships."""
