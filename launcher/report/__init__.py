"""Human-readable output: tables, HTML pages and progress."""
