"""Drawing: text-to-image models learn concepts from a few photos, and the pictures are scored."""
