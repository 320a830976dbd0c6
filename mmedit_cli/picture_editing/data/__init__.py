"""Pairs of pictures with the instruction that leads from one to the other."""
