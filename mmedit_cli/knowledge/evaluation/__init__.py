"""Answers, scores, the sequential protocol, and the report."""
