"""Vision-language models behind one adapter; one family a file."""
