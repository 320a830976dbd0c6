"""Edits that are kept: a ledger in a folder, the model behind it, and what is done with both."""
