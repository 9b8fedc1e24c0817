"""Batches in, a trained detector out."""
