"""Answers and targets in, losses out. Knows no model class."""
