"""What a user gets: boxes in pixels of the original picture, scores, labels, class names. Needs numpy only."""

from __future__ import annotations
