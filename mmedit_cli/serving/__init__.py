"""A model with its edits behind the API that clients of OpenAI speak."""
