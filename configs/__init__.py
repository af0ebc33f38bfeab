"""Recipes, engine configurations and cluster profiles that ship with Qatapult."""
