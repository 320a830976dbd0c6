"""What the data sets share: reading, choosing and auditing cases."""
