"""Edits that are kept: a ledger in a folder, and the model behind it."""
