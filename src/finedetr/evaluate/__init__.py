"""Detections and targets in, numbers and pictures out."""
