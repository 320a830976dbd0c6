"""What several personalizers share."""
