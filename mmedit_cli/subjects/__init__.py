"""Subjects to learn and to draw: sets with a name, the DreamBooth release, a folder of one's own."""
