"""Recipes, one readable file of settings each; add one by adding a file."""
