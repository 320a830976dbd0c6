"""One HTML page that opens from disk: tables, charts and cases, with its style, its script and its data inside."""
