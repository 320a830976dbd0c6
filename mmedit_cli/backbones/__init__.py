"""Vision-language models behind one adapter; a family a file."""
