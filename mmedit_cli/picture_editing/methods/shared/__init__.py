"""What several image editors share."""
