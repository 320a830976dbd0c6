"""How editors with networks are trained."""
